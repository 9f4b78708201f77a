"""Asks the kernel for the blobs that tar will read next.

tar reads one file after another, and a disk that is asked one thing at a time is mostly idle: small files that are
not in memory come much faster when many are asked for at once. Nothing is read here, only asked for
(posix_fadvise(2), POSIX_FADV_WILLNEED); whatever goes wrong is tar's to meet and to tell.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

_FILES = 512
"""How far ahead of tar, in files."""
_BYTES = 256 << 10
"""What is asked for of each; a large file's rest the kernel reads ahead by itself."""
_THREADS = 8
_BATCH = 16
_IDLE = 1024
"""Files passed over after a batch that was in memory already."""
_PAUSE = 0.01
"""Seconds between two looks at how far tar is."""


class Scan(Protocol):
    """What os.scandir returns."""

    def __next__(self) -> os.DirEntry[str]:
        """Return the next entry."""

    def __iter__(self) -> Iterator[os.DirEntry[str]]:
        """Return itself."""

    def close(self) -> None:
        """Close the directory."""


class Ahead:
    """Walks a directory in tar's order, some files before it."""

    def __init__(self, directory: Path, passed: Callable[[], int], skip: str) -> None:
        """Begin; ``passed`` tells how many files tar has written, ``skip`` how names begin that it leaves out."""
        self._directory = os.fspath(directory)
        self._passed = passed
        self._skip = skip
        self._closed, self._cached = threading.Event(), threading.Event()
        self._wanted: queue.SimpleQueue[list[str] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._walk, name="hqb-ahead", daemon=True),
            *(threading.Thread(target=self._ask, name="hqb-ask", daemon=True) for _ in range(_THREADS)),
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stop."""
        self._closed.set()
        for thread in self._threads:
            thread.join()

    def _walk(self) -> None:
        number = idle = 0
        try:
            for batch in self._batches():
                number += len(batch)
                if self._cached.is_set():
                    self._cached.clear()
                    idle = _IDLE
                if idle > 0:
                    idle -= len(batch)
                elif number > self._passed():
                    self._wanted.put(batch)
                while number - self._passed() > _FILES:
                    if self._closed.wait(_PAUSE):
                        return
        finally:
            for _ in range(_THREADS):
                self._wanted.put(None)

    def _batches(self) -> Iterator[list[str]]:
        batch: list[str] = []
        for path in files(self._directory, self._skip):
            batch.append(path)
            if len(batch) == _BATCH:
                yield batch
                batch = []
            if self._closed.is_set():
                return
        yield batch

    def _ask(self) -> None:
        while (batch := self._wanted.get()) is not None:
            # What lies in memory needs nobody to ask for it.
            if not self._closed.is_set() and not sum(map(_asked, batch)):
                self._cached.set()


def files(directory: str, skip: str) -> Iterator[str]:
    """Yield the paths of files as tar meets them: a directory's in its own order, those below where they stand.

    At the top, names that begin with ``skip`` are left out; a directory that cannot be read is as good as empty.
    """
    above: list[Scan] = []
    try:
        _enter(directory, above)
        while above:
            entry = _next(above[-1])
            if entry is None:
                above.pop().close()
            elif len(above) == 1 and entry.name.startswith(skip):
                continue
            elif entry.is_dir(follow_symlinks=False):
                _enter(entry.path, above)
            elif entry.is_file(follow_symlinks=False):
                yield entry.path
    finally:
        for entries in above:
            entries.close()


def _enter(directory: str, above: list[Scan]) -> None:
    with contextlib.suppress(OSError):
        above.append(os.scandir(directory))


def _next(entries: Scan) -> os.DirEntry[str] | None:
    try:
        return next(entries, None)
    except OSError:
        return None


def _asked(path: str) -> bool:
    """Ask for a file's beginning; False when it was in memory already, or is not to be had."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        # EAGAIN: not in memory.
        os.preadv(fd, [bytearray(1)], 0, os.RWF_NOWAIT)
    except OSError:
        # What is no file after all is not to be asked for.
        with contextlib.suppress(OSError):
            os.posix_fadvise(fd, 0, _BYTES, os.POSIX_FADV_WILLNEED)
        return True
    finally:
        os.close(fd)
    return False
