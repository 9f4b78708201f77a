"""Bytes on their way: into a compressed file that is hashed and read back, and out of one.

Writing: :class:`ArtifactWriter` compresses and writes in a thread of its own, so that the producer's pipe never
waits for the compressor. :class:`ReadBack` follows the growing file from disk: a backup is good only when what it
read is what was written, by size and CRC32. The sha256 that is recorded is of what was read: hashing it before it
was written as well would cost a third of what does not compress. Nor is it unpacked again, for a sixth of the
whole; instead the compressed stream's own trailer is compared with what went into it, and ``verify_backup``
unpacks.

Reading: :class:`PlainReader` turns stored bytes (a file, an object in a bucket) into plain ones, hashing both,
unpacking in a thread of its own, in bounded memory. A restore hashes only what is stored: that it is what was written
is proven by that, that it unpacks to what was packed by the codec's own sum, and a country is waiting.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hq_backups.engine import codecs
from hq_backups.engine.errors import CorruptBackup, DiskFull, HQBackupsError, ReadBackFailed

CHUNK = 1 << 20
MAX_READ = 16 << 20
"""The most that one read returns: tarfile reads headers whole, and their sizes are the archive's word."""
DEPTH = 8
"""Chunks in flight between two threads: what bounds memory."""


SYNC_EVERY = 64 << 20
"""Bytes of an artifact that are brought to the disk at once."""
WRITE_OUT = 4 << 20
"""Bytes of an unpacked file that are handed to the disk at once."""
LARGE = 128 << 10
"""Bytes from which on a file is unpacked piece by piece and handed to the disk by itself."""


class Readable(Protocol):
    """Something with stored bytes."""

    def read(self, n: int, /) -> bytes:
        """Return up to ``n`` bytes; none at the end only."""


@dataclass(frozen=True)
class Written:
    """What went into an artifact, and what was given to the disk."""

    size: int
    crc32: int
    plain_size: int
    plain_sha256: str
    plain_crc32: int


@dataclass(frozen=True)
class Digest:
    """Both sides of an artifact: stored and plain."""

    size: int
    sha256: str
    crc32: int
    plain_size: int
    plain_sha256: str
    """Empty when it was not asked for."""


def write_all(fd: int, data: bytes | memoryview, path: Path) -> None:
    """Write every byte or raise DiskFull."""
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(fd, view) :]
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(path=path.parent) from error
        raise


def write_pieces(fd: int, pieces: Sequence[bytes | memoryview], path: Path) -> None:
    """Write every byte of a few pieces, in one call where the disk takes them at once; raises DiskFull."""
    try:
        written = os.writev(fd, pieces)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(path=path.parent) from error
        raise
    for piece in pieces:
        if written < len(piece):
            write_all(fd, memoryview(piece)[written:], path)
        written = max(0, written - len(piece))


def write_file(fd: int, pieces: Iterable[bytes | memoryview], path: Path) -> None:
    """Write a file of which nothing is there, and have the kernel begin to bring it to the disk; raises DiskFull.

    Left to itself it begins when a tenth of memory is waiting: the disk would be idle first, and waited for later.
    Small files are left to it all the same, which puts many of them into one request.
    """
    begun = written = 0
    for piece in pieces:
        write_all(fd, piece, path)
        written += len(piece)
        if written - begun >= WRITE_OUT:
            _write_out(fd, begun, written - begun)
            begun = written
    if written >= LARGE and written > begun:
        _write_out(fd, begun, written - begun)


def _write_out(fd: int, start: int, length: int) -> None:
    # Linux begins to write what it is told to forget, and forgets only what is written (mm/fadvise.c).
    os.posix_fadvise(fd, start, length, os.POSIX_FADV_DONTNEED)


class _Sync:
    """Brings a file to the disk while it grows: a disk that keeps up is not waited for at the end.

    In a thread of its own, so that neither writing nor reading back stands still meanwhile.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._told = 0
        self._failure: BaseException | None = None
        self._due: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="hqb-sync", daemon=True)
        self._thread.start()

    def advance(self, size: int) -> None:
        """Tell how many bytes stand in the file; raises what the disk answered that did not take some."""
        if self._failure is not None:
            raise self._failure
        if size - self._told >= SYNC_EVERY:
            self._told = size
            self._due.put(True)

    def finish(self) -> None:
        """Stop; raises what the disk answered that did not take some: the kernel tells that once."""
        self.stop()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Stop."""
        self._due.put(False)
        self._thread.join()

    def _run(self) -> None:
        while self._due.get():
            try:
                os.fdatasync(self._fd)
            except BaseException as error:
                self._failure = error
                return


class ArtifactWriter:
    """Hashes, compresses and writes one artifact, in threads of its own, from buffers that it lends out."""

    def __init__(
        self, path: Path, codec: str, level: int, on_written: Callable[[int], None] | None = None
    ) -> None:
        """Create ``path`` (0600, must not exist); ``on_written`` is told the bytes on disk so far."""
        self.path = path
        self.codec = codec
        self._size = self._crc32 = self._plain_size = self._plain_crc32 = 0
        self._plain_sha = hashlib.sha256()
        self._compressor = codecs.compressor(codec, level)
        self._on_written = on_written
        self._failure: BaseException | None = None
        self._free: queue.SimpleQueue[bytearray] = queue.SimpleQueue()
        self._full: queue.SimpleQueue[tuple[bytearray, int] | None] = queue.SimpleQueue()
        self._hashed: queue.SimpleQueue[tuple[bytearray, int] | None] = queue.SimpleQueue()
        for _ in range(DEPTH):
            self._free.put(bytearray(CHUNK))
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        self._sync = _Sync(self._fd)
        self._thread = threading.Thread(target=self._run, name="hqb-writer", daemon=True)
        # Whoever fills the buffers must not wait for a hash: what is read from has a small pipe.
        self._hasher = threading.Thread(target=self._hash, name="hqb-plain-hash", daemon=True)
        for thread in (self._thread, self._hasher):
            thread.start()

    def buffer(self) -> bytearray:
        """Return an empty buffer to fill; waits while the disk or the compressor is behind."""
        buffer = self._free.get()
        if self._failure is not None:
            raise self._failure
        return buffer

    def put(self, buffer: bytearray, length: int) -> None:
        """Take back a buffer whose first ``length`` bytes are to be written."""
        self._full.put((buffer, length))

    def finish(self) -> Written:
        """Write the rest and sync the file; return what went in and what was written."""
        self._stop()
        if self._failure is not None:
            raise self._failure
        return Written(
            self._size,
            self._crc32,
            self._plain_size,
            self._plain_sha.hexdigest(),
            self._plain_crc32,
        )

    def close(self) -> None:
        """Stop the thread and close the file; what was written stays for the caller to remove."""
        self._stop(discard=True)
        self._sync.stop()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _stop(self, *, discard: bool = False) -> None:
        if self._thread.is_alive():
            if discard:
                self._failure = self._failure or HQBackupsError("the artifact was given up")
            self._full.put(None)
            self._hasher.join()
            self._thread.join()

    def _hash(self) -> None:
        while (item := self._full.get()) is not None:
            buffer, length = item
            self._unless_failed(self._take, memoryview(buffer)[:length])
            self._hashed.put(item)
        self._hashed.put(None)

    def _take(self, data: memoryview) -> None:
        self._plain_size += len(data)
        self._plain_crc32 = codecs.crc32(data, self._plain_crc32)
        self._plain_sha.update(data)

    def _run(self) -> None:
        while (item := self._hashed.get()) is not None:
            buffer, length = item
            self._unless_failed(self._pack, memoryview(buffer)[:length])
            self._free.put(buffer)
        self._unless_failed(self._end)

    def _pack(self, data: memoryview) -> None:
        self._store(codecs.pieces(self._compressor, data))

    def _end(self) -> None:
        self._store((self._compressor.flush(),))
        self._sync.finish()
        os.fsync(self._fd)

    def _unless_failed(self, do: Callable[..., None], *args: memoryview) -> None:
        """Do something. Once that failed nothing is done any more, but buffers go round until the end is told."""
        if self._failure is None:
            try:
                do(*args)
            except BaseException as error:
                self._failure = error

    def _store(self, packed: Sequence[bytes | memoryview]) -> None:
        size = sum(map(len, packed))
        if not size:
            return
        for piece in packed:
            self._crc32 = codecs.crc32(piece, self._crc32)
        write_pieces(self._fd, packed, self.path)
        self._size += size
        self._sync.advance(self._size)
        if self._on_written is not None:
            self._on_written(self._size)


class GrowingFile:
    """Reads a file that another thread still writes; end of file is only where the writer said it is."""

    def __init__(self, path: Path) -> None:
        """Open ``path`` for reading."""
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._position = 0
        self._available = 0
        self._final = False
        self._given_up = False
        self._condition = threading.Condition()

    def advance(self, size: int, *, final: bool = False) -> None:
        """Tell how many bytes stand in the file."""
        with self._condition:
            self._available = size
            self._final = self._final or final
            self._condition.notify_all()

    def give_up(self) -> None:
        """Wake the reader: nothing more will come."""
        with self._condition:
            self._given_up = True
            self._condition.notify_all()

    def read(self, n: int) -> bytes:
        """Return up to ``n`` bytes, waiting for them."""
        buffer = bytearray(n)
        return bytes(memoryview(buffer)[: self.readinto(buffer)])

    def readinto(self, buffer: bytearray) -> int:
        """Fill some of ``buffer``, waiting for it; 0 at the end only."""
        n = len(buffer)
        with self._condition:
            # Small reads cost more than they gain while the writer is ahead.
            self._condition.wait_for(
                lambda: self._final or self._given_up or self._available - self._position >= n
            )
            if self._given_up:
                raise HQBackupsError("the artifact was given up")
            wanted = min(n, self._available - self._position)
        if wanted == 0:
            return 0
        with memoryview(buffer)[:wanted] as view:
            count = os.preadv(self._fd, [view], self._position)
        if not count:
            raise ReadBackFailed(
                f"it ends at byte {self._position}, {self._available} were written", path=self.path
            )
        self._position += count
        return count

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._fd)


class ReadBack:
    """Follows an artifact while it is written and proves that what was written can be read from disk."""

    def __init__(self, path: Path) -> None:
        """Start following ``path``."""
        self._file = GrowingFile(path)
        self._sha = hashlib.sha256()
        self._size = self._crc32 = 0
        self._tail = b""
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="hqb-read-back", daemon=True)
        self._thread.start()

    def advance(self, size: int) -> None:
        """Tell how many bytes stand in the file."""
        self._file.advance(size)

    def finish(self, writer: ArtifactWriter) -> Digest:
        """Read the rest and compare it with what ``writer`` wrote; raises ReadBackFailed."""
        written = writer.finish()
        self._file.advance(written.size, final=True)
        self._thread.join()
        self._file.close()
        if self._failure is not None:
            raise ReadBackFailed(str(self._failure), path=writer.path) from self._failure
        if (self._size, self._crc32) != (written.size, written.crc32):
            raise ReadBackFailed("other bytes were read than were written", path=writer.path)
        if not codecs.trailer_agrees(writer.codec, self._tail, written.plain_size, written.plain_crc32):
            raise ReadBackFailed("its compressed stream is not that of what was read", path=writer.path)
        return Digest(
            written.size,
            self._sha.hexdigest(),
            written.crc32,
            written.plain_size,
            written.plain_sha256,
        )

    def close(self) -> None:
        """Stop following."""
        if self._thread.is_alive():
            self._file.give_up()
            self._thread.join()
            self._file.close()

    def _run(self) -> None:
        try:
            buffer = bytearray(CHUNK)
            while count := self._file.readinto(buffer):
                with memoryview(buffer)[:count] as data:
                    self._crc32 = codecs.crc32(data, self._crc32)
                    self._sha.update(data)
                    self._tail = (self._tail + bytes(data[-codecs.TRAILER :]))[-codecs.TRAILER :]
                self._size += count
        except BaseException as error:
            self._failure = error


class PlainReader:
    """Stored bytes in, plain bytes out; hashes both; forward-only file for ``tarfile``.

    ``max_plain`` bounds what an untrusted archive may unpack to. Without ``hash_plain`` only stored bytes are hashed.
    """

    def __init__(
        self,
        source: Readable,
        codec: str,
        name: str,
        *,
        max_plain: int | None = None,
        on_stored: Callable[[int], None] | None = None,
        hash_plain: bool = True,
    ) -> None:
        """Read ``source``, called ``name`` in errors; ``on_stored`` is told the stored bytes read so far."""
        self.name = name
        self._source = source
        self._codec = codec
        self._decompressor = codecs.decompressor(codec)
        self._max_plain = max_plain
        self._on_stored = on_stored
        self._stored_sha = hashlib.sha256()
        self._plain_sha = hashlib.sha256() if hash_plain else None
        self._size = self._crc = self._plain_size = 0
        self._pending = b""
        self._ended = False
        self._chunk = memoryview(b"")
        self._position = 0
        self._unpacked: queue.Queue[bytes | BaseException] = queue.Queue(DEPTH)
        self._ready = self._unpacked
        self._closed = threading.Event()
        self._threads = [threading.Thread(target=self._unpack_ahead, name="hqb-unpack", daemon=True)]
        if self._plain_sha is not None:
            # Unpacking, hashing and whatever the caller does with the bytes take about the same time each.
            self._ready = queue.Queue(DEPTH)
            hasher = threading.Thread(
                target=self._hash_ahead, args=(self._plain_sha,), name="hqb-hash", daemon=True
            )
            self._threads.append(hasher)
        for thread in self._threads:
            thread.start()

    def chunk(self) -> bytes:
        """Return the next plain bytes, however many; none at the end."""
        if self._chunk:
            kept, self._chunk = bytes(self._chunk), memoryview(b"")
            return kept
        item = self._ready.get()
        if isinstance(item, BaseException) or not item:
            # Asked again, it ends again.
            self._ready.put(item)
        if isinstance(item, BaseException):
            raise item
        return item

    def peek(self, n: int) -> bytes:
        """Return the next ``n`` plain bytes, fewer at the end only, and leave them to be read."""
        seen, self._chunk = bytes(self._chunk), memoryview(b"")
        while len(seen) < n and (data := self.chunk()):
            seen += data
        self._chunk = memoryview(seen)
        return seen[:n]

    def read(self, n: int = -1) -> bytes:
        """Return exactly ``n`` plain bytes, fewer at the end only."""
        if not 0 <= n <= MAX_READ:
            raise CorruptBackup(f"a header of {n} bytes is in it", name=self.name)
        if len(self._chunk) >= n:
            out = bytes(self._chunk[:n])
            self._chunk = self._chunk[n:]
        else:
            parts = [self._chunk]
            missing = n - len(self._chunk)
            self._chunk = memoryview(b"")
            while missing:
                data = memoryview(self.chunk())
                if not data:
                    break
                parts.append(data[:missing])
                self._chunk = data[missing:]
                missing -= len(parts[-1])
            out = b"".join(parts)
        self._position += len(out)
        return out

    def pieces(self, n: int) -> Iterator[memoryview]:
        """Yield ``n`` plain bytes without copying them; raises CorruptBackup when there are fewer."""
        while n:
            if not self._chunk:
                self._chunk = memoryview(self.chunk())
                if not self._chunk:
                    raise CorruptBackup("it ends in the middle of a file", name=self.name)
            piece = self._chunk[:n]
            self._chunk = self._chunk[n:]
            self._position += len(piece)
            n -= len(piece)
            yield piece

    def tell(self) -> int:
        """Return how many plain bytes were handed out."""
        return self._position

    def seek(self, position: int) -> int:
        """Skip forward, as tarfile asks; there is no way back."""
        if position < self._position:
            raise ValueError("this stream only goes forward")
        for _ in self.pieces(position - self._position):
            pass
        return self._position

    def digest(self) -> Digest:
        """Read to the end and return what was seen of both sides."""
        self._chunk = memoryview(b"")
        while self.chunk():
            pass
        return Digest(
            self._size,
            self._stored_sha.hexdigest(),
            self._crc,
            self._plain_size,
            self._plain_sha.hexdigest() if self._plain_sha is not None else "",
        )

    def close(self) -> None:
        """Stop unpacking ahead."""
        self._closed.set()
        unpacker, *hashers = self._threads
        while unpacker.is_alive():
            with contextlib.suppress(queue.Empty):
                self._unpacked.get_nowait()
            unpacker.join(0.01)
        for hasher in hashers:
            while hasher.is_alive():
                with contextlib.suppress(queue.Empty):
                    self._ready.get_nowait()
                with contextlib.suppress(queue.Full):
                    self._unpacked.put_nowait(b"")
                hasher.join(0.01)

    def _unpack_ahead(self) -> None:
        try:
            while not self._closed.is_set():
                data = self._unpack()
                self._unpacked.put(data)
                if not data:
                    return
        except BaseException as error:
            self._unpacked.put(error)

    def _hash_ahead(self, sha: hashlib._Hash) -> None:
        while True:
            item = self._unpacked.get()
            if not isinstance(item, BaseException):
                sha.update(item)
            self._ready.put(item)
            if isinstance(item, BaseException) or not item:
                return

    def _unpack(self) -> bytes:
        """Return the next plain bytes: never none before the stream's own end was seen."""
        while not self._ended:
            data = b""
            if self._pending:
                data, self._pending = self._pending, b""
            elif self._decompressor.needs_input or self._decompressor.eof:
                data = self._source.read(CHUNK)
                if not data:
                    self._end()
                    return b""
                self._size += len(data)
                self._stored_sha.update(data)
                self._crc = codecs.crc32(data, self._crc)
                if self._on_stored is not None:
                    self._on_stored(self._size)
            if self._decompressor.eof:
                # One gzip member after another is one stream (RFC 1952).
                self._decompressor = codecs.decompressor(self._codec)
            try:
                plain = self._decompressor.decompress(data, CHUNK)
            except Exception as error:
                raise CorruptBackup(f"it does not unpack ({error})", name=self.name) from error
            if self._decompressor.eof:
                self._pending = self._decompressor.unused_data
            if plain:
                self._plain_size += len(plain)
                if self._max_plain is not None and self._plain_size > self._max_plain:
                    raise CorruptBackup(
                        f"it unpacks to more than the {self._max_plain} bytes it should", name=self.name
                    )
                return plain
        return b""

    def _end(self) -> None:
        if self._codec != "none" and not self._decompressor.eof:
            raise CorruptBackup("it ends before its compressed stream does", name=self.name)
        self._ended = True
