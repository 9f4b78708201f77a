"""The request that makes an object appear: put, or complete. Its answer may be lost, or lie.

Conditional writes: https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes.html
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from hq_backups.engine.errors import ForeignObject, ObjectMismatch, RepositoryError, Unreachable
from hq_backups.engine.repository.s3_compare import Sent, bare_etag, compare, encode_crc32, encode_md5
from hq_backups.engine.repository.s3_errors import (
    FAILURES,
    code_of,
    is_corrupted,
    is_transient,
    is_unsupported,
    status_of,
    translate,
)
from hq_backups.engine.repository.s3_object import RUN_METADATA, StoredObject, version
from hq_backups.engine.repository.s3_parts import FileSection, Sums

if TYPE_CHECKING:
    from hq_backups.engine.repository.s3 import S3Repository

ANSWERED_TRIES = 5
"""How often an answer that blames the bytes is met with the same bytes."""


class Write:
    """One write that is tried until it is known whether the object stands."""

    def __init__(
        self,
        repo: S3Repository,
        key: str,
        request: Callable[[Mapping[str, Any]], None],
        stands: Callable[[], StoredObject | None],
        *,
        if_none_match: bool,
        optional: Mapping[str, Any] | None = None,
    ) -> None:
        """Call ``request`` with conditions; ``stands`` returns the object when it is already ours.

        ``optional`` are arguments that a service may not know.
        """
        self._repo = repo
        self._key = key
        self._request = request
        self._stands = stands
        self._condition = {"IfNoneMatch": "*"} if if_none_match else {}
        self._optional = dict(optional or {})
        self._lost_answer = False

    def run(self) -> None:
        """Return when the object stands; raise an explained error when it is known not to."""
        deadline = time.monotonic() + self._repo.network.patience
        delay, corrupted = 0.5, 0
        while True:
            try:
                return self._request({**self._condition, **self._optional})
            except FAILURES as error:
                if self._settled(error):
                    return None
                if is_unsupported(error) and (self._condition or self._optional):
                    self._forget(error)
                    continue
                corrupted += is_corrupted(error)
                again = is_transient(error) or (is_corrupted(error) and corrupted < ANSWERED_TRIES)
                if not again or time.monotonic() + delay > deadline:
                    raise translate(error, self._repo.config, self._repo.bucket, self._key) from error
                self._lost_answer = self._lost_answer or is_transient(error)
            time.sleep(delay * random.uniform(0.5, 1))
            delay = min(delay * 2, 30.0)

    def _forget(self, error: Exception) -> None:
        """Drop what the service does not know; which one it means is rarely said."""
        text = str(error).lower()
        if self._optional and (not self._condition or "checksum" in text):
            self._optional = {}
        else:
            self._condition = {}

    def _settled(self, error: Exception) -> bool:
        """Tell whether the object stands although the answer was an error."""
        refused = code_of(error) == "PreconditionFailed" or status_of(error) == 412
        gone = code_of(error) == "NoSuchUpload"
        if not (refused or gone or is_transient(error)):
            return False
        try:
            ours = self._stands()
        except RepositoryError:
            return False
        if ours is None and refused:
            raise ForeignObject(
                f"{self._key} in bucket {self._repo.bucket} was written by somebody else meanwhile; "
                "it was not overwritten",
                hint="See what it is: list_backups --source s3. Then repeat the command.",
            ) from error
        return ours is not None


def put(
    repo: S3Repository,
    key: str,
    body: bytes | FileSection,
    sums: Sums,
    metadata: Mapping[str, str],
    *,
    if_none_match: bool,
) -> StoredObject:
    """Write an object in one piece and compare it."""
    sent = Sent((sums,), multipart=False)
    told: dict[str, Any] = {}
    extra: dict[str, Any] = {"Metadata": dict(metadata)} if metadata else {}

    def write(conditions: Mapping[str, Any]) -> None:
        if isinstance(body, FileSection):
            body.seek(0)
        answer = client.put_object(
            Bucket=repo.bucket,
            Key=key,
            Body=cast("Any", body),
            ContentLength=sums.length,
            ContentMD5=encode_md5(sums.md5 or b""),
            **extra,
            **conditions,
        )
        told.update(answer)

    def stands() -> StoredObject | None:
        found = repo.head(key)
        same = found is not None and found.size == sent.size and bare_etag(found.etag) == sent.etag
        return found if same else None

    client = repo.one_try_client()
    checksum = {"ChecksumCRC32": encode_crc32(sums.crc32)}
    Write(repo, key, write, stands, if_none_match=if_none_match, optional=checksum).run()
    run = metadata.get(RUN_METADATA)
    return compared(repo, key, sent, told, run, has_crc32="ChecksumCRC32" in told)


def compared(
    repo: S3Repository, key: str, sent: Sent, told: Mapping[str, Any], run: str | None, *, has_crc32: bool
) -> StoredObject:
    """Look at an object that was just written, return it with what proves it; raises ObjectMismatch.

    ``told`` is the answer to the write, ``has_crc32`` whether the service keeps checksums. An object of
    ``run`` that is not what was sent is taken away.
    """
    made = version(told.get("VersionId"))
    stored = _look(repo, key, made)
    for _ in range(2):
        # A HEAD whose headers were cut looks like one of a service without checksums.
        if stored is not None and stored.crc32 is None and has_crc32:
            time.sleep(0.5)
            stored = _look(repo, key, stored.version_id)
    if stored is None:
        raise ObjectMismatch("it is not there", key=key, bucket=repo.bucket)
    try:
        checked = compare(stored, sent, told.get("ChecksumCRC32"))
        # Only where nothing better is known: some services answer a write with another form of ETag.
        if checked == "size" and told.get("ETag") and bare_etag(told["ETag"]) != bare_etag(stored.etag):
            raise ObjectMismatch("its ETag changed after it was written", key=key, bucket=repo.bucket)
        return replace(stored, checked=checked)
    except ObjectMismatch:
        if made is not None or (run is not None and stored.metadata.get(RUN_METADATA) == run):
            which: Any = {"VersionId": made} if made is not None else {}
            with contextlib.suppress(*FAILURES):
                repo.client.delete_object(Bucket=repo.bucket, Key=key, **which)
        raise


def _look(repo: S3Repository, key: str, made: str | None) -> StoredObject | None:
    """Return what stands there; it was written, so a network that fails now is worth some patience."""
    deadline = time.monotonic() + repo.network.patience
    while True:
        try:
            return repo.head(key, made)
        except Unreachable:
            if time.monotonic() > deadline:
                raise
        time.sleep(1.0)
