"""Which processes hold files of a directory open, or have it as their home, as proc(5) tells."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")
_END_SECONDS = 30.0


def holders(directory: Path, proc: Path = PROC) -> Iterator[int]:
    """Yield the processes, but ours, that hold anything below ``directory`` open, a deleted file too.

    Of another user's processes only root sees what they hold.
    """
    below = f"{directory.resolve()}/"
    for name in os.listdir(proc):
        if name.isdigit() and int(name) != os.getpid() and _holds(proc / name / "fd", below):
            yield int(name)


def is_held(directory: Path, proc: Path = PROC) -> bool:
    """Tell whether any process but ours works in ``directory``."""
    return next(holders(directory, proc), None) is not None


def _holds(fds: Path, below: str) -> bool:
    # A process may end, or close a file, at any moment.
    with contextlib.suppress(OSError):
        for fd in os.listdir(fds):
            with contextlib.suppress(OSError):
                if os.readlink(fds / fd).startswith(below):
                    return True
    return False


def at_home(home: Path, proc: Path = PROC) -> Iterator[int]:
    """Yield the processes that were started with ``home`` as their HOME, and what those started.

    Of another user's processes only root sees that.
    """
    for name in os.listdir(proc):
        if name.isdigit() and _lives_in(proc / name, home):
            yield int(name)


def end_all_of(home: Path) -> None:
    """Kill every process that has ``home``, and return when none is left; gives up after half a minute."""
    deadline = time.monotonic() + _END_SECONDS
    while found := list(at_home(home)):
        for pid in found:
            _end(pid, home)
        if time.monotonic() >= deadline:
            return
        time.sleep(0.01)


def _end(pid: int, home: Path) -> None:
    # A number may be another process's by now: the descriptor is of one, which is looked at again.
    with contextlib.suppress(OSError):
        descriptor = os.pidfd_open(pid)
        try:
            if _lives_in(PROC / str(pid), home):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        finally:
            os.close(descriptor)


def _lives_in(process: Path, home: Path) -> bool:
    with contextlib.suppress(OSError):
        return b"HOME=" + os.fsencode(home) in (process / "environ").read_bytes().split(b"\0")
    return False
