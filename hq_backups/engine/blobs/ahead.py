"""Has the kernel asked for the blobs that tar will read next.

tar reads one file after another, and a disk that is asked one thing at a time is mostly idle: small files that are
not in memory come much faster when many are asked for at once.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import IO

from hq_backups.engine.blobs import asking
from hq_backups.engine.child import Child
from hq_backups.engine.errors import ProducerFailed

_STEP = 64
"""Files after which it is told how far tar is."""


class Ahead:
    """The program that asks, and what it is told. A backup goes on without it."""

    def __init__(self, directory: Path, skip: str) -> None:
        """Begin; ``skip`` is how names begin that tar leaves out."""
        self._told = 0
        self._child: Child | None = None
        self._stdin: IO[bytes] | None = None
        argv: list[str | Path] = [sys.executable, "-I", "-S", asking.__file__, directory, skip]
        with contextlib.suppress(ProducerFailed):
            self._child = Child(
                argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=None, user=None, cwd="/"
            )
            self._stdin = self._child.popen.stdin
        if self._stdin is not None:
            os.set_blocking(self._stdin.fileno(), False)

    def passed(self, files: int, size: int) -> None:
        """Take how many files tar has passed, and how many bytes they had."""
        if self._stdin is None or files - self._told < _STEP:
            return
        # A pipe that is full has news enough; one that is closed needs none.
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self._stdin.fileno(), asking.TOLD.pack(files, size))
        self._told = files

    def close(self) -> None:
        """Stop."""
        if self._child is not None:
            self._child.close()
