"""Sends a file's parts while it still grows; the last part only after the whole was found good."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from hq_backups.engine.errors import HQBackupsError, ReadBackFailed, RepositoryError
from hq_backups.engine.repository.s3_compare import Sent
from hq_backups.engine.repository.s3_errors import FAILURES, translate
from hq_backups.engine.repository.s3_multipart import Multipart, SentPart
from hq_backups.engine.repository.s3_object import StoredObject
from hq_backups.engine.repository.s3_pace import Pace
from hq_backups.engine.repository.s3_parts import FileSection, Interrupted, part_length, part_size_for

if TYPE_CHECKING:
    from hq_backups.engine.repository.s3 import S3Repository

__all__ = ["FollowingUpload", "part_size_for"]

SENDERS = 2
ABORT_WAIT = 15.0
"""Seconds that an abort waits for a sender that hangs in the network."""


class FollowingUpload:
    """One object's upload, beside whoever writes its file.

    ``on_progress`` (bytes that arrived so far) and ``on_started`` (the multipart upload's id) are called from
    the upload's own threads. Whatever fails is kept in :attr:`failed` and raised by :meth:`finish`.
    """

    def __init__(
        self,
        repo: S3Repository,
        key: str,
        path: Path,
        *,
        size_hint: int | None,
        metadata: dict[str, str],
        limit: int | None = None,
        on_progress: Callable[[int], None] | None = None,
        on_started: Callable[[str], None] | None = None,
        part_size: int | None = None,
    ) -> None:
        """Send nothing yet; ``limit`` is in bytes per second."""
        self.failed: BaseException | None = None
        self._repo = repo
        self._key = key
        self._path = path
        self._metadata = metadata
        self._base = part_size or part_size_for(size_hint)
        self._on_progress = on_progress or (lambda _: None)
        self._stop = threading.Event()
        self._pace = Pace(limit, self._stop) if limit else None
        self._multipart = Multipart(repo, key, metadata, self._stop, on_started or (lambda _: None))
        self._changed = threading.Condition()
        self._size = 0
        self._final: int | None = None
        self._number = 0
        self._offset = 0
        self._arrived = 0
        self._parts: dict[int, SentPart] = {}
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Begin to send ``path``, which must exist and may still grow."""
        try:
            self._file = open(self._path, "rb", buffering=0)  # noqa: SIM115
        except OSError as error:
            self._fail(error)
            return
        for number in range(SENDERS):
            thread = threading.Thread(target=self._work, name=f"hqb-upload-{number + 1}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def advance(self, size: int) -> None:
        """Take note that ``size`` bytes stand on disk; never waits."""
        with self._changed:
            self._size = max(self._size, size)
            self._changed.notify_all()

    def finish(self, size: int, crc32: int, *, if_none_match: bool) -> StoredObject:
        """Send what is left of a file that was found good, complete the object and compare it."""
        with self._changed:
            single = self._number == 0 and size <= self._base
            self._size = self._final = size
            if single:
                self._offset = size
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._raise_failure()
        try:
            stored = (self._put if single else self._complete)(size, crc32, if_none_match)
        except Interrupted as interrupted:
            raise interrupted.cause or RepositoryError("the upload was aborted") from None
        self._file.close()
        return stored

    def abort(self) -> bool:
        """Leave nothing unfinished in the bucket and no thread running; never raises.

        False means that something may be left there, for a later run to abort.
        """
        with self._changed:
            self._stop.set()
            self._changed.notify_all()
        deadline = time.monotonic() + ABORT_WAIT
        for thread in self._threads:
            # A cancel may come while one is being started: that one will find that it must stop.
            with contextlib.suppress(RuntimeError):
                thread.join(max(0.0, deadline - time.monotonic()))
        clean = self._multipart.abort()
        if any(thread.is_alive() for thread in self._threads):
            return False
        if hasattr(self, "_file"):
            self._file.close()
        return clean

    def _raise_failure(self) -> None:
        if self.failed is not None:
            raise self.failed
        if self._stop.is_set():
            raise RepositoryError("the upload was aborted")

    def _fail(self, error: BaseException) -> None:
        if isinstance(error, FAILURES):
            cause = error
            error = translate(error, self._repo.config, self._repo.bucket, self._key)
            error.__cause__ = cause
        elif isinstance(error, OSError) and not isinstance(error, HQBackupsError):
            error = ReadBackFailed(error.strerror or str(error), path=self._path)
        with self._changed:
            self.failed = self.failed or error
            # The other sender need not go on.
            self._stop.set()
            self._changed.notify_all()

    def _work(self) -> None:
        try:
            while (part := self._next_part()) is not None:
                number, offset, length = part
                sent = self._multipart.send(number, self._section(offset, length))
                with self._changed:
                    self._parts[number] = sent
                    self._arrived += length
                    arrived = self._arrived
                self._on_progress(arrived)
        except Interrupted as interrupted:
            if interrupted.cause is not None:
                self._fail(interrupted.cause)
        except BaseException as error:
            self._fail(error)

    def _next_part(self) -> tuple[int, int, int] | None:
        """Return number, offset and length of the next part that may go; None when there is none left."""
        with self._changed:
            while not self._stop.is_set():
                length = part_length(self._number + 1, self._base)
                # Strictly: the last byte stays here until the file has passed its test.
                ready = self._offset + length < self._size
                if self._final is not None:
                    length = min(length, self._final - self._offset)
                    ready = length > 0
                if ready:
                    self._number += 1
                    part = (self._number, self._offset, length)
                    self._offset += length
                    return part
                if self._final is not None:
                    return None
                self._changed.wait()
        return None

    def _section(self, offset: int, length: int) -> FileSection:
        return FileSection(self._file, self._path, offset, length, stop=self._stop, pace=self._pace)

    def _put(self, size: int, crc32: int, if_none_match: bool) -> StoredObject:
        section = self._section(0, size)
        sums = section.sums(md5=True)
        self._check_local(Sent((sums,), multipart=False), size, crc32)
        stored = self._repo.put(
            self._key, section, sums, metadata=self._metadata, if_none_match=if_none_match
        )
        self._on_progress(size)
        return stored

    def _complete(self, size: int, crc32: int, if_none_match: bool) -> StoredObject:
        parts = [self._parts[number] for number in sorted(self._parts)]
        self._check_local(Sent(tuple(part.sums for part in parts), multipart=True), size, crc32)
        return self._multipart.complete(parts, if_none_match=if_none_match)

    def _check_local(self, sent: Sent, size: int, crc32: int) -> None:
        """Compare what was read for the upload with what the writer wrote."""
        if sent.size != size or sent.crc32 != crc32:
            raise ReadBackFailed(
                f"{sent.size} bytes with CRC32 {sent.crc32:08x} were read for the upload, "
                f"{size} with {crc32:08x} were written",
                path=self._path,
            )
