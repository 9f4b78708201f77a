"""A snapshot as one tar: read through the open descriptors, up to the sizes that were fixed.

Members are GNU tar's, named ``./…`` as ``tar -C DIR .`` names them.
"""

from __future__ import annotations

import functools
import grp
import hashlib
import os
import pwd
import stat
import tarfile
from collections.abc import Iterator, Mapping
from typing import Any

from hq_backups.engine.couch.frozen import Frozen
from hq_backups.engine.couch.snapshot import Snapshot

AHEAD = 16 << 20
"""Bytes that the disk is asked for before they are wanted: it reads while what came is hashed."""
_WINDOW = 1 << 20


class Tarball:
    """The bytes of a tar, made as they are asked for; no file's contents are held."""

    def __init__(self, snapshot: Snapshot, endings: Mapping[str, int] | None = None) -> None:
        """Take a snapshot, which stays the caller's, and from where on the ends of files are hashed too."""
        self.sums: dict[str, dict[str, Any]] = {}
        """Size and sha256 of each file that has passed whole, by path."""
        self.endings: dict[str, str] = {}
        """Sha256 of the end of each file of which that was asked, by path."""
        self._from = endings or {}
        self.ended = False
        self._members = _headers(snapshot)
        self._windows = _windows(snapshot)
        self._asked = self._passed = 0
        self._pending = memoryview(b"")
        self._file: Frozen | None = None
        self._offset = 0
        self._sha, self._end = hashlib.sha256(), hashlib.sha256()

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill ``buffer``; less only at the end of the archive."""
        filled = 0
        self._ask(self._passed + len(buffer) + AHEAD)
        while filled < len(buffer):
            if self._pending:
                count = min(len(self._pending), len(buffer) - filled)
                buffer[filled : filled + count] = self._pending[:count]
                self._pending = self._pending[count:]
            elif self._file is not None:
                count = self._read(self._file, buffer[filled:])
            elif not self._next():
                break
            else:
                continue
            filled += count
            self._passed += count
        return filled

    def _ask(self, until: int) -> None:
        """Have the kernel read on, also beyond the end of a file: small ones give it nothing to guess from."""
        while self._asked < until and (window := next(self._windows, None)) is not None:
            file, start, length = window
            file.ask(start, length)
            self._asked += length

    def _read(self, file: Frozen, buffer: memoryview) -> int:
        count = file.read_into(buffer, self._offset)
        # An empty file passes here too: nothing is read, and it is whole.
        self._sha.update(buffer[:count])
        start = self._from.get(file.path)
        if start is not None and self._offset + count > start:
            self._end.update(buffer[max(0, start - self._offset) : count])
        self._offset += count
        if self._offset == file.size:
            self.sums[file.path] = {"size": file.size, "sha256": self._sha.hexdigest()}
            if start is not None:
                self.endings[file.path] = self._end.hexdigest()
            self._pending = memoryview(bytes(-file.size % tarfile.BLOCKSIZE))
            self._file = None
        return count

    def _next(self) -> bool:
        """Begin the next member, or the end; tell whether there is anything."""
        if self.ended:
            return False
        header, file = next(self._members, (None, None))
        if header is None:
            # Two empty blocks end an archive; GNU tar fills up its last record.
            end = 2 * tarfile.BLOCKSIZE
            self._pending = memoryview(bytes(end + -(self._passed + end) % tarfile.RECORDSIZE))
            self.ended = True
            return True
        self._pending = memoryview(header)
        if file is not None:
            self._file, self._offset = file, 0
            self._sha, self._end = hashlib.sha256(), hashlib.sha256()
        return True


def _windows(snapshot: Snapshot) -> Iterator[tuple[Frozen, int, int]]:
    for file in snapshot.files:
        for start in range(0, file.size, _WINDOW):
            yield file, start, min(_WINDOW, file.size - start)


def _headers(snapshot: Snapshot) -> Iterator[tuple[bytes, Frozen | None]]:
    for path, status in snapshot.directories:
        yield _header(path, status, 0, tarfile.DIRTYPE), None
    for file in snapshot.files:
        yield _header(file.path, file.status, file.size, tarfile.REGTYPE), file


def _header(path: str, status: os.stat_result, size: int, kind: bytes) -> bytes:
    member = tarfile.TarInfo("." if path == "." else f"./{path}")
    member.type, member.size, member.mode = kind, size, stat.S_IMODE(status.st_mode)
    member.mtime = int(status.st_mtime)
    member.uid, member.gid = status.st_uid, status.st_gid
    member.uname, member.gname = _user(status.st_uid), _group(status.st_gid)
    return member.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


@functools.cache
def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return ""


@functools.cache
def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return ""
