"""What a restore does when its server, its test, its disk, its listener or its operator fails it."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hq_backups.engine import journal, swap, switchover
from hq_backups.engine.errors import (
    Cancelled,
    PreflightFailed,
    RestoreNeedsHands,
    RestoreRolledBack,
    ServiceError,
)
from hq_backups.engine.events import Event, Events
from hq_backups.engine.signals import Interrupts
from tests.faults.swap_driver import RUN, SCENARIOS, FakeServer, World

pytestmark = pytest.mark.faults


class Case:
    """A world in which one restore runs in this process."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.server = world.server()
        self.events: list[Event] = []
        self.sink: Callable[[Event], None] = self.events.append
        self.test: Callable[[], None] = lambda: None

    @property
    def said(self) -> str:
        return " | ".join(str(e.data.get("message")) for e in self.events)

    def switch(self) -> None:
        made = swap.Swap(self.world.target, self.world.staging, RUN, store="postgres", artifact="x")
        switchover.switch(made, self.server, self.test, Events(self.sink))

    def undo(self) -> bool:
        return switchover.undo(self.world.target, self.server, self.test, Events(self.sink))


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    monkeypatch.setattr(os, "sync", lambda: None)
    world = World(tmp_path, SCENARIOS["running"])
    with world.made():
        yield Case(world)


def fail(error: BaseException) -> Callable[..., None]:
    def failing(*_: object) -> None:
        raise error

    return failing


def test_all_well(case: Case) -> None:
    case.switch()
    assert (case.world.root / "serving").read_text() == "new"
    assert case.world.phase() == "done"
    assert not case.server.monitor.exists()
    assert [e.data["name"] for e in case.events] == ["stop", "swap", "start", "test"]


def test_undo_after_all_went_well_puts_the_old_data_back(case: Case) -> None:
    case.switch()
    assert case.undo()
    case.world.check_old()
    assert not case.undo()
    assert f"nothing to do: the restore {RUN} was put back before" in case.said


@pytest.mark.parametrize(
    "error", [ServiceError("counts differ"), RuntimeError("x"), KeyboardInterrupt(), SystemExit(3)]
)
def test_a_test_that_fails_brings_the_old_data_back_serving(case: Case, error: BaseException) -> None:
    case.test = fail(error)
    with pytest.raises(RestoreRolledBack, match="The old data are serving") as caught:
        case.switch()
    assert caught.value.exit_code == 8
    assert caught.value.__cause__ is error
    case.world.check_old()
    assert case.world.phase() == "rolled_back"


def test_a_server_that_does_not_start_on_the_new_data(case: Case) -> None:
    case.server.start_fails_on = "new"
    with pytest.raises(RestoreRolledBack, match="does not start"):
        case.switch()
    case.world.check_old()


def test_a_server_that_does_not_stop_keeps_its_data(case: Case) -> None:
    case.server.stop = fail(ServiceError("it hangs"))  # type: ignore[method-assign]
    with pytest.raises(RestoreNeedsHands, match=r"it hangs.*Old data: .*/main\. Restored data: .*/main\.new"):
        case.switch()
    case.world.check_old()
    case.server = case.world.server()
    assert case.undo()
    case.world.check_old()


def test_a_server_that_only_says_it_stopped_is_not_believed(case: Case) -> None:
    case.server.stop = lambda: None  # type: ignore[method-assign]
    with pytest.raises(RestoreNeedsHands, match="still running"):
        case.switch()
    case.world.check_old()


def test_a_monitor_that_does_not_look_away_stops_it_before_anything_happens(case: Case) -> None:
    case.server.hold = fail(ServiceError("monit does not unmonitor postgresql"))  # type: ignore[method-assign]
    with pytest.raises(ServiceError, match="does not unmonitor"):
        case.switch()
    case.world.check_old()
    assert not case.undo()


def test_a_monitor_that_does_not_watch_again_is_told_and_no_failure(case: Case) -> None:
    case.server.release = fail(ServiceError("monit is gone"))  # type: ignore[method-assign]
    case.switch()
    assert "the server is not watched: monit monitor fake" in case.said


def test_old_data_that_do_not_start_again_need_hands(case: Case) -> None:
    case.server.start = fail(ServiceError("no memory"))  # type: ignore[method-assign]
    with pytest.raises(RestoreNeedsHands) as caught:
        case.switch()
    assert caught.value.exit_code == 9
    assert f"Old data: {case.world.target}. Restored data: {case.world.target}.failed-{RUN}." in str(
        caught.value
    )
    assert "restore_backup postgres --undo" in caught.value.hint
    case.server = case.world.server()
    assert case.undo()
    case.world.check_old()


def test_a_listener_that_is_gone_stops_nothing(case: Case) -> None:
    case.sink = fail(BrokenPipeError())
    case.switch()
    assert case.world.phase() == "done"
    case.undo()
    case.world.check_old()


def test_a_disk_that_fills_up_in_the_middle_brings_the_old_data_back(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = journal.write_journal

    def full(written: journal.Journal) -> None:
        if written.phase not in ("planned", "stopping", "stopped"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(written)

    monkeypatch.setattr(swap, "write_journal", full)
    with pytest.raises(RestoreRolledBack, match="No space left"):
        case.switch()
    case.world.check_old()
    assert case.world.phase() == "stopped"
    monkeypatch.setattr(swap, "write_journal", fail(OSError(errno.ENOSPC, "No space left on device")))
    assert case.undo()  # which needs no space
    case.world.check_old()


def test_undo_of_what_somebody_deleted_changes_nothing(case: Case) -> None:
    case.switch()
    old = swap.Swap.load(case.world.target).journal.old
    old.rename(case.world.root.parent / "deleted")
    with pytest.raises(PreflightFailed, match=r"cannot be undone: the old data, .* are no longer there"):
        case.undo()
    assert (case.world.root / "serving").read_text() == "new"
    assert case.server.is_running()


class TestSignals:
    @pytest.fixture(autouse=True)
    def _handlers(self) -> Iterator[None]:
        self.delivered: list[int] = []
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = [signal.signal(n, lambda number, _: self.delivered.append(number)) for n in numbers]
        yield
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    def test_during_the_test_it_rolls_back(self, case: Case, number: int) -> None:
        case.test = lambda: (os.kill(os.getpid(), number), threading.Event().wait(30))[0]
        with pytest.raises(RestoreRolledBack, match=f"cancelled by {signal.Signals(number).name}"):
            case.switch()
        case.world.check_old()
        assert self.delivered == []

    @pytest.mark.parametrize("nth", [1, 2])
    def test_during_the_renames_it_waits_and_then_rolls_back(
        self, case: Case, monkeypatch: pytest.MonkeyPatch, nth: int
    ) -> None:
        real, seen = os.rename, []

        def rename(source: Path, destination: Path) -> None:
            if not str(source).endswith(".json.new"):
                seen.append(source)
                if len(seen) == nth:
                    os.kill(os.getpid(), signal.SIGTERM)
            real(source, destination)

        monkeypatch.setattr(os, "rename", rename)
        with pytest.raises(RestoreRolledBack, match="cancelled by SIGTERM"):
            case.switch()
        assert len(seen) == 4  # two there, two back
        case.world.check_old()

    def test_during_the_way_back_it_waits(self, case: Case) -> None:
        case.test = fail(RuntimeError("counts differ"))
        start = case.server.start

        def interrupted() -> None:
            if (case.world.target / "WHO").read_text() == "old":
                os.kill(os.getpid(), signal.SIGINT)
            start()

        case.server.start = interrupted  # type: ignore[method-assign]
        with pytest.raises(RestoreRolledBack, match="counts differ"):
            case.switch()
        case.world.check_old()
        assert self.delivered == [signal.SIGINT]

    def test_one_that_comes_too_late_is_sent_again(self, case: Case) -> None:
        release = case.server.release

        def late(names: tuple[str, ...]) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            release(names)

        case.server.release = late  # type: ignore[method-assign,assignment]
        case.switch()
        assert case.world.phase() == "done"
        assert self.delivered == [signal.SIGTERM]

    def test_undo_is_not_interrupted(self, case: Case) -> None:
        case.switch()
        case.test = lambda: os.kill(os.getpid(), signal.SIGINT)
        assert case.undo()
        case.world.check_old()
        assert self.delivered == [signal.SIGINT]

    def test_what_nohup_ignores_stays_ignored(self) -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with Interrupts() as interrupts, interrupts.allowed():
            os.kill(os.getpid(), signal.SIGHUP)
        assert self.delivered == []

    def test_one_kept_back_is_raised_where_it_is_allowed(self) -> None:
        with Interrupts() as interrupts:
            os.kill(os.getpid(), signal.SIGHUP)
            with pytest.raises(Cancelled, match="SIGHUP"), interrupts.allowed():
                pytest.fail("it was let in")
        assert self.delivered == []

    def test_another_thread_changes_no_handlers(self) -> None:
        handlers = []

        def work() -> None:
            with Interrupts() as interrupts, interrupts.allowed():
                handlers.append(signal.getsignal(signal.SIGINT))

        before = signal.getsignal(signal.SIGINT)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert handlers == [before]


def test_a_server_is_a_service() -> None:
    from hq_backups.engine.control import Service

    assert all(hasattr(FakeServer, name) for name in Service.__dict__ if not name.startswith("_"))
