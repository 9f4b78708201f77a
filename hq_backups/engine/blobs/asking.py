"""Asks the kernel for the blobs that are read next: a program of its own, which shares no lock with the backup.

``python -I -S <this file> DIRECTORY SKIP``: walks the directory as ``reading.py`` does, some files before it.
Standard input tells how far that is, as :data:`TOLD` each time, and when the backup ended, by its end. Files are only
asked for (posix_fadvise(2), POSIX_FADV_WILLNEED), nothing is handed on; whatever goes wrong is the reader's to meet
and to tell.

Files are asked for by their inodes' numbers, some hundreds at a time: where ext4 and XFS put files that were made one
after another, they have both inodes and contents side by side, and a directory tells its names in any order.
"""

from __future__ import annotations

import contextlib
import os
import select
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

FILES = 1536
"""How far ahead of the reader, in files."""
BATCH = 512
"""Files that are put in order together."""
BYTES = 128 << 20
"""How far ahead of the reader, in bytes: what it may take of the page cache."""
BEGINNING = 1 << 20
"""Bytes that are asked for of each; a large file's rest the kernel reads ahead by itself."""
SAMPLE = 32
"""One file in so many tells whether a batch lies in memory."""
IDLE = 1024
"""Files passed over after a batch that was in memory already."""
TOLD = struct.Struct("<QQ")
"""How many files have been read, and how many bytes they had; reading.py has the same."""


class Scan(Protocol):
    """What os.scandir returns."""

    def __next__(self) -> os.DirEntry[bytes]:
        """Return the next entry."""

    def __iter__(self) -> Iterator[os.DirEntry[bytes]]:
        """Return itself."""

    def close(self) -> None:
        """Close the directory."""


class Ended(Exception):
    """The backup has ended."""


class Passed:
    """How far the reader is, as it is told through a pipe."""

    def __init__(self, fd: int) -> None:
        """Listen to ``fd``."""
        self._fd = fd
        self.files = self.bytes = 0

    def look(self) -> None:
        """Take what was told meanwhile; raises Ended."""
        if select.select([self._fd], [], [], 0)[0]:
            self.wait()

    def wait(self) -> None:
        """Wait for the next that is told; raises Ended."""
        # Whole ones come: each is written at once (pipe(7), PIPE_BUF), and a multiple of them is asked for.
        told = os.read(self._fd, TOLD.size << 12)
        if not told:
            raise Ended
        self.files, self.bytes = TOLD.unpack_from(told, len(told) - TOLD.size)


def ask_ahead(directory: bytes, skip: bytes, passed: Passed, ask: Callable[[bytes], int]) -> None:
    """Ask for one batch after another, never too far ahead of the reader; raises Ended."""
    number = asked = idle = 0
    for batch in batches(directory, skip):
        number += len(batch)
        passed.look()
        while number - passed.files > FILES:
            passed.wait()
        if idle > 0:
            idle -= len(batch)
        elif number <= passed.files:
            continue
        elif in_memory(batch):
            # What lies there needs nobody to ask for it.
            idle = IDLE
        else:
            batch.sort(key=os.DirEntry.inode)
            asked = max(asked, passed.bytes)
            for entry in batch:
                while asked - passed.bytes > BYTES:
                    passed.wait()
                asked += ask(entry.path)


def batches(directory: bytes, skip: bytes) -> Iterator[list[os.DirEntry[bytes]]]:
    """Yield some files at a time, as the reader meets them."""
    batch: list[os.DirEntry[bytes]] = []
    for entry in files(directory, skip):
        batch.append(entry)
        if len(batch) == BATCH:
            yield batch
            batch = []
    yield batch


def files(directory: bytes, skip: bytes) -> Iterator[os.DirEntry[bytes]]:
    """Yield files as the reader meets them: a directory's in its own order, those below where they stand.

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
                yield entry
    finally:
        for entries in above:
            entries.close()


def _enter(directory: bytes, above: list[Scan]) -> None:
    with contextlib.suppress(OSError):
        above.append(os.scandir(directory))


def _next(entries: Scan) -> os.DirEntry[bytes] | None:
    try:
        return next(entries, None)
    except OSError:
        return None


def in_memory(batch: Sequence[os.DirEntry[bytes]]) -> bool:
    """Tell by a few of some files whether their beginnings lie in memory."""
    return not any(_with(entry.path, _lacks) for entry in batch[::SAMPLE])


def ask_for(path: bytes) -> int:
    """Ask for a file's beginning; return its size."""
    return _with(path, _want)


def _with(path: bytes, do: Callable[[int], int]) -> int:
    """Do something with an open file; 0 for what cannot be opened, or is no file after all."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return 0
    try:
        return do(fd)
    except OSError:
        return 0
    finally:
        os.close(fd)


def _want(fd: int) -> int:
    os.posix_fadvise(fd, 0, BEGINNING, os.POSIX_FADV_WILLNEED)
    return os.fstat(fd).st_size


def _lacks(fd: int) -> int:
    try:
        # What is not in memory Linux begins to read, but in a piece of its own: not to be tried with every file.
        os.preadv(fd, [bytearray(1)], 0, os.RWF_NOWAIT)
    except OSError:
        return 1
    return 0


if __name__ == "__main__":
    with contextlib.suppress(Ended):
        ask_ahead(os.fsencode(sys.argv[1]), os.fsencode(sys.argv[2]), Passed(0), ask_for)
