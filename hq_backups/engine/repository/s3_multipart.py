"""One multipart upload: created, filled with parts that are read again for each try, completed or aborted.

https://docs.aws.amazon.com/AmazonS3/latest/userguide/mpuoverview.html
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar, cast

from botocore.exceptions import ClientError

from hq_backups.engine.errors import ObjectMismatch
from hq_backups.engine.repository.s3_compare import Sent, encode_crc32, encode_md5, part_differs
from hq_backups.engine.repository.s3_errors import (
    FAILURES,
    CutAnswer,
    is_corrupted,
    is_transient,
    is_unsupported,
)
from hq_backups.engine.repository.s3_object import RUN_METADATA, StoredObject, has_key_service
from hq_backups.engine.repository.s3_parts import FileSection, Interrupted, Sums
from hq_backups.engine.repository.s3_write import ANSWERED_TRIES, Write, compared

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

    from hq_backups.engine.repository.s3 import S3Repository

T = TypeVar("T")


@dataclass(frozen=True)
class SentPart:
    """One part that the service has."""

    number: int
    etag: str
    sums: Sums


class Multipart:
    """The service's side of an upload in parts; safe to use from several threads."""

    def __init__(
        self,
        repo: S3Repository,
        key: str,
        metadata: Mapping[str, str],
        stop: threading.Event,
        on_started: Callable[[str], None],
    ) -> None:
        """Create nothing yet; ``on_started`` is told the id as soon as there is one."""
        self._repo = repo
        self._key = key
        self._metadata = dict(metadata)
        self._stop = stop
        self._on_started = on_started
        self._creating = threading.Lock()
        self._upload_id: str | None = None
        self._completed = False
        self._crc_known = False
        self._full_object = False

    @cached_property
    def _client(self) -> S3Client:
        return self._repo.one_try_client()

    def send(self, number: int, section: FileSection) -> SentPart:
        """Send one part until it has arrived; raises Interrupted when stopped."""
        upload_id = self._ensure_created()

        def send() -> SentPart:
            sums = section.sums(md5=not self._crc_known)
            proof: dict[str, Any] = (
                {"ChecksumCRC32": encode_crc32(sums.crc32)}
                if sums.md5 is None
                else {"ContentMD5": encode_md5(sums.md5)}
            )
            answer: Mapping[str, Any] = self._client.upload_part(
                Bucket=self._repo.bucket,
                Key=self._key,
                UploadId=upload_id,
                PartNumber=number,
                Body=cast("Any", section),
                ContentLength=len(section),
                **proof,
            )
            etag = answer.get("ETag", "")
            if not etag:
                raise CutAnswer("UploadPart")
            if part_differs(sums, etag, answer.get("ChecksumCRC32"), has_key_service(answer)):
                message = f"part {number} arrived with other content"
                raise ObjectMismatch(message, key=self._key, bucket=self._repo.bucket)
            return SentPart(number, etag, sums)

        return self._patiently(send)

    def _ensure_created(self) -> str:
        with self._creating:
            if self._upload_id is None:
                answer = self._patiently(self._create)
                self._crc_known = answer.get("ChecksumAlgorithm") == "CRC32"
                self._full_object = answer.get("ChecksumType") == "FULL_OBJECT"
                self._upload_id = str(answer["UploadId"])
                self._on_started(self._upload_id)
            if self._stop.is_set():
                # Whoever stopped us may have looked before there was an id.
                self.abort()
                raise Interrupted
            return self._upload_id

    def _create(self) -> Mapping[str, Any]:
        wanted: dict[str, Any] = {"Bucket": self._repo.bucket, "Key": self._key, "Metadata": self._metadata}
        try:
            return self._client.create_multipart_upload(
                **wanted, ChecksumAlgorithm="CRC32", ChecksumType="FULL_OBJECT"
            )
        except ClientError as error:
            if not (is_unsupported(error) or "checksum" in str(error).lower()):
                raise
        return self._client.create_multipart_upload(**wanted)

    def _patiently(self, request: Callable[[], T]) -> T:
        """Try until it works, it is hopeless, patience ends or the upload is stopped."""
        deadline = time.monotonic() + self._repo.network.patience
        delay, corrupted = 0.5, 0
        while True:
            if self._stop.is_set():
                raise Interrupted
            try:
                return request()
            except (*FAILURES, ObjectMismatch) as error:
                wrong = isinstance(error, ObjectMismatch) or is_corrupted(error)
                corrupted += wrong
                again = corrupted < ANSWERED_TRIES if wrong else is_transient(error)
                if not again or time.monotonic() + delay > deadline:
                    raise
            self._stop.wait(delay * random.uniform(0.5, 1))
            delay = min(delay * 2, 30.0)

    def complete(self, parts: Sequence[SentPart], *, if_none_match: bool) -> StoredObject:
        """Make the object of all its parts and compare it."""
        upload_id = self._ensure_created()
        sent = Sent(tuple(part.sums for part in parts), multipart=True)
        listed: list[Any] = [self._listed(part) for part in parts]
        proof: dict[str, Any] = {}
        if self._full_object:
            proof = {"ChecksumCRC32": encode_crc32(sent.crc32), "ChecksumType": "FULL_OBJECT"}
            proof["MpuObjectSize"] = sent.size
        client = self._repo.one_try_client(self._repo.network.commit)
        told: dict[str, Any] = {}

        def complete(conditions: Mapping[str, Any]) -> None:
            told.update(
                client.complete_multipart_upload(
                    Bucket=self._repo.bucket,
                    Key=self._key,
                    UploadId=upload_id,
                    MultipartUpload={"Parts": listed},
                    **conditions,
                )
            )

        write = Write(
            self._repo,
            self._key,
            complete,
            lambda: self._ours(sent.size),
            if_none_match=if_none_match,
            optional=proof,
        )
        write.run()
        self._completed = True
        run = self._metadata.get(RUN_METADATA)
        return compared(self._repo, self._key, sent, told, run, has_crc32=self._crc_known)

    def _listed(self, part: SentPart) -> dict[str, Any]:
        listed: dict[str, Any] = {"PartNumber": part.number, "ETag": part.etag}
        if self._crc_known:
            listed["ChecksumCRC32"] = encode_crc32(part.sums.crc32)
        return listed

    def _ours(self, size: int) -> StoredObject | None:
        """Return the object when a completion whose answer was lost has made it."""
        run = self._metadata.get(RUN_METADATA)
        stands = self._repo.head(self._key)
        if stands is None or run is None or stands.metadata.get(RUN_METADATA) != run or stands.size != size:
            return None
        return stands

    def abort(self) -> bool:
        """Take the parts away, unless the object was made of them; never raises, tells whether none are left."""
        if self._upload_id is not None and not self._completed:
            try:
                self._repo.abort_upload(self._key, self._upload_id)
            except Exception:
                return False
        return True
