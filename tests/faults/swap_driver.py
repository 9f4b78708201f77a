"""Kill a swap at each of its steps: run as a program of one thread, which forks a child per step.

The steps are the calls that change something: they are wrapped here, the product knows nothing of it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hq_backups.engine.errors import HQBackupsError
from hq_backups.engine.events import Events
from hq_backups.engine.journal import CLOSED, read_journal
from hq_backups.engine.swap import Swap
from hq_backups.engine.switchover import switch, undo
from tests.testbed.process import alive, wait_until

RUN = "20261122T000002Z-pg0-postgres"
WRAPPED = ("rename", "fsync", "open", "unlink", "chown", "chmod", "sync")
TREE = {"WHO": "{who}", "base/5/PG_VERSION": "15", "base/5/1234": "{who} rows", "pg_wal/0001": "{who} wal"}


@dataclasses.dataclass(frozen=True)
class Scenario:
    """What there is before the restore, and how it goes when nobody kills it."""

    name: str
    target: bool = True
    running: bool = True
    test_fails: bool = False
    start_fails: bool = False


SCENARIOS = {
    s.name: s
    for s in (
        Scenario("running"),
        Scenario("stopped", running=False),
        Scenario("missing", target=False, running=False),
        Scenario("test-fails", test_fails=True),
        Scenario("start-fails", start_fails=True),
    )
}


class Steps:
    """Counts the steps and kills this process before the n-th."""

    def __init__(self, fatal: int | None) -> None:
        self.fatal, self.done = fatal, 0

    def __call__(self) -> None:
        self.done += 1
        if self.done == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    def wrap(self) -> None:
        """Make every call that changes something a step; only ever in a forked child."""
        for name in WRAPPED:
            setattr(os, name, self._wrapped(getattr(os, name) if name != "sync" else lambda: None))

    def _wrapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self()
            return function(*args, **kwargs)

        return call


class FakeServer:
    """A process that serves what is in the target when it starts, and a monitor that watches it."""

    def __init__(self, root: Path, steps: Callable[[], None], *, start_fails_on: str | None = None) -> None:
        self.root, self.steps, self.start_fails_on = root, steps, start_fails_on
        self.target = root / "main"
        self.pid_file, self.serving, self.monitor = root / "pid", root / "serving", root / "unwatched"

    def describe(self) -> str:
        return "a fake server"

    def facts(self) -> Mapping[str, Any]:
        return {"name": "fake", "start": ["start"]}

    def is_running(self) -> bool:
        return self.pid_file.exists() and alive(int(self.pid_file.read_text()))

    def stop(self) -> None:
        self.steps()
        if self.is_running():
            pid = int(self.pid_file.read_text())
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: not alive(pid), what="the fake server to end", interval=0.001)
        self.steps()

    def start(self) -> None:
        self.steps()
        who = (self.target / "WHO").read_text()
        if self.start_fails_on == who:
            raise RuntimeError("the fake server does not start")
        self.serving.unlink(missing_ok=True)
        script = 'echo $$ > "$1/pid"; cat "$1/main/WHO" > "$1/x"; mv "$1/x" "$1/serving"; exec sleep 600'
        subprocess.run(["setsid", "--fork", "sh", "-c", script, "sh", self.root], check=True)
        wait_until(lambda: self.serving.exists(), what="the fake server", interval=0.001)
        self.steps()

    def watched(self) -> tuple[str, ...]:
        return () if self.monitor.exists() else ("fake",)

    def hold(self, names: Sequence[str]) -> None:
        self.steps()
        if names:
            self.monitor.write_text("")
        self.steps()

    def release(self, names: Sequence[str]) -> None:
        self.steps()
        if names:
            self.monitor.unlink(missing_ok=True)
        self.steps()


def write_tree(path: Path, who: str) -> None:
    for name, content in TREE.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(content.format(who=who))


def tree_of(path: Path) -> dict[str, str] | None:
    if not path.exists():
        return None
    return {str(p.relative_to(path)): p.read_text() for p in sorted(path.rglob("*")) if p.is_file()}


def tree(who: str) -> dict[str, str]:
    return {name: content.format(who=who) for name, content in TREE.items()}


def forked(work: Callable[[], None]) -> int:
    """Do something in a child and return its status, negative for a signal; 77 for an unexpected error."""
    pid = os.fork()
    if pid == 0:
        status = 77
        try:
            work()
            status = 0
        except HQBackupsError as error:
            status = int(error.exit_code)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class World:
    """One host with one server, before, during and after a restore."""

    def __init__(self, base: Path, scenario: Scenario) -> None:
        self.root, self.scenario = base / "w", scenario
        self.target, self.staging = self.root / "main", self.root / "main.new"
        self.told: list[str] = []

    @contextmanager
    def made(self) -> Iterator[None]:
        self.root.mkdir()
        try:
            if self.scenario.target:
                write_tree(self.target, "old")
                self.target.chmod(0o700)
            write_tree(self.staging, "new")
            if self.scenario.running:
                assert forked(lambda: self.server().start()) == 0
            yield
        finally:
            if self.server().is_running():
                self.server().stop()
            shutil.rmtree(self.root)

    def server(self, steps: Callable[[], None] = lambda: None) -> FakeServer:
        return FakeServer(self.root, steps, start_fails_on="new" if self.scenario.start_fails else None)

    def switch(self, fatal: int | None = None) -> int:
        """Restore in a child; return how it ended."""

        def work() -> None:
            steps = Steps(fatal)
            steps.wrap()
            swap = Swap(self.target, self.staging, RUN, store="postgres", artifact="x.tar.gz")
            switch(swap, self.server(steps), self.test, Events(lambda _: None))

        return forked(work)

    def test(self) -> None:
        if self.scenario.test_fails and (self.root / "serving").read_text() == "new":
            raise RuntimeError("the counts differ")

    def undo(self, fatal: int | None = None) -> int:
        """Undo in a child; return how it ended, 100 for nothing to do."""

        def work() -> None:
            steps = Steps(fatal)
            steps.wrap()
            if not undo(self.target, self.server(steps), lambda: None, Events(lambda _: None)):
                os._exit(100)

        return forked(work)

    def phase(self) -> str | None:
        journal = read_journal(self.target)
        return None if journal is None else journal.phase

    def start_after_undo(self) -> bool:
        journal = read_journal(self.target)
        return journal is not None and journal.start_after_undo

    def places(self) -> dict[str, str | None]:
        """Return who lies whole in which directory; anything half is an error."""
        found = {}
        for path in sorted(self.root.iterdir()):
            if path.is_dir():
                content = tree_of(path)
                assert content in (tree("old"), tree("new")), (path, content)
                found[path.name] = content["WHO"] if content else None
        return found

    def check_old(self, *, was_done: bool = False) -> None:
        """Everything is as before the restore, the restored data whole and beside it."""
        scenario, places = self.scenario, self.places()
        running = scenario.running or (was_done and scenario.target)  # a finished restore leaves it running
        assert places.get("main") == ("old" if scenario.target else None), places
        assert sorted(str(who) for who in places.values()) == (
            ["new", "old"] if scenario.target else ["new"]
        ), places
        assert self.server().is_running() == running
        if running:
            assert (self.root / "serving").read_text() == "old"
        assert not (self.root / "unwatched").exists(), "the monitor was left looking away"

    def signature(self) -> tuple[Any, ...]:
        return self.phase(), tuple(self.places().items()), self.server().is_running(), self.server().watched()


def undo_until_undone(world: World) -> None:
    was_done = (world.phase() == "done") or world.start_after_undo()
    status, phase = world.undo(), world.phase()
    if phase is None:
        assert status == 5, status  # killed before the journal was there: nothing was changed
        world.check_old()
        return
    assert status in (0, 100), status
    assert phase in ("undone", "rolled_back"), phase
    world.check_old(was_done=was_done)
    before = sorted(os.listdir(world.root))
    assert world.undo() == 100
    assert world.phase() == phase
    assert sorted(os.listdir(world.root)) == before


def kill_switch(base: Path, scenario: Scenario) -> Iterator[tuple[int, int]]:
    """Yield each fatal step and how the killed switch was found."""
    for fatal in range(1, 500):
        world = World(base, scenario)
        with world.made():
            status = world.switch(fatal)
            world.places()
            if world.phase() in CLOSED:  # nobody looks at it again
                assert world.server().watched(), "the monitor was left looking away"
            undo_until_undone(world)
        yield fatal, status
        if status != -signal.SIGKILL:
            return


def kill_undo(base: Path, scenario: Scenario) -> Iterator[tuple[int, int]]:
    """Kill the undo of each distinct state that a killed switch leaves, at each of its steps, then undo."""
    seen = set()
    for first in range(1, 500):
        world = World(base, scenario)
        with world.made():
            status = world.switch(first)
            new = (signature := world.signature()) not in seen
            seen.add(signature)
        if new:
            for second in range(1, 500):
                world = World(base, scenario)
                with world.made():
                    world.switch(first)
                    ended = world.undo(second)
                    world.places()
                    undo_until_undone(world)
                yield first, second
                if ended != -signal.SIGKILL:
                    break
        if status != -signal.SIGKILL:
            return


def main() -> None:
    """Run one sweep: `swap_driver.py switch|undo <scenario> <directory>`; print what was done."""
    sweep = {"switch": kill_switch, "undo": kill_undo}[sys.argv[1]]
    done = list(sweep(Path(sys.argv[3]), SCENARIOS[sys.argv[2]]))
    print(json.dumps({"sweeps": len(done), "last": done[-1]}))


if __name__ == "__main__":
    main()
