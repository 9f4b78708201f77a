"""Conducts a swap around a server: stop, exchange, start, test, and all of it back when anything fails."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Self

from hq_backups.engine.control import Service
from hq_backups.engine.errors import (
    HQBackupsError,
    PreflightFailed,
    RestoreNeedsHands,
    RestoreRolledBack,
    ServiceError,
)
from hq_backups.engine.events import Events
from hq_backups.engine.journal import UNTOUCHED
from hq_backups.engine.signals import Interrupts
from hq_backups.engine.swap import Swap

Test = Callable[[], None]


def switch(swap: Swap, service: Service, test: Test, events: Events) -> None:
    """Exchange the data under a server; raises RestoreRolledBack or RestoreNeedsHands when that fails.

    Any other error means that nothing was changed. ``test`` raises when the restored data are not right.
    """
    with Interrupts() as interrupts:
        was_running = service.is_running()
        watch = _Watch(service, service.watched(), events)
        swap.begin(service=service.facts(), was_running=was_running, watched=watch.names)
        with watch:
            try:
                _forward(swap, service, test, events, interrupts, watch)
            except BaseException as error:
                raise _roll_back(swap, service, events, error, watch) from error


def undo(target: Path, service: Service, test: Test, events: Events) -> bool:
    """Put back what a finished or killed restore set aside; tell whether there was anything to do.

    ``test`` is run on the old data. Raises PreflightFailed when nothing can be undone and nothing was
    touched, RestoreNeedsHands when the old data cannot be put back or do not serve.
    """
    swap = Swap.load(target)
    journal = swap.journal
    if journal.phase in ("undone", "rolled_back"):
        _tell(
            events, "undo", f"nothing to do: the restore {journal.run} was put back before.{_earlier(swap)}"
        )
        return False
    if journal.phase in UNTOUCHED:
        _Watch(service, tuple(journal.watched), events).release()
        swap.mark("undone")
        _tell(
            events, "undo", f"nothing to do: the restore {journal.run} had changed nothing.{_earlier(swap)}"
        )
        return False
    if (
        journal.phase == "done"
        and journal.old_inode is not None
        and not journal.old.exists()
        and swap.is_in()
    ):
        raise PreflightFailed(
            f"the restore {journal.run} cannot be undone: the old data, {journal.old}, are no longer there",
            hint=f"Restore a backup instead: list_backups {journal.store}",
        )
    swap.moves_back()
    with Interrupts():
        watched = tuple(dict.fromkeys([*journal.watched, *service.watched()]))
        start = journal.was_running or (journal.phase == "done" and service.is_running())
        if journal.phase == "undoing":
            start = journal.start_after_undo
        _note(swap, events, "undoing", start_after_undo=start, watched=list(watched))
        try:
            with _Watch(service, watched, events) as watch:
                _stop(service, events)
                _tell(events, "swap", _going_back(swap))
                swap.put_back()
                if start and journal.old_inode is not None:
                    _tell(events, "start", f"starting {service.describe()} on the old data")
                    service.start()
                    test()
                watch.release()
                _note(swap, events, "undone")
        except RestoreNeedsHands:
            raise
        except BaseException as error:
            raise _needs_hands(swap, service, f"undoing the restore failed: {_said(error)}") from error
    return True


class _Watch:
    """The monitor, told to look away for the length of a block and to watch again whatever happens."""

    def __init__(self, service: Service, names: tuple[str, ...], events: Events) -> None:
        self.service, self.names, self.events = service, names, events
        self.held = False

    def __enter__(self) -> Self:
        try:
            self.hold()
        except BaseException:
            self.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.held:
            self.release()

    def hold(self) -> None:
        """Make it look away."""
        self.held = True
        self.service.hold(self.names)

    def release(self) -> None:
        """Make it watch again; when that fails the data still count, but it is told.

        Called before the journal is closed: nobody looks at a closed one again.
        """
        self.held = False
        try:
            self.service.release(self.names)
        except Exception as error:
            with contextlib.suppress(Exception):
                names = " ".join(self.names)
                self.events.warning(
                    "monitor", f"{_said(error)}; the server is not watched: monit monitor {names}"
                )


def _forward(
    swap: Swap, service: Service, test: Test, events: Events, interrupts: Interrupts, watch: _Watch
) -> None:
    swap.mark("stopping")
    with interrupts.allowed():
        _stop(service, events)
    swap.mark("stopped")
    if swap.journal.old_inode is None:
        _tell(events, "swap", f"putting the restored data at {swap.target}")
    else:
        _tell(events, "swap", f"setting the old data aside as {swap.journal.old.name}")
    swap.swap_in()
    swap.mark("starting")
    with interrupts.allowed():
        if service.facts().get("start"):
            _tell(events, "start", f"starting {service.describe()} on the restored data")
        service.start()
        _tell(events, "test", "testing the restored data")
        test()
    watch.release()
    swap.mark("done")


def _roll_back(
    swap: Swap, service: Service, events: Events, error: BaseException, watch: _Watch
) -> HQBackupsError:
    """Bring the old data back and start them; return the error that tells how that went."""
    why, journal = _said(error), swap.journal
    serves = journal.was_running and journal.old_inode is not None
    try:
        _tell(events, "roll_back", f"putting the old data back, because: {why}")
        if not watch.held:
            watch.hold()
        _stop(service, events)
        swap.put_back()
        if serves:
            service.start()
        watch.release()
        _note(swap, events, "rolled_back")
    except BaseException as second:
        return _needs_hands(swap, service, f"{why}; then putting the old data back failed: {_said(second)}")
    state = "serving" if serves else "not serving, as before"
    return RestoreRolledBack(
        f"{why}. The old data are {state}. {swap.where()}",
        hint=error.hint if isinstance(error, HQBackupsError) and error.hint else None,
    )


def _stop(service: Service, events: Events) -> None:
    if service.is_running():
        _tell(events, "stop", f"stopping {service.describe()}")
        service.stop()
    if service.is_running():
        raise ServiceError(f"{service.describe()} is still running")


def _needs_hands(swap: Swap, service: Service, why: str) -> RestoreNeedsHands:
    start = " ".join(str(word) for word in service.facts().get("start") or ())
    return RestoreNeedsHands(
        f"{why}. {swap.where()}",
        hint=f"Mend the cause, then: restore_backup {swap.journal.store} --undo"
        + (f"\n{service.describe()} is started by: {start}" if start else ""),
    )


def _going_back(swap: Swap) -> str:
    if swap.journal.old_inode is None:
        return f"taking the restored data away from {swap.target}; there were none before"
    return f"putting the old data back at {swap.target}"


def _note(swap: Swap, events: Events, phase: str, **changes: object) -> None:
    """Write a phase down if that is possible: a full disk must not keep the old data from coming back."""
    try:
        swap.mark(phase, **changes)
    except OSError as error:
        with contextlib.suppress(Exception):
            events.warning("journal", f"the restore journal could not be written: {_said(error)}")


def _tell(events: Events, name: str, message: str) -> None:
    # Whoever listened may be gone: that must neither stop a restore nor its undoing.
    with contextlib.suppress(OSError):
        events.step(name, message)


def _earlier(swap: Swap) -> str:
    others = ", ".join(str(path) for path in swap.earlier())
    return f" Earlier restores set aside: {others}" if others else ""


def _said(error: BaseException) -> str:
    return str(error) or type(error).__name__
