"""Reads an object in ranges, ahead of its reader, and never ends early."""

from __future__ import annotations

import io
import threading
import time
from typing import TYPE_CHECKING, Any

from hq_backups.engine.errors import ObjectMismatch, RepositoryError
from hq_backups.engine.repository.s3_errors import FAILURES, CutAnswer, is_transient, status_of, translate

if TYPE_CHECKING:
    from hq_backups.engine.repository.s3 import S3Repository

RANGE = 8 << 20
FETCHERS = 2
AHEAD = 4
"""Ranges that are fetched, being fetched or being read at once: with RANGE, what bounds memory."""
PIECE = 256 << 10
WORTHWHILE = 4 << 10
"""Bytes that a connection must bring before it breaks off, to be worth the next one."""
_FIRST_DELAY, _LAST_DELAY = 0.25, 15.0


class ObjectReader(io.RawIOBase):
    """One version of an object as a file of exactly ``size`` bytes.

    A reset or a cut body is fetched again from where it broke off. It is at its end only when ``size`` bytes
    were delivered; anything else raises Unreachable, NoSuchObject, ObjectMismatch or RepositoryError.
    """

    def __init__(
        self,
        repo: S3Repository,
        key: str,
        version_id: str | None,
        *,
        size: int,
        etag: str,
        range_size: int = RANGE,
    ) -> None:
        """Begin to fetch."""
        super().__init__()
        self._repo = repo
        self._key = key
        self._size = size
        self._range = range_size
        self._client = repo.one_try_client()
        self._wanted: dict[str, Any] = {"Bucket": repo.bucket, "Key": key}
        if etag:
            self._wanted["IfMatch"] = etag
        if version_id is not None:
            self._wanted["VersionId"] = version_id
        self._count = -(-size // range_size)
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._fetched: dict[int, bytearray] = {}
        self._next = 0
        self._failure: BaseException | None = None
        self._index = 0
        self._at = 0
        self._current: memoryview = memoryview(b"")
        self._threads = [
            threading.Thread(target=self._work, name=f"hqb-download-{n + 1}", daemon=True)
            for n in range(min(FETCHERS, self._count))
        ]
        for thread in self._threads:
            thread.start()

    def readable(self) -> bool:
        """Tell that it can be read."""
        return True

    def tell(self) -> int:
        """Return how many bytes were delivered."""
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        """Fill ``buffer`` as far as is at hand, at least one byte before the end."""
        if self.closed:
            raise ValueError("read of a closed object")
        target = memoryview(buffer).cast("B")
        if not target or self._at >= self._size:
            return 0
        if not self._current:
            self._current = memoryview(self._take())
        n = min(len(target), len(self._current))
        target[:n] = self._current[:n]
        self._current = self._current[n:]
        self._at += n
        return n

    def close(self) -> None:
        """Stop fetching and give the memory back."""
        if not self.closed:
            with self._changed:
                self._stop.set()
                self._fetched.clear()
                self._changed.notify_all()
            self._current = memoryview(b"")
            for thread in self._threads:
                thread.join(1.0)
        super().close()

    def _take(self) -> bytearray:
        """Wait for the next range."""
        with self._changed:
            while self._index not in self._fetched:
                if self._failure is not None:
                    raise self._failure
                self._changed.wait()
            data = self._fetched.pop(self._index)
            self._index += 1
            self._changed.notify_all()
            return data

    def _work(self) -> None:
        try:
            while (index := self._next_range()) is not None:
                data = self._fetch(index)
                if data is None:
                    return
                with self._changed:
                    if not self._stop.is_set():
                        self._fetched[index] = data
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._failure = self._failure or error
                self._changed.notify_all()

    def _next_range(self) -> int | None:
        with self._changed:
            while not self._stop.is_set() and self._failure is None and self._next < self._count:
                # One less than AHEAD: the range that is being read counts too.
                if self._next < self._index + AHEAD - 1:
                    self._next += 1
                    return self._next - 1
                self._changed.wait()
        return None

    def _fetch(self, index: int) -> bytearray | None:
        """Return one range whole; None when the reader was closed meanwhile."""
        begin = index * self._range
        data = bytearray(min(self._range, self._size - begin))
        filled, delay = 0, _FIRST_DELAY
        last_progress = time.monotonic()
        while filled < len(data):
            before = filled
            try:
                filled = self._fill(data, filled, begin)
                error: Exception | None = None
            except (*FAILURES, OSError) as problem:
                filled, error = max(filled, getattr(problem, "filled", filled)), problem
            if self._stop.is_set():
                return None
            if filled == len(data):
                break
            if filled - before >= WORTHWHILE:
                # Where every connection breaks off early, a pause after each would make hours of minutes.
                last_progress, delay = time.monotonic(), 0.0
            self._judge(error, begin + filled, last_progress)
            self._stop.wait(delay)
            delay = min(max(delay * 2, _FIRST_DELAY), _LAST_DELAY)
        return data

    def _fill(self, data: bytearray, filled: int, begin: int) -> int:
        """Read once from where the range is; return how far it came. A body may be cut."""
        first, last = begin + filled, begin + len(data) - 1
        answer = self._client.get_object(**self._wanted, Range=f"bytes={first}-{last}")
        body = answer["Body"]
        try:
            self._check_range(answer, first)
            view = memoryview(data)
            while filled < len(data) and not self._stop.is_set():
                try:
                    piece = body.read(min(PIECE, len(data) - filled))
                except (*FAILURES, OSError) as error:
                    error.filled = filled  # type: ignore[union-attr]
                    raise
                if not piece:
                    break
                view[filled : filled + len(piece)] = piece
                filled += len(piece)
        finally:
            body.close()
        return filled

    def _check_range(self, answer: Any, first: int) -> None:
        told = str(answer.get("ContentRange", ""))
        if not told and "ETag" not in answer:
            raise CutAnswer("GetObject")
        if not told:
            raise RepositoryError(f"the service does not give ranges of {self._key}")
        span, _, total = told.removeprefix("bytes ").partition("/")
        if not span.startswith(f"{first}-"):
            raise RepositoryError(f"asked for bytes from {first} of {self._key}, the service gave {told}")
        if total.isdigit() and int(total) != self._size:
            raise self._mismatch(f"it has {total} bytes, its manifest says {self._size}")

    def _judge(self, error: Exception | None, at: int, last_progress: float) -> None:
        """Raise what is hopeless; return when it is worth another try."""
        if error is not None:
            if status_of(error) == 412:
                raise self._mismatch("it was overwritten while it was read") from error
            if status_of(error) == 416:
                raise self._mismatch(f"it ends before byte {at}") from error
            if not is_transient(error):
                raise translate(error, self._repo.config, self._repo.bucket, self._key) from error
        if time.monotonic() - last_progress < self._repo.network.patience:
            return
        if error is not None:
            raise translate(error, self._repo.config, self._repo.bucket, self._key) from error
        raise RepositoryError(f"{self._key} in {self._repo.bucket} breaks off at byte {at}, again and again")

    def _mismatch(self, message: str) -> ObjectMismatch:
        return ObjectMismatch(
            message,
            key=self._key,
            bucket=self._repo.bucket,
            hint="See what there is now (list_backups --source s3), then restore that.",
        )
