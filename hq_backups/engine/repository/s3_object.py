"""What a bucket holds: an object's facts, and a manifest that was found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from hq_backups.engine.repository.s3_errors import CutAnswer

RUN_METADATA = "hq-backups-run"
"""Metadata name of the run that sent an object."""


@dataclass(frozen=True)
class StoredObject:
    """One version of one object."""

    bucket: str
    key: str
    version_id: str | None
    size: int
    etag: str
    last_modified: datetime
    checked: str | None = None
    """What it was compared by after an upload: ``crc32``, ``etag`` or ``size``; None when only found."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    crc32: str | None = None
    """As the service tells it: base64, with ``-N`` when it is a checksum of checksums."""
    encrypted: bool = False
    """By a key service: its ETag is no MD5 then."""


@dataclass(frozen=True)
class FoundManifest:
    """One version of one manifest; ``raw`` is None when ``error`` says why it could not be read."""

    key: str
    version_id: str | None
    raw: bytes | None
    error: str | None = None


def version(value: str | None) -> str | None:
    """Return a version id; ``null`` is how services call what has none."""
    return None if value in (None, "", "null") else value


def from_head(bucket: str, key: str, answer: Mapping[str, Any]) -> StoredObject:
    """Return the object that a HeadObject answer describes; raises CutAnswer."""
    if not {"ContentLength", "ETag", "LastModified"} <= answer.keys():
        raise CutAnswer("HeadObject")
    return StoredObject(
        bucket=bucket,
        key=key,
        version_id=version(answer.get("VersionId")),
        size=int(answer["ContentLength"]),
        etag=answer.get("ETag", ""),
        last_modified=answer["LastModified"],
        metadata={name.lower(): text for name, text in answer.get("Metadata", {}).items()},
        crc32=answer.get("ChecksumCRC32"),
        encrypted=has_key_service(answer),
    )


def has_key_service(answer: Mapping[str, Any]) -> bool:
    """Tell whether the ETag in an answer is no MD5 because of encryption."""
    return answer.get("ServerSideEncryption") not in (None, "", "AES256") or "SSECustomerAlgorithm" in answer
