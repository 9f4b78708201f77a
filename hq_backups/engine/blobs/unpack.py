"""Blobs out of an archive, fast: every member is checked here, then GNU tar makes the files, two at a time.

Making small files is the kernel's work, and waits: one tar after the other uses one core of it. Large ones are
written here. What the tars get are not the archive's headers, but new ones, made of what was checked: they cannot be
read in two ways. Directories are made here, and tar opens each file as one that must not be there
(``--keep-old-files``).
"""

from __future__ import annotations

import contextlib
import os
import queue
import stat
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from isal import isal_zlib

from hq_backups.engine.blobs.headers import (
    BLOCK,
    DIRECTORY,
    FILE,
    Member,
    inside,
    members,
    padded,
)
from hq_backups.engine.errors import DiskFull, HQBackupsError, ProducerFailed, UnsafeArchive
from hq_backups.engine.process import Consumer
from hq_backups.engine.streams import PlainReader, write_all

_BATCH = 256 << 10
_DEPTH = 4
"""Batches that wait for each tar: what bounds memory."""
_SINKS = 2
_LARGE = 64 << 10
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_ARGUMENTS = (
    "--extract",
    "--file=-",
    "--blocking-factor=128",
    "--keep-old-files",
    "--no-same-owner",
    "--preserve-permissions",
    "--warning=no-timestamp",
)
_PREFIX = b"0000000\0" * 2
_TAIL = b"0" + bytes(100) + b"ustar  \0" + bytes(247)
_LONG = b"././@LongLink".ljust(100, b"\0") + b"0000644\0" + _PREFIX
_MAX_OCTAL = 8**11
_END = bytes(2 * BLOCK)


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


def header(name: bytes, mode: int, size: int, mtime: int) -> bytes:
    """Return the headers of a file, in GNU tar's own format."""
    long = b""
    if len(name) > 100:
        text = name + b"\0"
        long = _sealed(_LONG + b"%011o\0" % len(text) + b"00000000000\0", b"L" + _TAIL[1:])
        long += text.ljust(padded(len(text)), b"\0")
        name = name[:100]
    length = b"%011o\0" % size if size < _MAX_OCTAL else b"\x80" + size.to_bytes(11, "big")
    mtime = mtime if 0 <= mtime < _MAX_OCTAL else 0
    front = b"%s%07o\0%s%s%011o\0" % (name.ljust(100, b"\0"), mode, _PREFIX, length, mtime)
    return long + _sealed(front, _TAIL)


def _sealed(front: bytes, tail: bytes) -> bytes:
    """Put the checksum between a header's two halves."""
    # A header's bytes add up to less than Adler's modulus.
    total = (isal_zlib.adler32(front + b"        " + tail) & 0xFFFF) - 1
    return b"%s%06o\0 %s" % (front, total, tail)


def unpack(plain: PlainReader, target: Path, root: Root) -> tuple[int, int]:
    """Unpack into the empty directory ``target``; return how many files and directories.

    Raises UnsafeArchive, CorruptBackup and DiskFull.
    """
    files = directories = 0
    with _Sinks(target, plain.name) as sinks:
        made = _Directories(target, plain.name)
        for key, member in blobs(plain, root):
            if member.kind == DIRECTORY:
                directories += bool(key)
                made.make(key, directory_mode(member.mode))
                continue
            made.above(key)
            files += 1
            if member.size >= _LARGE:
                _write(plain, target, key, member)
                continue
            sinks.add(header(key, file_mode(member.mode), member.size, member.mtime))
            for piece in plain.pieces(member.size):
                sinks.add(piece)
            sinks.pad(member.size)
        sinks.finish()
    return files, directories


def _write(plain: PlainReader, target: Path, key: bytes, member: Member) -> None:
    """Make a large file without a tar between: its bytes would be copied twice more."""
    try:
        fd = os.open(os.path.join(os.fsencode(target), key), _NEW, 0o600)
    except (FileExistsError, NotADirectoryError) as error:
        raise UnsafeArchive(f"a path is there twice ({member.shown})", name=plain.name) from error
    try:
        for piece in plain.pieces(member.size):
            write_all(fd, piece, target)
        os.fchmod(fd, file_mode(member.mode))
        os.utime(fd, (member.mtime, member.mtime))
    finally:
        os.close(fd)


class _Directories:
    """Makes directories; only ones that are there as directories are walked through."""

    def __init__(self, target: Path, archive: str) -> None:
        self._target = os.fsencode(target)
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


class _Sinks:
    """Several tars, each with a thread that feeds it; a file goes to one of them whole."""

    def __init__(self, target: Path, archive: str) -> None:
        self._target, self._archive = target, archive
        self._sinks: list[_Sink] = []
        self._current: _Sink
        self._batch = bytearray()

    def add(self, data: bytes | memoryview) -> None:
        """Add bytes of the file that is being written."""
        self._batch += data
        if len(self._batch) >= _BATCH:
            self._current.put(self._batch)
            self._batch = bytearray()

    def pad(self, size: int) -> None:
        """End a file; the next one may go elsewhere."""
        self._batch += bytes(padded(size) - size)
        if len(self._batch) >= _BATCH // 2:
            self._current.put(self._batch)
            self._batch = bytearray()
            self._current = min(self._sinks, key=_Sink.load)

    def finish(self) -> None:
        """Wait until everything is written; raises what a tar failed of."""
        self._current.put(self._batch)
        for sink in self._sinks:
            sink.end()
        for sink in self._sinks:
            sink.finish()

    def __enter__(self) -> _Sinks:
        try:
            for _ in range(_SINKS):
                self._sinks.append(_Sink(self._target, self._archive))
        except BaseException:
            self.__exit__()
            raise
        self._current = self._sinks[0]
        return self

    def __exit__(self, *_: object) -> None:
        for sink in self._sinks:
            sink.close()


class _Sink:
    """One tar that makes files."""

    def __init__(self, target: Path, archive: str) -> None:
        self._target, self._archive = target, archive
        self._tar = Consumer(["tar", *_ARGUMENTS], cwd=target)
        self._waiting: queue.Queue[bytearray | None] = queue.Queue(_DEPTH)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="hqb-tar", daemon=True)
        self._thread.start()

    def load(self) -> int:
        """Return how many batches wait."""
        return self._waiting.qsize()

    def put(self, batch: bytearray) -> None:
        """Hand over a batch; raises what the tar failed of."""
        if self._failure is not None:
            raise self._explained(self._failure)
        self._waiting.put(batch)

    def end(self) -> None:
        """Say that nothing more comes."""
        self._waiting.put(None)

    def finish(self) -> None:
        """Wait for the end; raises what the tar failed of."""
        self._thread.join()
        if self._failure is not None:
            raise self._explained(self._failure)

    def close(self) -> None:
        """End the tar, if it still runs."""
        self._tar.kill()
        while self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._waiting.put_nowait(None)
            self._thread.join(0.01)
        self._tar.close()

    def _run(self) -> None:
        try:
            while (batch := self._waiting.get()) is not None:
                self._tar.write(memoryview(batch))
            self._tar.write(_END)
            self._tar.finish()
        except BaseException as error:
            self._failure = error
            while self._waiting.get() is not None:
                pass

    def _explained(self, failure: BaseException) -> BaseException:
        """Return an error that says what tar's own words mean."""
        said = str(failure.facts.get("stderr", "")) if isinstance(failure, ProducerFailed) else ""
        if "No space left on device" in said or "Disk quota exceeded" in said:
            return DiskFull(path=self._target)
        if "File exists" in said or "Is a directory" in said or "Not a directory" in said:
            first = said.splitlines()[0].removeprefix("tar: ")
            return UnsafeArchive(f"a path is there twice ({first})", name=self._archive)
        if isinstance(failure, HQBackupsError):
            return failure
        return HQBackupsError(f"unpacking failed: {failure}")
