"""Reads the blobs into a tar: a program of its own, which shares no lock with the backup.

``python -I -S <this file> DIRECTORY REPORT TOLD SKIP…``: walks the directory and writes it to standard output in
GNU tar's format, members named ``./…``, hard links as files of their own. At the top, names that are ``SKIP`` or begin
with one that ends in ``*`` are left out. ``REPORT`` is the descriptor that takes, as JSON, what was met and how much
was written; only after that is the exit status 0. ``TOLD``, unless it is -1, is the descriptor of a pipe that takes
how far it is, as :data:`TOLD` each time.

Large files go from the page cache into the pipe by splice(2), without a copy: what is in the pipe is the file's own
memory. So whether a file has changed is looked at when the other side has taken its last byte, not before.

Formats: gnu.org/software/tar/manual/html_node/Standard.html. Nothing is ever padded: a file that becomes shorter than
its header has said ends the archive.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import grp
import json
import os
import pwd
import select
import stat
import struct
import sys
import termios
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

MAX_NAME = 4096
MAX_DEPTH = 128
"""Directories below each other: deeper than any key of HQ's, and less than what removing a tree can take."""

BLOCK = 512
RECORD = 20 * BLOCK
"""GNU tar fills an archive up to a multiple of this."""
BUFFER = 256 << 10
"""Bytes that are written at once; in at most three pieces for each KiB, of the 1024 that writev(2) takes."""
LARGE = 64 << 10
"""Bytes from which on a file is spliced."""
SHOWN = 20
"""Names that are kept of what one thing happened to."""
STEP = 64
"""Files after which it is told how far we are."""
TOLD = struct.Struct("<QQ")
"""How many files have passed, and how many bytes they had; asking.py has the same."""
DRAIN_MS = 5
"""Milliseconds between two looks at a pipe that the other side empties."""

_NAME = 100
_FILE, _DIRECTORY, _LONG_NAME = b"0", b"5", b"L"
_MAGIC = b"ustar  \0"
_DIGITS = 8**11
_INT = struct.Struct("i")
_ZEROS = tuple(map(bytes, range(BLOCK)))
"""So many of them, by their number."""
_NO_COPY = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a file system answers that cannot splice."""
_GONE = (errno.ENOENT, errno.ESTALE, errno.ENOTDIR)
_FORBIDDEN = (errno.EACCES, errno.EPERM)
_OPEN = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_NAMES = (sys.getfilesystemencoding(), sys.getfilesystemencodeerrors())
_KINDS = {
    stat.S_IFLNK: "symbolic links",
    stat.S_IFCHR: "devices",
    stat.S_IFBLK: "devices",
    stat.S_IFIFO: "pipes",
    stat.S_IFSOCK: "sockets",
}


class Broken(Exception):
    """The archive cannot be brought to a good end."""

    def __init__(self, what: str, path: bytes, why: str = "") -> None:
        """Say ``what`` happened: ``shrank``, ``unread`` or ``deep``; ``why`` is the system's reason."""
        super().__init__(f"{what}: {shown(path)} {why}")
        self.what, self.path, self.why = what, path, why


class Noted:
    """Files that one thing happened to: how many, and the names of the first."""

    def __init__(self, count: int = 0, names: Sequence[str] = ()) -> None:
        """Begin with so many."""
        self.count = count
        self.names = list(names)

    def add(self, name: str) -> None:
        """Count one more, by its name as a message shows it."""
        self.count += 1
        if len(self.names) < SHOWN:
            self.names.append(name)

    def told(self) -> dict[str, Any]:
        """Return it for the report."""
        return {"count": self.count, "names": self.names}


class Scan(Protocol):
    """What os.scandir returns."""

    def __next__(self) -> os.DirEntry[str]:
        """Return the next entry."""

    def __iter__(self) -> Iterator[os.DirEntry[str]]:
        """Return itself."""

    def close(self) -> None:
        """Close the directory."""


class Level(NamedTuple):
    """A directory that is being read."""

    fd: int
    entries: Scan
    path: bytes
    """Empty at the top, else with a slash behind it."""
    before: os.stat_result

    def close(self) -> None:
        """Let go of it."""
        self.entries.close()
        os.close(self.fd)


class Spliced(NamedTuple):
    """A file of which the other side may not have taken everything yet."""

    fd: int
    end: int
    """Where in the archive it ends."""
    path: bytes
    before: os.stat_result


class Reader:
    """Writes one directory as a tar to a pipe."""

    def __init__(self, out: int, told: int = -1) -> None:
        """Write to the descriptor ``out``, tell ``told`` how far it is."""
        self.files = self.directories = self.bytes = 0
        self.written = 0
        """Bytes that are in the pipe or through it."""
        self.vanished, self.changed, self.changed_directories = Noted(), Noted(), Noted()
        self.unreadable, self.unreadable_directories = Noted(), Noted()
        self.left_out: dict[str, int] = {}
        self.left_out_names: list[str] = []
        self._out, self._told = out, told
        self._pieces: list[bytes] = []
        self._waiting = 0
        self._spliced: deque[Spliced] = deque()
        self._can_splice = True

    # The tree

    def read(self, directory: bytes, skip: Sequence[bytes]) -> None:
        """Write everything below ``directory``, and the archive's end; raises Broken, and OSError from the pipe."""
        levels: list[Level] = []
        try:
            self._enter(directory, None, b"", levels)
            if not levels:
                raise Broken("unread", directory, "it is not there, or may not be read")
            while levels:
                self._entries(levels, skip)
        finally:
            for level in levels:
                level.close()
        self._end()

    def _entries(self, levels: list[Level], skip: Sequence[bytes]) -> None:
        """Write what is in the last directory, up to one that is in it, or to its end."""
        level = levels[-1]
        fd, path = level.fd, level.path
        too_deep = path.count(b"/") >= MAX_DEPTH
        while (entry := self._next(level)) is not None:
            name = entry.name.encode(*_NAMES)
            if not path and _is_one_of(name, skip):
                continue
            if too_deep:
                raise Broken("deep", path + name)
            kind = _kind(entry)
            if kind == stat.S_IFREG:
                self._file(fd, name, path + name)
            elif kind != stat.S_IFDIR:
                self._neither(fd, name, path + name)
            elif self._enter(name, fd, path + name + b"/", levels):
                return
        if os.fstat(fd).st_ctime_ns != level.before.st_ctime_ns:
            self.changed_directories.add(shown(path))
        levels.pop().close()

    def _next(self, level: Level) -> os.DirEntry[str] | None:
        try:
            return next(level.entries, None)
        except OSError as error:
            if error.errno in _GONE:
                return None
            raise Broken("unread", level.path, _reason(error)) from error

    def _enter(self, name: bytes, above: int | None, path: bytes, levels: list[Level]) -> bool:
        """Begin with a directory; tell whether it could be opened."""
        try:
            fd = os.open(name, _OPEN | os.O_DIRECTORY, dir_fd=above)
        except OSError as error:
            self._not_opened(error, path, self.unreadable_directories)
            return False
        try:
            before = os.fstat(fd)
            levels.append(Level(fd, os.scandir(fd), path, before))
        except OSError as error:
            os.close(fd)
            raise Broken("unread", path, _reason(error)) from error
        self.directories += bool(path)
        self._put(self._header(path, before, 0, _DIRECTORY))
        return True

    def _neither(self, above: int, name: bytes, path: bytes) -> None:
        """Take note of what is neither file nor directory."""
        try:
            mode = os.stat(name, dir_fd=above, follow_symlinks=False).st_mode
        except OSError as error:
            self._not_opened(error, path, self.unreadable)
            return
        self._leave_out(mode, path)

    def _leave_out(self, mode: int, path: bytes) -> None:
        kind = _KINDS.get(stat.S_IFMT(mode), "others")
        self.left_out[kind] = self.left_out.get(kind, 0) + 1
        if len(self.left_out_names) < SHOWN:
            self.left_out_names.append(shown(path))

    def _not_opened(self, error: OSError, path: bytes, forbidden: Noted) -> None:
        """Take note of what could not be opened; raises Broken for what a disk or the system is to blame for."""
        if error.errno in _GONE:
            self.vanished.add(shown(path))
        elif error.errno in _FORBIDDEN:
            forbidden.add(shown(path))
        else:
            raise Broken("unread", path, _reason(error)) from error

    # One file

    def _file(self, above: int, name: bytes, path: bytes) -> None:
        try:
            fd = os.open(name, _OPEN, dir_fd=above)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO):
                # Something else has come in its place.
                self._neither(above, name, path)
            else:
                self._not_opened(error, path, self.unreadable)
            return
        done = True
        try:
            before = os.fstat(fd)
            size = before.st_size
            if not stat.S_ISREG(before.st_mode):
                self._leave_out(before.st_mode, path)
                return
            self._put(self._header(path, before, size, _FILE))
            if size >= LARGE and self._can_splice:
                left = self._splice(fd, path, size)
                done = left == size
            else:
                left = size
            if left:
                self._copy(fd, path, left)
            if done:
                self._compare(fd, path, before)
            else:
                self._spliced.append(Spliced(fd, self.written + self._waiting, path, before))
                self._settle()
            if pad := -size % BLOCK:
                self._put(_ZEROS[pad])
        finally:
            if done:
                os.close(fd)
        self.files += 1
        self.bytes += size
        if not self.files % STEP:
            self._tell()

    def _copy(self, fd: int, path: bytes, left: int) -> None:
        """Write so many bytes of a file by way of our memory."""
        while left:
            try:
                data = os.read(fd, left if left < BUFFER else BUFFER)
            except OSError as error:
                raise Broken("unread", path, _reason(error)) from error
            if not data:
                raise Broken("shrank", path)
            self._put(data)
            left -= len(data)

    def _splice(self, fd: int, path: bytes, left: int) -> int:
        """Write so many bytes of a file without copying them; return how many of them could not be."""
        self._flush()
        while left:
            try:
                count = os.splice(fd, self._out, left)
            except BrokenPipeError:
                raise
            except OSError as error:
                if error.errno not in _NO_COPY:
                    raise Broken("unread", path, _reason(error)) from error
                self._can_splice = False
                break
            if not count:
                raise Broken("shrank", path)
            self.written += count
            left -= count
        return left

    def _settle(self) -> None:
        """Look at the files of which the other side has taken everything, and close them."""
        taken = self.written - _in_pipe(self._out)
        while self._spliced and self._spliced[0].end <= taken:
            fd, _, path, before = self._spliced.popleft()
            try:
                self._compare(fd, path, before)
            finally:
                os.close(fd)

    def _compare(self, fd: int, path: bytes, before: os.stat_result) -> None:
        """Look whether a file is still what it was before it was read."""
        after = os.fstat(fd)
        if after.st_ctime_ns == before.st_ctime_ns:
            return
        if after.st_size < before.st_size:
            raise Broken("shrank", path)
        if _content(after) != _content(before) or _names(after) == _names(before):
            self.changed.add(shown(path))

    # The archive

    def _header(self, path: bytes, about: os.stat_result, size: int, kind: bytes) -> bytes:
        if len(path) > MAX_NAME:
            raise Broken("deep", path)
        name, long = b"./" + path, b""
        if len(name) > _NAME:
            told = name + b"\0"
            long = _block(b"././@LongLink", _fields(0o644, 0, 0, _LONG_NAME), len(told), 0)
            long += told + bytes(-len(told) % BLOCK)
            name = name[:_NAME]
        fields = _fields(about.st_mode & 0o7777, about.st_uid, about.st_gid, kind)
        mtime = int(about[stat.ST_MTIME])
        return long + _block(name, fields, size, mtime if mtime > 0 else 0)

    def _put(self, data: bytes) -> None:
        self._pieces.append(data)
        self._waiting += len(data)
        if self._waiting >= BUFFER:
            self._flush()

    def _flush(self) -> None:
        pieces, self._pieces, self._waiting = self._pieces, [], 0
        written = os.writev(self._out, pieces) if pieces else 0
        self.written += written
        for piece in pieces:
            # A signal may have ended it early.
            if written < len(piece):
                self._write(memoryview(piece)[written:])
            written = max(0, written - len(piece))

    def _write(self, left: memoryview) -> None:
        while left:
            count = os.write(self._out, left)
            self.written += count
            left = left[count:]

    def _end(self) -> None:
        """Write two empty blocks, and fill the last record; wait until the other side has taken everything."""
        self._put(bytes(2 * BLOCK))
        self._put(bytes(-(self.written + self._waiting) % RECORD))
        self._flush()
        ended = select.poll()
        ended.register(self._out, 0)
        while self._spliced:
            self._settle()
            if self._spliced and ended.poll(DRAIN_MS):
                raise BrokenPipeError

    def _tell(self) -> None:
        if self._told < 0:
            return
        # A pipe that is full has news enough; one that is closed needs none.
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self._told, TOLD.pack(self.files, self.bytes))

    def report(self) -> dict[str, Any]:
        """Return what was met."""
        noted = ("vanished", "changed", "changed_directories", "unreadable", "unreadable_directories")
        return {
            "files": self.files,
            "directories": self.directories,
            "bytes": self.bytes,
            "written": self.written,
            "left_out": {"count": self.left_out, "names": self.left_out_names},
            **{name: getattr(self, name).told() for name in noted},
        }


def shown(path: bytes) -> str:
    """Return a path as a message shows it."""
    return ascii(path.rstrip(b"/").decode("utf-8", "surrogateescape") or ".")


def _is_one_of(name: bytes, skip: Sequence[bytes]) -> bool:
    return any(name.startswith(each[:-1]) if each.endswith(b"*") else name == each for each in skip)


def _kind(entry: os.DirEntry[str]) -> int:
    """Return the type bits of an entry, 0 for what is neither file nor directory."""
    try:
        if entry.is_file(follow_symlinks=False):
            return stat.S_IFREG
        return stat.S_IFDIR if entry.is_dir(follow_symlinks=False) else 0
    except OSError:
        # Where a directory does not tell, a stat(2) failed: to open it tells why.
        return stat.S_IFREG


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _content(about: os.stat_result) -> tuple[int, int]:
    """Return what changes with a file's bytes."""
    return about.st_size, about.st_mtime_ns


def _names(about: os.stat_result) -> tuple[int, ...]:
    """Return what changes when its names, its mode or its owner do, and its bytes do not."""
    return about.st_nlink, about.st_mode, about.st_uid, about.st_gid


def _in_pipe(fd: int) -> int:
    """Return how many bytes the other side has not taken yet."""
    (waiting,) = _INT.unpack(fcntl.ioctl(fd, termios.FIONREAD, bytes(_INT.size)))
    return int(waiting)


class Fields(NamedTuple):
    """What many headers have in common."""

    owner: bytes
    """Mode and owner's numbers, from byte 100 on."""
    rest: bytes
    """From the checksum's end, at byte 155, to the block's."""
    total: int
    """The sum of their bytes, and of the checksum's own, which count as blanks."""


@functools.lru_cache(1024)
def _fields(mode: int, uid: int, gid: int, kind: bytes) -> Fields:
    owner = _number(mode, 8) + _number(uid, 8) + _number(gid, 8)
    rest = b" " + kind + bytes(_NAME) + _MAGIC + _user(uid).ljust(32, b"\0") + _group(gid).ljust(32, b"\0")
    rest += bytes(BLOCK - 155 - len(rest))
    # Of the checksum's eight bytes the last one, a blank, is in ``rest``.
    return Fields(owner, rest, sum(owner) + sum(rest) + 7 * 32)


def _block(name: bytes, fields: Fields, size: int, mtime: int) -> bytes:
    """Return one header."""
    if size < _DIGITS and mtime < _DIGITS:
        numbers = b"%011o\0%011o\0" % (size, mtime)
    else:
        numbers = _number(size, 12) + _number(mtime, 12)
    # Adler-32's lower half is one and the sum of so few bytes (RFC 1950, 9), at a fraction of sum()'s price.
    total = fields.total + (zlib.adler32(name + numbers) & 0xFFFF) - 1
    return b"%b%b%b%06o\0%b" % (name.ljust(_NAME, b"\0"), fields.owner, numbers, total, fields.rest)


def _number(value: int, width: int) -> bytes:
    """Return a number in octal digits, or in GNU tar's binary form where they cannot say it."""
    if value < 8 ** (width - 1):
        return b"%0*o\0" % (width - 1, value)
    return b"\x80" + value.to_bytes(width - 1, "big")


def _user(uid: int) -> bytes:
    try:
        return pwd.getpwuid(uid).pw_name.encode("utf-8", "surrogateescape")[:31]
    except KeyError:
        return b""


def _group(gid: int) -> bytes:
    try:
        return grp.getgrgid(gid).gr_name.encode("utf-8", "surrogateescape")[:31]
    except KeyError:
        return b""


def main(arguments: Sequence[str]) -> int:
    """Read a directory; return the exit status."""
    directory, report, told, *skip = arguments
    reader = Reader(1, int(told))
    broken: dict[str, str] | None = None
    try:
        reader.read(os.fsencode(directory), [os.fsencode(each) for each in skip])
    except BrokenPipeError:
        # The backup has ended, and has said why.
        return 1
    except Broken as error:
        broken = {"what": error.what, "name": shown(error.path), "why": error.why}
    with os.fdopen(int(report), "w", encoding="ascii") as file:
        json.dump({**reader.report(), "broken": broken}, file)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
