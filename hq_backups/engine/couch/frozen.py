"""A file as it was at one moment: held open, and read no further than it reached then.

CouchDB appends to its files and replaces them, but changes nothing that it wrote: what was there stays readable
through an open descriptor, also when compaction has long put another file in its place.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from typing import BinaryIO

from hq_backups.engine.errors import ProducerTruncated, RepositoryError


@dataclass(frozen=True)
class Frozen:
    """One file of a snapshot."""

    path: str
    """Relative to the data directory."""
    fd: int
    size: int
    """What it had at the moment of the snapshot."""
    status: os.stat_result

    def open(self) -> BinaryIO:
        """Return it as a seekable file that ends at its size; to close it leaves the descriptor open."""
        return io.BufferedReader(_Bounded(self), 1 << 16)

    def ask(self, offset: int, length: int) -> None:
        """Have the kernel bring some of it into memory, and do not wait for it."""
        os.posix_fadvise(self.fd, offset, length, os.POSIX_FADV_WILLNEED)

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Read some of it at an offset; 0 at its end only. One that got shorter meanwhile is no copy."""
        wanted = min(len(buffer), self.size - offset)
        if wanted <= 0:
            return 0
        try:
            count = os.preadv(self.fd, [buffer[:wanted]], offset)
        except OSError as error:
            raise RepositoryError(
                f"{self.path} cannot be read at byte {offset}: {error.strerror}",
                hint="Look at the disk of the data directory (`dmesg`); the last good backup is kept.",
            ) from error
        if not count:
            raise ProducerTruncated(
                f"it ends at byte {offset}, {self.size} were there when the backup began",
                program=self.path,
                hint="Something other than appending was done to it. Run the backup again.",
            )
        return count


class _Bounded(io.RawIOBase):
    """Reads a frozen file by offset."""

    def __init__(self, frozen: Frozen) -> None:
        self._frozen = frozen
        self._position = 0
        self.name = frozen.path

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._frozen.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = self._frozen.read_into(memoryview(buffer), self._position)
        self._position += count
        return count
