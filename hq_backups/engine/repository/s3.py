"""One bucket: asked, listed, read and written, with every failure explained."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from botocore.exceptions import ClientError
from botocore.session import Session

from hq_backups.engine.config import S3Config
from hq_backups.engine.errors import NoSuchBucket, NoSuchObject, RepositoryError
from hq_backups.engine.repository import s3_listing
from hq_backups.engine.repository.s3_client import Network, explained, make_client
from hq_backups.engine.repository.s3_download import ObjectReader
from hq_backups.engine.repository.s3_errors import FAILURES, code_of, is_missing, is_unsupported, translate
from hq_backups.engine.repository.s3_object import FoundManifest, StoredObject, from_head
from hq_backups.engine.repository.s3_parts import FileSection, Sums, mark_sending, sums_of
from hq_backups.engine.repository.s3_write import put

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

__all__ = ["FoundManifest", "S3Repository", "StoredObject"]

_CANNOT_BE_ASKED = {"AccessDenied", "403", "MethodNotAllowed", "405", "NotImplemented", "501"}


class S3Repository:
    """A bucket at an endpoint."""

    def __init__(
        self, config: S3Config, bucket: str, fallback: str | None = None, *, network: Network | None = None
    ) -> None:
        """Touch nothing yet; ``fallback`` is used when only it exists."""
        self.config = config
        self.network = network or Network()
        self.note: str | None = None
        """Why another bucket than the first one is used."""
        self._wanted = bucket
        self._fallback = fallback
        self._chosen: str | None = None if fallback else bucket
        self._lock = threading.Lock()
        self._making = threading.Lock()
        self._session = Session()
        self._clients: dict[tuple[int, float], S3Client] = {}

    @property
    def client(self) -> S3Client:
        """Return the client for small requests, shared by all threads."""
        return self._client(self.network.attempts, self.network.read)

    def one_try_client(self, read: float | None = None) -> S3Client:
        """Return a client that leaves trying again to its caller, shared by all threads."""
        return self._client(1, self.network.read if read is None else read)

    def _client(self, attempts: int, read: float) -> S3Client:
        with self._making:
            if (attempts, read) not in self._clients:
                client = make_client(
                    self.config, self.network, attempts=attempts, read=read, session=self._session
                )
                client.meta.events.register_last("request-created.s3", mark_sending)
                self._clients[attempts, read] = client
            return self._clients[attempts, read]

    @property
    def bucket(self) -> str:
        """Return the name of the bucket that is used; asks only when there are two names, never raises."""
        with self._lock:
            if self._chosen is None and self._fallback is not None:
                self._chosen = self._choose(self._fallback)
            return self._chosen or self._wanted

    def _choose(self, fallback: str) -> str | None:
        """Return the bucket that exists; None, to be asked again, when that cannot be found out."""
        try:
            if self._exists(self._wanted) or not self._exists(fallback):
                return self._wanted
        except FAILURES:
            return None
        self.note = (
            f"bucket {self._wanted} does not exist, {fallback} does and is used; name it in the settings"
        )
        return fallback

    def _exists(self, bucket: str) -> bool:
        try:
            self.client.list_objects_v2(Bucket=bucket, MaxKeys=1)
        except ClientError as error:
            if code_of(error) == "NoSuchBucket":
                return False
            if code_of(error) not in _CANNOT_BE_ASKED:
                raise
        return True

    @contextlib.contextmanager
    def explained(self, key: str | None = None) -> Iterator[None]:
        """Raise what goes wrong inside as errors of ours."""
        with explained(self.config, self.bucket, key):
            yield

    def versioned(self) -> tuple[bool, str | None]:
        """Ask whether the bucket keeps versions; if not, say why it is taken not to."""
        status, reason = self.versioning()
        return status == "Enabled", reason

    def versioning(self) -> tuple[str | None, str | None]:
        """Return the service's word (Enabled, Suspended, Never; None: it cannot be asked) and a reason."""
        try:
            answer: Mapping[str, Any] = self.client.get_bucket_versioning(Bucket=self.bucket)
        except FAILURES as error:
            if code_of(error) in _CANNOT_BE_ASKED or is_unsupported(error):
                return None, f"whether it keeps versions cannot be asked ({code_of(error)})"
            raise translate(error, self.config, self.bucket) from error
        status = str(answer.get("Status") or "Never")
        reasons = {
            "Suspended": "its versioning is suspended",
            "Never": "its versioning was never switched on",
        }
        return status, reasons.get(status)

    def expires_noncurrent(self) -> bool:
        """Tell whether a rule of the bucket deletes versions that are not current any more."""
        try:
            answer: Mapping[str, Any] = self.client.get_bucket_lifecycle_configuration(Bucket=self.bucket)
        except FAILURES as error:
            if code_of(error) == "NoSuchLifecycleConfiguration":
                return False
            raise translate(error, self.config, self.bucket) from error
        rules = answer.get("Rules") or ()
        return any(r.get("Status") == "Enabled" and r.get("NoncurrentVersionExpiration") for r in rules)

    def probe(self, *, write: bool = True) -> None:
        """Find out cheaply that the bucket is there and may be listed and written; leaves nothing in it."""
        key = ".hq_backups-probe"
        with self.explained():
            self.client.list_objects_v2(Bucket=self.bucket, MaxKeys=1)
        if write:
            with self.explained(key):
                upload = self.client.create_multipart_upload(Bucket=self.bucket, Key=key)
                self.client.abort_multipart_upload(Bucket=self.bucket, Key=key, UploadId=upload["UploadId"])

    def head(self, key: str, version_id: str | None = None) -> StoredObject | None:
        """Return an object's facts; None when there is none, which a missing bucket is not."""
        wanted: dict[str, Any] = {"Bucket": self.bucket, "Key": key}
        if version_id is not None:
            wanted["VersionId"] = version_id
        try:
            try:
                return from_head(self.bucket, key, self.client.head_object(**wanted, ChecksumMode="ENABLED"))
            except ClientError as error:
                if not is_unsupported(error):
                    raise
            return from_head(self.bucket, key, self.client.head_object(**wanted))
        except FAILURES as error:
            if not is_missing(error):
                raise translate(error, self.config, self.bucket, key) from error
        # HEAD has no body to say what is missing.
        with self.explained():
            self.client.list_objects_v2(Bucket=self.bucket, MaxKeys=1, Prefix=key)
        return None

    def put(
        self,
        key: str,
        body: bytes | FileSection,
        sums: Sums,
        *,
        metadata: Mapping[str, str] | None = None,
        if_none_match: bool = False,
    ) -> StoredObject:
        """Write an object in one piece and compare it; raises ForeignObject where one stands already."""
        return put(self, key, body, sums, metadata or {}, if_none_match=if_none_match)

    def put_manifest(self, key: str, raw: bytes, *, if_none_match: bool = False) -> StoredObject:
        """Write a manifest and compare it."""
        return self.put(key, raw, sums_of(raw), if_none_match=if_none_match)

    def get_small(self, key: str, version_id: str | None, max_bytes: int) -> bytes:
        """Return a small object whole; raises NoSuchObject, and RepositoryError when it is too large."""
        wanted: dict[str, Any] = {"Bucket": self.bucket, "Key": key}
        if version_id is not None:
            wanted["VersionId"] = version_id
        error: Exception | None = None
        for _ in range(self.network.attempts):
            with self.explained(key):
                answer = self.client.get_object(**wanted)
                size = answer["ContentLength"]
                with contextlib.closing(answer["Body"]) as body:
                    if size > max_bytes:
                        raise RepositoryError(
                            f"{key} has {size} bytes, {max_bytes} are the most that is read"
                        )
                    try:
                        raw: bytes = body.read(max_bytes + 1)
                        if len(raw) == size:
                            return raw
                    except Exception as broken:
                        error = broken
        raise RepositoryError(f"{key} in {self.bucket} broke off while it was read") from error

    def list_manifests(self, prefixes: Sequence[str]) -> Iterator[FoundManifest]:
        """Yield every version of every manifest; one that cannot be read is told, not raised."""
        return s3_listing.manifests(self, prefixes)

    def list_objects(self, prefixes: Sequence[str]) -> Iterator[StoredObject]:
        """Yield every version of everything that is not a manifest; newest first for each key."""
        return s3_listing.objects(self, prefixes)

    def open(
        self, key: str, version_id: str | None = None, *, size: int, etag: str | None = None
    ) -> ObjectReader:
        """Return a reader of exactly ``size`` bytes of one object, fetched ahead in ranges."""
        if etag is None:
            stands = self.head(key, version_id)
            if stands is None:
                raise NoSuchObject(key=key, bucket=self.bucket)
            etag = stands.etag
        return ObjectReader(self, key, version_id, size=size, etag=etag)

    def unfinished_uploads(self, key: str) -> list[tuple[str, datetime]]:
        """Return the ids of the multipart uploads of ``key`` that were neither completed nor aborted."""
        with self.explained(key):
            pages = self.client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self.bucket, Prefix=key
            )
            found = [upload for page in pages for upload in page.get("Uploads", ())]
        return [(u["UploadId"], u["Initiated"]) for u in found if u.get("Key") == key]

    def abort_upload(self, key: str, upload_id: str) -> None:
        """Abort a multipart upload; one that is gone is fine."""
        try:
            self.client.abort_multipart_upload(Bucket=self.bucket, Key=key, UploadId=upload_id)
        except FAILURES as error:
            if code_of(error) == "NoSuchUpload" or is_missing(error):
                return
            failure = translate(error, self.config, self.bucket, key)
            if isinstance(failure, NoSuchBucket):
                return
            raise failure from error
