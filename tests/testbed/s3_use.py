"""Use the product's S3 code on the services of the tests."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

from isal import isal_zlib

from hq_backups.engine.config import S3Config
from hq_backups.engine.repository.s3 import S3Repository
from hq_backups.engine.repository.s3_client import Network
from hq_backups.engine.repository.s3_object import RUN_METADATA
from hq_backups.engine.repository.s3_upload import FollowingUpload
from tests.testbed.s3 import S3Service

PART = 5 << 20
"""The smallest that S3 allows."""
RUN = "20261122T000002Z-pg0-postgres"
IMPATIENT = Network(connect=2.0, read=2.0, attempts=2, patience=4.0, commit=10.0)


def repository(
    service: S3Service,
    bucket: str,
    *,
    endpoint: str | None = None,
    network: Network | None = None,
    **options: Any,
) -> S3Repository:
    """Return a repository with the service's own keys."""
    config = S3Config(service.access_key, service.secret_key, endpoint or service.endpoint)
    return S3Repository(config, bucket, network=network or IMPATIENT, **options)


def noise(size: int, seed: int = 0) -> bytes:
    """Return bytes that look random and are the same each time."""
    return random.Random(seed).randbytes(size)


def following(repo: S3Repository, key: str, path: Path, **options: Any) -> FollowingUpload:
    """Return an upload in the smallest parts."""
    given: dict[str, Any] = {"size_hint": None, "metadata": {RUN_METADATA: RUN}, "part_size": PART, **options}
    return FollowingUpload(repo, key, path, **given)


def started(repo: S3Repository, key: str, path: Path, data: bytes, **options: Any) -> FollowingUpload:
    """Write a file, begin its upload and say that all of it stands on disk."""
    path.write_bytes(data)
    upload = following(repo, key, path, **options)
    upload.start()
    upload.advance(len(data))
    return upload


def send(
    repo: S3Repository, key: str, path: Path, data: bytes, *, if_none_match: bool = False, **options: Any
) -> Any:
    """Upload ``data`` and return the object; what a failure leaves is aborted, as the engine does."""
    upload = started(repo, key, path, data, **options)
    try:
        return upload.finish(len(data), isal_zlib.crc32(data), if_none_match=if_none_match)
    finally:
        upload.abort()


def leftovers(service: S3Service, bucket: str) -> list[str]:
    """Return the keys of unfinished multipart uploads."""
    return [u["Key"] for u in service.client().list_multipart_uploads(Bucket=bucket).get("Uploads", ())]


def keys(service: S3Service, bucket: str) -> list[str]:
    """Return the keys of all objects."""
    return [o["Key"] for o in service.client().list_objects_v2(Bucket=bucket).get("Contents", ())]


def our_threads() -> list[str]:
    """Return the names of the product's threads that run."""
    return [t.name for t in threading.enumerate() if t.name.startswith("hqb-")]
