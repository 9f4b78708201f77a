"""A base backup of a server with tablespaces: pg_basebackup writes it into files, which become one archive.

To its standard output it can only write a cluster that is one piece. So its files lie in a directory for a while,
and are then read as one tar: the cluster's members, pg_basebackup's list of the files, and each tablespace's
members below ``pg_tblspc/<oid>/``. Nothing of it is read before the program has ended well.
Format: POSIX.1-2001, ustar; postgresql.org/docs/current/app-pgbasebackup.html, option --format.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from hq_backups.engine.errors import ProducerTruncated
from hq_backups.engine.events import Events
from hq_backups.engine.process import Producer

BLOCK = tarfile.BLOCKSIZE
CHUNK = 1 << 20
BASE, FILE_LIST = "base.tar", "backup_manifest"
_TABLESPACE = re.compile(r"([0-9]+)\.tar\Z")
_PREFIX, _CHECKSUM = slice(345, 500), slice(148, 156)
"""Where a ustar header has what stands in front of its name, and its own sum."""
_LOOK_SECONDS = 0.5


# Its output is no pipe of ours that would break: it ends when its input does, which is ours to hold.
_TIED = """exec 3<&0
"$@" </dev/null 3<&- & program=$!
{ read -r _ <&3; kill -9 $program; } >/dev/null 2>&1 & watch=$!
exec 3<&-
wait $program; status=$?
kill $watch 2>/dev/null
exit $status"""


def tied(argv: Sequence[str]) -> list[str]:
    """Return a command that runs ``argv`` and kills it when its own standard input ends."""
    return ["/bin/sh", "-c", _TIED, "pg_basebackup", *argv]


@contextmanager
def emptied(directory: Path, owner: str | None) -> Iterator[Path]:
    """Make an empty directory for the length of the block, that only ``owner`` may enter."""
    directory.mkdir(mode=0o700)
    try:
        if owner is not None and os.geteuid() == 0:
            entry = pwd.getpwnam(owner)
            os.chown(directory, entry.pw_uid, entry.pw_gid)
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def fill(producer: Producer, directory: Path, expected: int, events: Events) -> None:
    """Wait until pg_basebackup has written all its files and ended well; raises ProducerFailed."""
    while not producer.readable(_LOOK_SECONDS):
        done = size(directory)
        events.progress("spool", done, expected if done < expected else None)
    while producer.read(CHUNK):
        pass
    events.progress("spool", done := size(directory), done, final=True)


def size(directory: Path) -> int:
    """Return the bytes of the files that lie there."""
    total = 0
    with contextlib.suppress(FileNotFoundError), os.scandir(directory) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                total += entry.stat(follow_symlinks=False).st_size
    return total


def tablespaces(directory: Path) -> dict[str, int]:
    """Return the size of each tablespace's file by the tablespace's oid; raises ProducerTruncated."""
    found = {}
    for path in sorted(directory.iterdir()):
        if match := _TABLESPACE.match(path.name):
            found[match[1]] = path.stat().st_size
        elif path.name not in (BASE, FILE_LIST):
            raise ProducerTruncated(f"it left a file {path.name!r}", program="pg_basebackup")
    return found


class Spooled:
    """The files of a spool read as one archive; each is removed when it has been read."""

    def __init__(self, directory: Path) -> None:
        """Read what pg_basebackup left in ``directory``."""
        self._pieces = _archive(directory)
        self._piece = memoryview(b"")

    def readinto(self, buffer: memoryview) -> int:
        """Fill some of ``buffer`` and return how much; 0 at the end."""
        while not self._piece:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._piece = piece
        count = min(len(buffer), len(self._piece))
        buffer[:count] = self._piece[:count]
        self._piece = self._piece[count:]
        return count


def _archive(directory: Path) -> Iterator[memoryview]:
    yield from _members(directory / BASE, b"")
    yield from _file_list(directory / FILE_LIST)
    for oid in tablespaces(directory):
        yield from _members(directory / f"{oid}.tar", f"pg_tblspc/{oid}".encode())
    yield memoryview(bytes(2 * BLOCK))


def _members(path: Path, prefix: bytes) -> Iterator[memoryview]:
    """Yield an archive without its end, ``prefix`` in front of every name; raises ProducerTruncated."""
    # One buffer for all: whoever takes a piece copies it before the next one is asked for.
    buffer = memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as file:
        while any(header := _exactly(file, buffer[:BLOCK], path)):
            left = _data_size(header, path)
            if prefix:
                header[:] = _renamed(header, prefix, path)
            yield header
            while left:
                piece = _exactly(file, buffer[: min(CHUNK, left)], path)
                left -= len(piece)
                yield piece
        if any(_exactly(file, buffer[:BLOCK], path)):
            raise _broken(path, "its end is not one")
    path.unlink()


def _exactly(file: IO[bytes], buffer: memoryview, path: Path) -> memoryview:
    """Fill ``buffer``; raises ProducerTruncated when the file ends before."""
    filled = 0
    while filled < len(buffer):
        count = file.readinto(buffer[filled:])  # type: ignore[attr-defined]
        if not count:
            raise _broken(path, "it ends in the middle")
        filled += count
    return buffer


def _data_size(header: memoryview, path: Path) -> int:
    """Return the bytes that follow a header, whole blocks; raises ProducerTruncated."""
    try:
        member = tarfile.TarInfo.frombuf(bytes(header), "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise _broken(path, f"a header is not readable ({error})") from error
    if not (member.isreg() or member.isdir()) or member.size < 0:
        raise _broken(path, f"{member.name!r} is neither file nor directory")
    return -(-member.size // BLOCK) * BLOCK if member.isreg() else 0


def _renamed(header: memoryview, prefix: bytes, path: Path) -> bytes:
    """Return a header whose member lies below ``prefix``; names keep their full length so."""
    block = bytearray(header)
    if block[257:263] != b"ustar\0" or any(block[_PREFIX]):
        raise _broken(path, "its headers are of another format than pg_basebackup's")
    block[_PREFIX] = prefix.ljust(155, b"\0")
    block[_CHECKSUM] = b" " * 8
    block[_CHECKSUM] = b"%06o\0 " % sum(block)
    return bytes(block)


def _file_list(path: Path) -> Iterator[memoryview]:
    """Yield pg_basebackup's list of files as one more member: into a directory it writes it beside."""
    try:
        about = path.stat()
    except FileNotFoundError as error:
        raise _broken(path, "it is not there") from error
    member = tarfile.TarInfo(FILE_LIST)
    member.size, member.mode, member.mtime = about.st_size, 0o600, int(about.st_mtime)
    member.uid, member.gid = about.st_uid, about.st_gid
    yield memoryview(member.tobuf(tarfile.USTAR_FORMAT))
    with path.open("rb", buffering=0) as file:
        left, buffer = about.st_size, memoryview(bytearray(CHUNK))
        while left:
            piece = _exactly(file, buffer[: min(CHUNK, left)], path)
            left -= len(piece)
            yield piece
    yield memoryview(bytes(-about.st_size % BLOCK))
    path.unlink()


def _broken(path: Path, why: str) -> ProducerTruncated:
    return ProducerTruncated(f"{path.name}: {why}", program="pg_basebackup")
