"""A program in the place of a producer, which runs the real one and dies the way it is told to."""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.faults.victim import HostVictim

SOURCE = """#!{python} -IS
import json, os, signal, subprocess, sys, time

REAL = {real!r}
HERE = os.path.dirname(os.path.abspath(__file__))
if sys.argv[1:2] == ["--version"]:
    os.execv(REAL[0], [*REAL, "--version"])
with open(os.path.join(HERE, "plan.json")) as file:
    plan = json.load(file)
if "rate" in plan and os.path.basename(REAL[0]) == "pg_basebackup":
    os.execv(REAL[0], [*REAL, *sys.argv[1:], "--max-rate", plan["rate"]])
PIECE = 1 << 16 if "rate" in plan else 1 << 20

def stand():
    with open(os.path.join(HERE, "reached.new"), "w") as file:
        file.write(str(os.getpid()))
    os.rename(os.path.join(HERE, "reached.new"), os.path.join(HERE, "reached"))
    while not os.path.exists(os.path.join(HERE, "go")):
        time.sleep(0.02)
        if os.getppid() == 1 and not (plan.get("outlive") and os.path.exists(HERE)):
            sys.exit(9)

def into(place):
    # Here the real one itself is stopped, and it dies with this one.
    import ctypes

    die = ctypes.CDLL(None).prctl
    slowly = ["--max-rate", "32M"] if "pause" in plan else []
    child = subprocess.Popen([*REAL, *sys.argv[1:], *slowly], stdin=subprocess.DEVNULL, preexec_fn=lambda: die(1, 9))
    while "pause" in plan and child.poll() is None:
        files = os.scandir(place) if os.path.isdir(place) else ()
        if sum(file.stat().st_size for file in files) >= plan["pause"]:
            child.send_signal(signal.SIGSTOP)
            stand()
            child.send_signal(signal.SIGCONT)
            break
        time.sleep(0.002)
    child.wait()

place = sys.argv[sys.argv.index("-D") + 1] if "-D" in sys.argv else "-"
if place != "-":
    into(place)
    sys.exit(plan.get("status", 0))

# With the descriptors that it is told of.
child = subprocess.Popen(
    [*REAL, *sys.argv[1:]], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, close_fds=False
)
limit = plan.get("bytes")
if limit is not None and limit < 0:
    # Counted from the end: everything is held back by that much.
    data = child.stdout.read()
    left = memoryview(data)[: len(data) + limit]
    child.wait()
    while left:
        left = left[os.write(1, left[: 1 << 20]) :]
else:
    passed = 0
    while limit is None or passed < limit:
        if passed >= plan.get("pause", 1 << 60):
            stand()
            plan["pause"] = 1 << 60
        if "rate" in plan:
            time.sleep(PIECE / (int(plan["rate"][:-1]) << 20))
        data = os.read(child.stdout.fileno(), PIECE if limit is None else min(PIECE, limit - passed))
        if not data:
            break
        left = memoryview(data)
        while left:
            left = left[os.write(1, left) :]
        passed += len(data)
    if limit is None:
        child.wait()
    else:
        child.kill()
if plan.get("say"):
    sys.stderr.write(plan["say"])
    sys.stderr.flush()
if plan.get("close"):
    os.close(1)
if plan.get("reached"):
    stand()
if plan.get("wait"):
    time.sleep(plan["wait"])
if plan.get("signal"):
    os.kill(os.getpid(), plan["signal"])
sys.exit(plan.get("status", 0))
"""


class FakeProducer:
    """A directory with the program, and the plan that it reads."""

    def __init__(self, directory: Path, real: Sequence[str]) -> None:
        self.directory = directory
        self.program = directory / Path(real[-1]).name
        directory.mkdir(mode=0o777)
        directory.chmod(0o777)
        self.program.write_text(SOURCE.format(python=sys.executable, real=list(real)))
        self.program.chmod(0o755)

    def plan(self, **plan: Any) -> None:
        """Say how to die: ``bytes`` passed on (negative: all but so many), then status, signal, close, wait.

        ``pause`` stands still after so many bytes, ``reached`` after all of them, until :meth:`go`, or until the
        engine is gone; with ``outlive`` also after that. One that writes into a directory knows only ``pause``,
        ``rate`` and ``status``.
        """
        for name in ("reached", "go"):
            (self.directory / name).unlink(missing_ok=True)
        (self.directory / "plan.json").write_text(json.dumps(plan))

    def go(self) -> None:
        """Let it go on."""
        (self.directory / "go").touch()

    @property
    def reached(self) -> int | None:
        """Return the pid of the program once it stands where it was told to wait."""
        try:
            return int((self.directory / "reached").read_text())
        except FileNotFoundError:
            return None


@contextmanager
def in_front(victim: HostVictim) -> Iterator[FakeProducer]:
    """Put a fake producer in front of the real one of a victim."""
    made = FakeProducer(victim.home / f"bin-{secrets.token_hex(3)}", victim.real_producer())
    victim.stand_in(made.program)
    yield made
    victim.stand_in(None)


@contextmanager
def failing(victim: HostVictim) -> Iterator[None]:
    """Let every backup fail for the length of a block: by its producer, else by what it reads."""
    if not victim.producer:
        with victim.unfit():
            yield
        return
    with in_front(victim) as fake:
        fake.plan(status=1)
        yield
