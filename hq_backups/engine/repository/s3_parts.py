"""How a file is cut into parts, and one part's bytes read from disk.

Limits: https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html (10,000 parts, 5 GiB a part).
"""

from __future__ import annotations

import hashlib
import io
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isal import isal_zlib

from hq_backups.engine.errors import ReadBackFailed

MIB = 1 << 20
MIN_PART = 16 * MIB
UNKNOWN_PART = 64 * MIB
"""When nobody knows how large the file will be."""
MAX_PART = 5120 * MIB
MAX_PARTS = 10_000
EQUAL_PARTS = 9_000
"""So many parts are equal, which some services demand; the rest is for files larger than was said."""
GROWTH = 8
MAX_SIZE = 5 << 40

CHUNK = MIB


def part_size_for(size_hint: int | None) -> int:
    """Return the size of the first 9,000 parts, so that a file of ``size_hint`` bytes fits them."""
    if size_hint is None:
        return UNKNOWN_PART
    needed = -(-min(size_hint, MAX_SIZE) // EQUAL_PARTS)
    return max(MIN_PART, -(-needed // MIB) * MIB)


def part_length(number: int, base: int) -> int:
    """Return the size of part ``number``, counted from 1; any file up to 5 TiB ends before part 10,000."""
    return base if number <= EQUAL_PARTS else min(MAX_PART, base * GROWTH ** (number - EQUAL_PARTS))


def mark_sending(request: Any, **_: Any) -> None:
    """Tell a section that from here on its bytes go out: it was read for the signature before."""
    if isinstance(request.body, FileSection):
        request.body.sending = True


class Interrupted(BaseException):
    """Stops a request from inside its body; no `except Exception` on the way may take it for an answer."""

    def __init__(self, cause: Exception | None = None) -> None:
        """Carry the error that it stands for, if it is one."""
        super().__init__()
        self.cause = cause


@dataclass(frozen=True)
class Sums:
    """What one run of bytes is compared by."""

    length: int
    crc32: int
    md5: bytes | None = None


def sums_of(data: bytes) -> Sums:
    """Return the sums of bytes in memory."""
    return Sums(len(data), isal_zlib.crc32(data), hashlib.md5(data, usedforsecurity=False).digest())


class FileSection(io.RawIOBase):
    """A range of an open file as a request's body: read again for each try, never held in memory."""

    def __init__(
        self,
        file: io.FileIO,
        path: Path,
        offset: int,
        length: int,
        *,
        stop: threading.Event,
        pace: Callable[[int], None] | None = None,
    ) -> None:
        """Cover ``length`` bytes from ``offset``; ``pace`` is told of bytes before they go out."""
        self._file = file
        self._path = path
        self._offset = offset
        self._length = length
        self._stop = stop
        self._pace = pace
        self._at = 0
        self.sending = False

    def __len__(self) -> int:
        return self._length

    def readable(self) -> bool:
        """Tell that it can be read."""
        return True

    def seekable(self) -> bool:
        """Tell that it can be read again."""
        return True

    def tell(self) -> int:
        """Return where in the section the next read begins."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go elsewhere in the section."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = max(0, base + offset)
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        """Return up to ``size`` bytes; a file that is shorter than was said is an error, not an end."""
        if self._stop.is_set():
            raise Interrupted
        left = self._length - self._at
        wanted = left if size is None or size < 0 else min(size, left)
        if wanted <= 0:
            return b""
        try:
            data = self._pread(wanted)
        except ReadBackFailed as error:
            raise Interrupted(error) from error
        if self.sending and self._pace is not None:
            self._pace(len(data))
        self._at += len(data)
        return data

    def _pread(self, wanted: int) -> bytes:
        try:
            data = os.pread(self._file.fileno(), wanted, self._offset + self._at)
        except OSError as error:
            raise ReadBackFailed(str(error.strerror), path=self._path) from error
        if not data:
            where = self._offset + self._at
            raise ReadBackFailed(f"it ends after {where} bytes, more were written", path=self._path)
        return data

    def sums(self, *, md5: bool) -> Sums:
        """Read the section once and return what it is compared by."""
        crc, digest = 0, hashlib.md5(usedforsecurity=False) if md5 else None
        self.sending = False
        self.seek(0)
        while data := self.read(CHUNK):
            crc = isal_zlib.crc32(data, crc)
            if digest is not None:
                digest.update(data)
        self.seek(0)
        return Sums(self._length, crc, digest.digest() if digest else None)
