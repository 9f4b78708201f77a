"""Which processes hold files of a directory open, as proc(5) tells."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")


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
