"""The last header of a database file that passes by in pieces: how many documents it has, without the file.

A header holds the counts of its tree's root, so what a node will say of a database is known from a stream. Only the
last few headers are kept, each at most as long as one may be.
"""

from __future__ import annotations

import contextlib
import io
from collections import deque
from dataclasses import dataclass, field, replace
from typing import BinaryIO

from hq_backups.engine.couch.blocks import BLOCK, MOST_HEADER, BlockFile, Damaged
from hq_backups.engine.couch.couchfile import CouchFile, DatabaseHeader, read_header
from hq_backups.engine.errors import CorruptBackup

KEPT = 8
"""A torn copy ends in one broken header; so many broken ones in a row are another kind of damage."""
_MOST = MOST_HEADER + MOST_HEADER // (BLOCK - 1) + BLOCK


@dataclass(frozen=True)
class Header:
    """What the last whole header of a database file says."""

    doc_count: int
    doc_del_count: int
    update_seq: int
    position: int = field(default=0, compare=False)
    """Where it begins in the file that it was read from."""


def header_of(file: BinaryIO, name: str) -> Header | None:
    """Return the last header of an open file; None when a node would take it for an empty database."""
    try:
        with CouchFile(file, name) as couch:
            return Header(couch.doc_count(), couch.deleted_count(), couch.update_seq, couch.header_position)
    except CorruptBackup:
        return None


class HeaderWatch:
    """Remembers the ends of headers as a file's bytes pass."""

    def __init__(self) -> None:
        """Begin at the beginning of a file."""
        self._size = 0
        self._found: deque[tuple[int, bytearray]] = deque(maxlen=KEPT)

    def feed(self, data: memoryview) -> None:
        """Take the next bytes of the file."""
        first = -self._size % BLOCK
        marks = bytes(data[first::BLOCK])
        starts: list[int] = []
        at = len(marks)
        while len(starts) < KEPT and (at := marks.rfind(b"\x01", 0, at)) >= 0:
            starts.append(first + at * BLOCK)
        starts.reverse()
        # Where more began than are kept, those before are not needed at all.
        if len(starts) < KEPT and self._found:
            self._grow(self._found[-1][1], data[: starts[0] if starts else len(data)])
        for number, start in enumerate(starts):
            end = starts[number + 1] if number + 1 < len(starts) else len(data)
            self._found.append((self._size + start, bytearray()))
            self._grow(self._found[-1][1], data[start:end])
        self._size += len(data)

    @staticmethod
    def _grow(kept: bytearray, data: memoryview) -> None:
        kept += data[: _MOST - len(kept)]

    def header(self) -> Header | None:
        """Return what the last whole header says; None without one."""
        for position, kept in reversed(self._found):
            with contextlib.suppress(Damaged):
                found = BlockFile(io.BytesIO(kept)).last_header()
                if found is not None:
                    # Offsets in it are the file's, and point to what came before.
                    return _told(read_header(replace(found, position=position)))
        return None


def _told(header: DatabaseHeader) -> Header:
    return Header(header.counts.present, header.counts.deleted, header.update_seq)
