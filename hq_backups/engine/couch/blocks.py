"""The lowest layer of a CouchDB file: blocks, headers, sealed terms.

From CouchDB's src/couch/src/couch_file.erl: blocks of 4096 bytes whose first byte is 1 where a header begins,
else 0, and belongs to no term; a term is its length, a seal of 16 bytes where it is a header or a document, and
itself; an offset is where that length begins. Trees have no seals: a changed bit there can go unseen, so a backup
needs a sum of its own. Nothing is written twice: a node that opens a file takes the last header that is whole, and says
nothing of what follows it. A term refers to older ones only.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from hq_backups.engine.couch import terms
from hq_backups.engine.couch.snappy import decompress
from hq_backups.engine.couch.xxh3 import xxh3_128

BLOCK = 4096
_SEAL = 16
_HEAD = 5
MOST_CHUNK = 64 << 20
"""Bytes of one term; a document is 8 MB at most unless max_document_size was raised."""
MOST_HEADER = 64 << 10
MOST_BAD_HEADERS = 100
"""A node tries all, but a file with so many is no copy of one that was ever written."""
_FIRST_WINDOW, _WINDOW = 8, 256
"""Blocks looked through at once: few at first, for a file mostly ends in a header, then more and more."""


class Damaged(ValueError):
    """What was read is not what CouchDB writes."""


@dataclass(frozen=True)
class FoundHeader:
    """A header, where it begins, and where the file may be cut without losing it."""

    position: int
    end: int
    term: object


class BlockFile:
    """Reads terms by their offset from a seekable file; everything that is wrong raises ValueError."""

    def __init__(self, file: BinaryIO) -> None:
        """Take an open file, which stays the caller's."""
        self._file = file
        self.size = file.seek(0, os.SEEK_END)

    def last_header(self) -> FoundHeader | None:
        """Return the last header that is whole, as a node finds it; None when there is none."""
        bad = 0
        for block in self._marked_blocks():
            try:
                return self._header(block * BLOCK)
            except Damaged:
                bad += 1
                if bad > MOST_BAD_HEADERS:
                    msg = f"its last {bad} headers are all damaged"
                    raise Damaged(msg) from None
        return None

    def _marked_blocks(self) -> Iterator[int]:
        """Yield the blocks that begin as a header does, the last first."""
        end = (self.size + BLOCK - 1) // BLOCK
        window = _FIRST_WINDOW
        while end > 0:
            start = max(0, end - window)
            data = self._raw(start * BLOCK, min((end - start) * BLOCK, self.size - start * BLOCK))
            firsts = data[::BLOCK]
            yield from (start + n for n in reversed(range(len(firsts))) if firsts[n] == 1)
            end, window = start, min(2 * window, _WINDOW)

    def _header(self, position: int) -> FoundHeader:
        head = self._raw(position, _HEAD)
        length = int.from_bytes(head[1:], "big")
        if not _SEAL < length <= MOST_HEADER:
            msg = f"a header of {length} bytes"
            raise Damaged(msg)
        data, end = self._stripped(position + _HEAD, length)
        return FoundHeader(position, end, _decode(_opened(data)))

    def chunk(self, position: int) -> bytes:
        """Return the bytes of the term at an offset, their seal checked."""
        head, at = self._stripped(position, 4)
        word = int.from_bytes(head, "big")
        sealed, length = word >> 31, word & 0x7FFFFFFF
        if length > MOST_CHUNK:
            msg = f"the term at {position} is of {length} bytes, more than {MOST_CHUNK}"
            raise Damaged(msg)
        data, _ = self._stripped(at, length + _SEAL if sealed else length)
        return _opened(data) if sealed else data

    def term(self, position: int) -> object:
        """Return the term at an offset."""
        return unpack(self.chunk(position))

    def _stripped(self, position: int, length: int) -> tuple[bytes, int]:
        """Return bytes without the blocks' first ones, and the offset behind them."""
        offset = position % BLOCK
        first = BLOCK - offset if offset else 0
        more = max(0, length - first)
        total = length + (more + BLOCK - 2) // (BLOCK - 1)
        raw = self._raw(position, total)
        if not more:
            return raw, position + total
        parts = [raw[:first], *(raw[at + 1 : at + BLOCK] for at in range(first, total, BLOCK))]
        return b"".join(parts), position + total

    def _raw(self, position: int, length: int) -> bytes:
        if position + length > self.size:
            msg = f"{length} bytes at {position} reach past the end of the file, {self.size}"
            raise Damaged(msg)
        self._file.seek(position)
        data = self._file.read(length)
        if len(data) != length:
            msg = f"the file ended at {position + len(data)} while it was read"
            raise Damaged(msg)
        return data


def unpack(data: bytes) -> object:
    """Return the term in packed bytes (CouchDB's couch_compress: 1 and snappy, or 131 and the term itself)."""
    if data[:1] == b"\x01":
        try:
            data = decompress(data[1:], terms.MOST_BYTES)
        except ValueError as error:
            msg = f"not snappy: {error}"
            raise Damaged(msg) from error
    elif data[:4] == b"\x28\xb5\x2f\xfd":
        msg = "packed with Zstandard, which CouchDB 3.5 does not write and this does not read"
        raise Damaged(msg)
    return _decode(data)


def _decode(data: bytes) -> object:
    try:
        return terms.decode(data)
    except ValueError as error:
        msg = f"not a term: {error}"
        raise Damaged(msg) from error


def _opened(data: bytes) -> bytes:
    """Return what was sealed with either sum; both are in files that have lived through an upgrade."""
    seal, body = data[:_SEAL], data[_SEAL:]
    if hashlib.md5(body, usedforsecurity=False).digest() != seal and xxh3_128(body) != seal:
        msg = "its sum does not match"
        raise Damaged(msg)
    return body
