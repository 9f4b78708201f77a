"""Runs the engine on a job: here when this is the right user, else as the user whom the job needs."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import hq_backups.engine
from hq_backups import identity, other_user
from hq_backups.child import EngineProcess
from hq_backups.engine.config import Job
from hq_backups.engine.errors import (
    Cancelled,
    Exit,
    HQBackupsError,
    ProtocolMismatch,
)
from hq_backups.engine.events import Event, Events, Sink

logger = logging.getLogger(__name__)

ENTRY = Path(os.path.abspath(hq_backups.engine.__file__)).with_name("entry.py")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PATIENCE = "a restore is not killed halfway: it ends, or puts the old data back, by itself"


def run(job: Job, sink: Sink, *, user: str | None = None, python: Path | None = None) -> Exit:
    """Run ``job`` as ``user`` (found out from it when None) and return the exit code that its events tell.

    ``python`` is the interpreter that the host's sudo rule names. Nothing is raised for a run that fails: its
    last events are ``error`` and ``result``.
    """
    steady = _Steady(sink)
    events = Events(steady, job.run)
    try:
        user = user or identity.user_for(job)
        if user == identity.me():
            return _run_here(job, steady, events)
        return _run_child(job, steady, events, user, python)
    except HQBackupsError as error:
        return _fail(job, events, error)
    except OSError as error:
        return _fail(job, events, HQBackupsError(f"the engine cannot be started: {error}"))


class _Steady:
    """A sink that no reader's failure can stop, and that remembers how the run ended."""

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.result: Exit | None = None

    def __call__(self, event: Event) -> None:
        if event.kind == "result":
            self.result = _exit(event.data.get("exit"))
        try:
            self.sink(event)
        except Exception:
            logger.exception("a reader of the run's events failed")


def store_of(job: Job) -> str | None:
    """Return the store that a job is about, when it is one."""
    selection = job.request.get("selection") or {}
    return job.request.get("store") or selection.get("store")


def _exit(code: object) -> Exit:
    try:
        return Exit(int(str(code)))
    except ValueError:
        return Exit.ERROR


def _fail(job: Job, events: Events, error: BaseException, code: Exit | None = None) -> Exit:
    code = max(events.error(error), code or Exit.OK)
    events.emit("result", ok=False, exit=int(code), store=store_of(job), seconds=0.0)
    return code


def _run_here(job: Job, sink: _Steady, events: Events) -> Exit:
    from hq_backups.engine.entry import run_job

    patient = job.verb in identity.ROOT_VERBS
    with _signals(_Interrupt(once=patient), patient=patient):
        try:
            code = run_job(job, sink)
        except KeyboardInterrupt:
            return _fail(job, events, Cancelled(by="the operator"))
        except HQBackupsError as error:
            return _fail(job, events, error)
        except Exception as error:
            logger.exception("the engine failed")
            return _fail(job, events, error)
    if sink.result is None:
        return _fail(job, events, HQBackupsError("the engine ended and said no result"))
    return code


class _Interrupt:
    """Turns signals into the interrupt that the engine cleans up after, undisturbed in a restore."""

    def __init__(self, *, once: bool) -> None:
        self.once = once
        self.asked = 0

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        self.asked += 1
        if self.asked > 1 and self.once:
            os.write(2, f"\n{PATIENCE}\n".encode())
            return
        raise KeyboardInterrupt


@contextlib.contextmanager
def _signals(handler: Callable[[int, FrameType | None], None], *, patient: bool) -> Iterator[None]:
    """Let ``handler`` take the signals that ask a run to stop; only the main thread can.

    A lost connection is no wish to stop a restore (``patient``): it goes on without anybody looking.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        for number, before in old.items():
            if before is not signal.SIG_IGN:
                signal.signal(number, signal.SIG_IGN if patient and number == signal.SIGHUP else handler)
        yield
    finally:
        for number, before in old.items():
            signal.signal(number, before)


def _run_child(job: Job, sink: _Steady, events: Events, user: str, python: Path | None) -> Exit:
    argv = [str(other_user.interpreter(python)), "-I", str(ENTRY)]
    engine = other_user.start(argv, user)
    asked = 0
    mismatch: ProtocolMismatch | None = None
    with _signals(engine.interrupt, patient=job.verb in identity.ROOT_VERBS):
        engine.give(job.to_json())
        for item in engine:
            if isinstance(item, ProtocolMismatch):
                mismatch = item
                engine.cancel()
            elif isinstance(item, int):
                asked += 1
                _stop(engine, events, asked, patient=job.verb in identity.ROOT_VERBS)
            elif mismatch is None:
                sink(item)
        code = engine.ended()
    if mismatch is not None:
        return _fail(job, events, mismatch)
    if sink.result is not None:
        return sink.result
    return _fail(job, events, _why(job, argv, user, engine, code, asked=asked > 0), code)


def _stop(engine: EngineProcess, events: Events, asked: int, *, patient: bool) -> None:
    """Answer the operator's wish to stop: the child cleans up; a restore is never killed halfway."""
    if asked == 1:
        engine.cancel()
        events.warning("stopping", "stopping: waiting for the run to clean up")
    elif patient:
        events.warning("stopping", PATIENCE)
    elif not engine.try_kill():
        events.warning("stopping", f"process {engine.pid} is another user's and cannot be killed from here")


def _why(
    job: Job, argv: list[str], user: str, engine: EngineProcess, code: Exit | None, *, asked: bool
) -> HQBackupsError:
    """Say why an engine ended without a result."""
    tail = engine.stderr_tail[-2000:]
    if not engine.spoke and tail.startswith(("sudo:", "Sorry, user")):
        return other_user.refused(argv, user, tail.splitlines()[0])
    if asked and code is None:
        return Cancelled(by="the operator")
    hint = (
        f"See what it left: restore_backup {store_of(job)} --undo" if job.verb in identity.ROOT_VERBS else ""
    )
    return EngineDied(
        status=status_text(engine.reap()), tail=tail or engine.noise or "it said nothing", hint=hint
    )


def status_text(status: int) -> str:
    """Return an exit status in words."""
    if status >= 0:
        return f"status {status}"
    with contextlib.suppress(ValueError):
        return f"signal {signal.Signals(-status).name}"
    return f"signal {-status}"


class EngineDied(HQBackupsError):
    """the engine ended with {status} and told no result: {tail}"""  # noqa: D400
