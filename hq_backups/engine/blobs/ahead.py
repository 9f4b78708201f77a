"""Has the kernel asked for the blobs that are read next.

One file is read after another, and a disk that is asked one thing at a time is mostly idle: small files that are
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


class Ahead:
    """The program that asks. A backup goes on without it."""

    def __init__(self, directory: Path, skip: str) -> None:
        """Begin; ``skip`` is how names begin that the backup leaves out."""
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

    @property
    def listens(self) -> int:
        """Return the descriptor of a pipe to it, which does not block, for :data:`asking.TOLD`; -1 without it."""
        return -1 if self._stdin is None else self._stdin.fileno()

    def hand_over(self) -> None:
        """Leave it to another process, which has the pipe now, to tell how far it is."""
        if self._stdin is not None:
            self._stdin.close()
            self._stdin = None

    def close(self) -> None:
        """Stop."""
        if self._child is not None:
            self._child.close()
