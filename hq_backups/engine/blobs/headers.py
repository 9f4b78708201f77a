"""Headers of tar archives, read in a few microseconds each: a million small files must not wait for them.

Formats: POSIX.1-2001 ustar and pax (pubs.opengroup.org, utility pax), GNU tar's long names and numbers
(gnu.org/software/tar/manual/html_node/Standard.html). What only tapes and disks need (sparse files, volumes,
incremental dumps) is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from isal import isal_zlib

from hq_backups.engine.blobs.reading import MAX_DEPTH, MAX_NAME
from hq_backups.engine.errors import CorruptBackup, UnsafeArchive
from hq_backups.engine.streams import PlainReader

BLOCK = 512
ZERO = bytes(BLOCK)
MAX_EXTENSION = 64 << 10
"""Bytes of a long name, or of a pax header: more than a path may have."""
MAX_PART = 255

FILE, DIRECTORY, SYMLINK = b"0", b"5", b"2"
_FILES = frozenset([b"0", b"\0", b"7"])
_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL = b"L", b"K", b"x", b"g"
EXTENSIONS = frozenset([_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL])
_WITHOUT_DATA = frozenset([b"1", b"2", b"3", b"4", b"5", b"6"])
"""Links, devices, directories and pipes: what their size says is not in the archive."""
_MODULUS = 65521
_RECORD = re.compile(rb"(\d{1,7}) ([^=\0]{1,255})=")


class Member(NamedTuple):
    """One member, as its headers tell."""

    name: bytes
    kind: bytes
    """:data:`FILE`, :data:`DIRECTORY`, :data:`SYMLINK`, or another of the format's type flags."""
    mode: int
    size: int
    """Bytes of its data."""
    mtime: int
    target: bytes = b""
    """What a link names."""

    @property
    def shown(self) -> str:
        """Return the name as a message shows it."""
        return ascii(self.name.decode("utf-8", "surrogateescape"))


class Heads:
    """Puts together the headers of one member after another."""

    def __init__(self, archive: str) -> None:
        """Call the archive ``archive`` in errors."""
        self.archive = archive
        self._long: dict[bytes, bytes] = {}

    @property
    def pending(self) -> bool:
        """Tell whether a member's own header is still to come."""
        return bool(self._long)

    def extension(self, block: bytes) -> int:
        """Return how many bytes of data a header has that only adds to the next one; -1 for a member's own."""
        kind = block[156:157]
        if kind not in EXTENSIONS:
            return -1
        self._check(block)
        size = self._number(block[124:136])
        if size > MAX_EXTENSION:
            raise CorruptBackup(f"a header of {size} bytes is in it", name=self.archive)
        return size

    def extend(self, block: bytes, data: bytes) -> None:
        """Take such a header's data."""
        kind = block[156:157]
        if kind in self._long:
            raise CorruptBackup("a member has the same header twice", name=self.archive)
        self._long[kind] = data

    def member(self, block: bytes) -> Member:
        """Return the member that its own header, and those before it, describe."""
        self._check(block)
        kind = block[156:157]
        name, target = block[:100].split(b"\0", 1)[0], b""
        # In GNU tar's own format the prefix is something else.
        if block[257:263] == b"ustar\0" and block[345]:
            name = block[345:500].split(b"\0", 1)[0] + b"/" + name
        size = self._number(block[124:136])
        if kind in _FILES:
            kind = DIRECTORY if name.endswith(b"/") and kind == b"\0" else FILE
        else:
            target = block[157:257].split(b"\0", 1)[0]
        if self._long:
            name, target, size = self._lengthened(name, target, size)
        if kind in _WITHOUT_DATA:
            size = 0
        return Member(
            name, kind, self._number(block[100:108]) & 0o7777, size, self._number(block[136:148]), target
        )

    def _lengthened(self, name: bytes, target: bytes, size: int) -> tuple[bytes, bytes, int]:
        long, self._long = self._long, {}
        if _LONG_NAME in long:
            name = long[_LONG_NAME].split(b"\0", 1)[0]
        if _LONG_LINK in long:
            target = long[_LONG_LINK].split(b"\0", 1)[0]
        for kind in (_PAX_GLOBAL, _PAX):
            for key, value in self._records(long.get(kind, b"")):
                if key == b"path":
                    name = value
                elif key == b"linkpath":
                    target = value
                elif key == b"size":
                    size = self._decimal(value)
                elif key.startswith(b"GNU.sparse"):
                    raise CorruptBackup("a file with holes is in it", name=self.archive)
        return name, target, size

    def _records(self, data: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Yield a pax header's records, ``LENGTH KEY=VALUE`` and a newline."""
        position = 0
        while position < len(data):
            match = _RECORD.match(data, position)
            end = position + int(match[1]) if match else 0
            if match is None or not match.end() < end <= len(data) or data[end - 1] != 0x0A:
                raise CorruptBackup("a pax header is not readable", name=self.archive)
            yield match[2], data[match.end() : end - 1]
            position = end

    def _decimal(self, value: bytes) -> int:
        if not value.isdigit() or len(value) > 19:
            raise CorruptBackup("a pax header's size is no number", name=self.archive)
        return int(value)

    def _number(self, field: bytes) -> int:
        """Read octal digits, or GNU tar's binary form of what they cannot say."""
        text = field.strip(b" \0")
        try:
            if text.isdigit():
                return int(text, 8)
        except ValueError:
            pass
        if not text:
            return 0
        if field[0] == 0x80:
            return int.from_bytes(field[1:], "big")
        raise CorruptBackup("a header has a number that is none, or below zero", name=self.archive)

    def _check(self, block: bytes) -> None:
        """Compare a header with its checksum: the sum of its bytes, those of the checksum taken as blanks."""
        # Adler-32's lower half is one and the sum of the bytes (RFC 1950, 9), at a tenth of sum()'s price.
        total = (isal_zlib.adler32(block) & 0xFFFF) - 1 - sum(block[148:156]) + 8 * 32
        if (total - self._number(block[148:156])) % _MODULUS:
            raise CorruptBackup("a header is not readable", name=self.archive)


def padded(size: int) -> int:
    """Return the bytes that data take in an archive: whole blocks."""
    return -(-size // BLOCK) * BLOCK


def members(plain: PlainReader) -> Iterator[Member]:
    """Yield an archive's members as they come; raises CorruptBackup unless it ends as archives do.

    The consumer may read a member's data with ``plain.pieces(member.size)``; what it leaves is skipped.
    """
    heads = Heads(plain.name)
    read, seek, tell = plain.read, plain.seek, plain.tell
    while True:
        block = read(BLOCK)
        if len(block) < BLOCK:
            raise CorruptBackup("it ends before its archive does", name=plain.name)
        if not block[0] and block == ZERO:
            break
        size = heads.extension(block)
        if size >= 0:
            data = read(padded(size))
            if len(data) < size:
                raise CorruptBackup("it ends in the middle of a header", name=plain.name)
            heads.extend(block, data[:size])
            continue
        member = heads.member(block)
        end = tell() + padded(member.size)
        yield member
        if tell() != end:
            seek(end)
    _require_end(plain, heads)


def _require_end(plain: PlainReader, heads: Heads) -> None:
    """Demand a second block of zeros, and nothing but zeros after it."""
    if heads.pending:
        raise CorruptBackup("it ends in the middle of a header", name=plain.name)
    if plain.read(BLOCK) != ZERO:
        raise CorruptBackup("the end of its archive is not whole", name=plain.name)
    while data := plain.chunk():
        if data.count(0) != len(data):
            raise CorruptBackup("something follows the end of the archive", name=plain.name)


def inside(name: bytes, archive: str) -> bytes:
    """Return a member's path below the tree's top, empty for the top itself; raises UnsafeArchive."""
    if name.startswith(b"/") or b"\0" in name or not name:
        raise UnsafeArchive(f"the path {_shown(name)} leaves the tree", name=archive)
    if name.startswith(b"./"):
        name = name[2:]
    parts = name.split(b"/")
    if b".." in parts:
        raise UnsafeArchive(f"the path {_shown(name)} leaves the tree", name=archive)
    if b"" in parts or b"." in parts:
        parts = [part for part in parts if part not in (b"", b".")]
        name = b"/".join(parts)
    if len(parts) > MAX_DEPTH or len(name) > MAX_NAME or (parts and max(map(len, parts)) > MAX_PART):
        raise UnsafeArchive(f"the path {_shown(name[:80])}… is too deep or too long", name=archive)
    return name


def _shown(name: bytes) -> str:
    return ascii(name.decode("utf-8", "surrogateescape"))
