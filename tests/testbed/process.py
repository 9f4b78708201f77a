"""Start, watch and end one real service."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypedDict

from tests.testbed.places import IS_ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

LOOPBACK = "127.0.0.1"
DIRECTORY_PREFIX = "hqb-"
SHORT_PLACE = "HQ_BACKUPS_TESTS_DIRECTORY"
"""Names where short directories are made: a Unix socket's address has room for 107 bytes."""


class ServiceError(RuntimeError):
    """A service did not start, answer or stop."""


class AsUser(TypedDict, total=False):
    """The arguments of subprocess that change the user."""

    user: int
    group: int
    extra_groups: list[int]


def as_user(name: str | None) -> AsUser:
    """Return the subprocess arguments that run a child as a user; none when that is who we are."""
    if name is None or not IS_ROOT:
        return {}
    entry = pwd.getpwnam(name)
    groups = os.getgrouplist(name, entry.pw_gid)
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": groups}


def give(path: Path, os_user: str | None) -> None:
    """Make a user the owner of one path."""
    if os_user is not None and IS_ROOT:
        entry = pwd.getpwnam(os_user)
        os.chown(path, entry.pw_uid, entry.pw_gid)


def free_port() -> int:
    """Return a loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def wait_until(
    condition: Callable[[], object], *, what: str, timeout: float = 30.0, interval: float = 0.02
) -> None:
    """Wait for a condition; raise ServiceError naming it when it stays false."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            msg = f"waited {timeout:g} s for {what}"
            raise ServiceError(msg)
        time.sleep(interval)


def listening(port: int) -> bool:
    """Tell whether a loopback port accepts connections."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((LOOPBACK, port)) == 0


def alive(pid: int) -> bool:
    """Tell whether a process exists and is not a zombie."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"


def exists(pid: int) -> bool:
    """Tell whether a process is there, be it a zombie: PostgreSQL takes one for a live postmaster."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def tail(path: Path, lines: int = 15) -> str:
    """Return the last lines of a log."""
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
    except FileNotFoundError:
        return "(no log)"


def run_here(*argv: str | Path, log: Path | None = None) -> None:
    """Run a program as ourselves; raise with what it said, and the end of a log."""
    with tempfile.TemporaryFile("w+") as said:  # no pipe: a server that it starts would keep one open
        done = subprocess.run(
            [str(word) for word in argv], stdin=subprocess.DEVNULL, stdout=said, stderr=said, check=False
        )
        if done.returncode:
            said.seek(0)
            msg = f"{argv[0]} exited {done.returncode}: {said.read()}\n{tail(log) if log else ''}"
            raise ServiceError(msg)


def new_directory() -> Path:
    """Make a short temporary directory that every user can pass through."""
    place = os.environ.get(SHORT_PLACE, "/tmp")
    path = Path(tempfile.mkdtemp(prefix=f"{DIRECTORY_PREFIX}{os.getpid()}-", dir=place))
    path.chmod(0o755)
    return path


@contextlib.contextmanager
def short_directory(os_user: str | None = None) -> Iterator[Path]:
    """Make a short temporary directory that every user can pass through, removed after.

    pytest's own are 0700 and too long for a Unix socket's address.
    """
    path = new_directory()
    give(path, os_user)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


class ChildService(ABC):
    """One child process that listens on a loopback port and dies with its starter."""

    name: str
    os_user: str | None = None

    def __init__(self, workdir: Path) -> None:
        """Remember where the service keeps its log and data."""
        self.workdir = workdir
        self.port = 0
        self.log = workdir / f"{self.name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def argv(self) -> Sequence[str | Path]:
        """Return the command that serves on `self.port` in the foreground."""

    @abstractmethod
    def ready(self) -> bool:
        """Tell whether the service answers."""

    def environment(self) -> Mapping[str, str]:
        """Return the child's whole environment."""
        return {"PATH": os.environ.get("PATH", os.defpath), "HOME": str(self.workdir), "LC_ALL": "C.UTF-8"}

    @property
    def pid(self) -> int | None:
        """Return the process id while it runs."""
        return self._process.pid if self._process is not None and self.running else None

    @property
    def running(self) -> bool:
        """Tell whether the process is there."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start on a free port (the same one again after a stop) and wait for an answer."""
        if self.running:
            return
        attempts = 1 if self.port else 3  # somebody may take the free port before the child does
        self.workdir.mkdir(parents=True, exist_ok=True)
        for left in reversed(range(attempts)):
            self.port = self.port or free_port()
            try:
                self._launch()
            except ServiceError:
                self.kill()
                if not left:
                    raise
                self.port = 0
            else:
                return

    def _launch(self) -> None:
        guard = ["setpriv", "--pdeathsig", "TERM", "--"] if shutil.which("setpriv") else []
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*guard, *map(str, self.argv())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.workdir,
                env=dict(self.environment()),
                **as_user(self.os_user),
            )
        wait_until(lambda: not self.running or self.ready(), what=f"{self.name} to answer")
        if not self.running:
            msg = f"{self.name} ended at once:\n{tail(self.log)}"
            raise ServiceError(msg)

    def stop(self, timeout: float = 20.0) -> None:
        """End the process politely, then by force."""
        self._signal(signal.SIGTERM, timeout)

    def kill(self) -> None:
        """End the process as a power cut would."""
        self._signal(signal.SIGKILL, 10.0)

    def _signal(self, number: signal.Signals, timeout: float) -> None:
        if self._process is None:
            return
        if self.running:
            self._process.send_signal(number)
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
        self._process = None

    def __enter__(self) -> Self:
        """Start."""
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self.stop()
