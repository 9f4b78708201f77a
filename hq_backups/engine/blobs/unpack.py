"""Blobs out of an archive, fast: each member is checked, and small files are made by threads of their own.

Making a small file is the kernel's work, and most of it is done without Python's lock. A file must not be there
before, and directories are only walked through when they were made here: no path leads out of the tree.
"""

from __future__ import annotations

import errno
import os
import queue
import stat
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Self

from hq_backups.engine.blobs.headers import DIRECTORY, FILE, Member, inside, members
from hq_backups.engine.errors import CorruptBackup, DiskFull, UnsafeArchive
from hq_backups.engine.streams import LARGE, PlainReader, write_file

_BATCH_FILES, _BATCH_BYTES = 128, 512 << 10
_DEPTH = 4
"""Batches that wait: with their bytes, what bounds memory."""
_THREADS = 2
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def file_mode(mode: int) -> int:
    """Return the mode of a file that is unpacked: as it was, without set-id and the right of all to write."""
    return mode & 0o775


def directory_mode(mode: int) -> int:
    """Return the mode of a directory that is unpacked; its owner can always use it."""
    return 0o700 | mode & 0o775


class Root:
    """Which members of an archive are blobs, and under which key."""

    def __init__(
        self, archive: str, strip: Sequence[str] = (), only: Sequence[str] = (), *, old: bool = False
    ) -> None:
        """``strip`` are the directories that an old archive has in front; ``only`` are the keys that are wanted."""
        self.archive = archive
        self.old = old
        self._front = b"/".join(os.fsencode(part) for part in strip)
        self._only = {os.fsencode(key).strip(b"/"): False for key in only}

    def key(self, member: Member) -> bytes | None:
        """Return a member's path below the root, empty for the root itself; None of what is not wanted."""
        name = member.name
        if self._front:
            name = name.lstrip(b"/") or name
        name = inside(name, self.archive)
        if self._front:
            if name != self._front and not name.startswith(self._front + b"/"):
                return None
            name = name[len(self._front) + 1 :]
        if self._only and not self._wanted(name):
            return None
        return name

    def _wanted(self, name: bytes) -> bool:
        """Tell whether a path is a wanted key, below one, or a directory above one."""
        found = False
        for key in self._only:
            if name == key or name.startswith(key + b"/"):
                self._only[key] = found = True
            elif key.startswith(name + b"/"):
                found = True
        return found

    @property
    def missing(self) -> list[str]:
        """Return the wanted keys that did not come."""
        return [os.fsdecode(key) for key, seen in self._only.items() if not seen]


def blobs(plain: PlainReader, root: Root) -> Iterator[tuple[bytes, Member]]:
    """Yield the files and directories below the root, each checked; raises UnsafeArchive for anything else.

    What is neither is passed over in an old archive: today's scripts took everything that there was.
    """
    for member in members(plain):
        key = root.key(member)
        if member.kind not in (FILE, DIRECTORY) and not root.old:
            raise UnsafeArchive(f"{member.shown} is neither file nor directory", name=plain.name)
        if key is None or member.kind not in (FILE, DIRECTORY):
            continue
        if not key and member.kind == FILE:
            raise UnsafeArchive(f"{member.shown} must be a directory", name=plain.name)
        yield key, member


class Unpacked(NamedTuple):
    """What came out of an archive."""

    files: int
    directories: int
    bytes: int


def unpack(plain: PlainReader, target: Path, root: Root) -> Unpacked:
    """Unpack into the empty directory ``target``.

    Raises UnsafeArchive, CorruptBackup and DiskFull.
    """
    files = directories = size = 0
    top = os.fsencode(target)
    made = _Directories(top, plain.name)
    with _Writers(target, plain.name) as writers:
        for key, member in blobs(plain, root):
            if member.kind == DIRECTORY:
                directories += bool(key)
                made.make(key, directory_mode(member.mode))
                continue
            made.above(key)
            files += 1
            size += member.size
            path = os.path.join(top, key)
            if member.size < LARGE:
                data = plain.read(member.size)
                if len(data) < member.size:
                    raise CorruptBackup("it ends in the middle of a file", name=plain.name)
                writers.add(_Small(path, member, data))
            else:
                _write(path, member, plain.pieces(member.size), target, plain.name)
        writers.finish()
    return Unpacked(files, directories, size)


class _Small(NamedTuple):
    """A file that is in memory, and waits to be made."""

    path: bytes
    member: Member
    data: bytes


def _write(
    path: bytes, member: Member, pieces: Iterable[bytes | memoryview], target: Path, archive: str
) -> None:
    """Make one file, which must not be there."""
    try:
        fd = os.open(path, _NEW, 0o600)
    except (FileExistsError, NotADirectoryError) as error:
        raise UnsafeArchive(f"{member.shown} is there twice", name=archive) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(path=target) from error
        raise
    try:
        write_file(fd, pieces, target)
        os.fchmod(fd, file_mode(member.mode))
        os.utime(fd, (member.mtime, member.mtime))
    finally:
        os.close(fd)


class _Directories:
    """Makes directories; only ones that are there as directories are walked through."""

    def __init__(self, target: bytes, archive: str) -> None:
        self._target = target
        self._archive = archive
        self._last = b""

    def make(self, key: bytes, mode: int) -> None:
        """Make a directory, or set the mode of one that was made for what is in it."""
        if key:
            self.above(key)
            self._mkdir(key)
            os.chmod(os.path.join(self._target, key), mode)

    def above(self, key: bytes) -> None:
        """Make the directories above a key, where there are none yet."""
        parent = key.rpartition(b"/")[0]
        if not parent or parent == self._last:
            return
        if not self._is_there(parent):
            self.above(parent)
            self._mkdir(parent)
        self._last = parent

    def _is_there(self, key: bytes) -> bool:
        try:
            return stat.S_ISDIR(os.lstat(os.path.join(self._target, key)).st_mode)
        except FileNotFoundError:
            return False
        except NotADirectoryError:
            raise self._clash(key) from None

    def _mkdir(self, key: bytes) -> None:
        path = os.path.join(self._target, key)
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            if not stat.S_ISDIR(os.lstat(path).st_mode):
                raise self._clash(key) from None
        except NotADirectoryError:
            raise self._clash(key) from None

    def _clash(self, key: bytes) -> UnsafeArchive:
        return UnsafeArchive(f"{os.fsdecode(key)!a} is both file and directory", name=self._archive)


class _Writers:
    """Threads that make small files while the next ones are read and checked."""

    def __init__(self, target: Path, archive: str) -> None:
        self._target, self._archive = target, archive
        self._batch: list[_Small] = []
        self._bytes = 0
        self._waiting: queue.Queue[list[_Small] | None] = queue.Queue(_DEPTH)
        self._failure: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._run, name="hqb-blobs", daemon=True) for _ in range(_THREADS)
        ]

    def add(self, small: _Small) -> None:
        """Have a file made; raises what went wrong with an earlier one."""
        self._batch.append(small)
        self._bytes += len(small.data)
        if self._bytes >= _BATCH_BYTES or len(self._batch) >= _BATCH_FILES:
            self._hand_over()

    def finish(self) -> None:
        """Wait until every file is there; raises what went wrong."""
        self._hand_over()
        self.__exit__()
        if self._failure is not None:
            raise self._failure

    def _hand_over(self) -> None:
        if self._failure is not None:
            raise self._failure
        self._waiting.put(self._batch)
        self._batch, self._bytes = [], 0

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for thread in self._threads:
            if thread.is_alive():
                self._waiting.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while (batch := self._waiting.get()) is not None:
            try:
                for path, member, data in batch:
                    if self._failure is None:
                        _write(path, member, (data,), self._target, self._archive)
            except BaseException as error:
                self._failure = error
