"""Where an artifact goes in its bucket, and what must not be overwritten there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from hq_backups.engine import names
from hq_backups.engine.errors import ForeignObject, NoSuchObject
from hq_backups.engine.repository.s3_compare import encode_crc32
from hq_backups.engine.repository.s3_object import RUN_METADATA, StoredObject

if TYPE_CHECKING:
    from hq_backups.engine.repository.s3 import S3Repository

MANIFEST_BYTES = 16 << 20


@dataclass(frozen=True)
class KeyPlan:
    """Where an artifact goes."""

    key: str
    fixed: bool
    """The one key per type and host of a bucket that keeps versions."""
    if_none_match: bool
    warnings: tuple[tuple[str, str], ...] = ()
    """Codes and messages."""
    adopt: StoredObject | None = None
    """This run's object, which already stands there whole: a kill came before its manifest."""


@dataclass(frozen=True)
class _Artifact:
    """What is to be placed."""

    store: str
    env: str
    host: str
    run: str
    name: str
    started: datetime
    size: int | None
    crc32: int | None


@dataclass(frozen=True)
class _Owner:
    """What the manifest beside a key says; fields that it does not say are None."""

    env: str | None = None
    host: str | None = None
    run: str | None = None


def plan_key(
    repo: S3Repository,
    *,
    store: str,
    type_: str,
    mode: str,
    codec: str,
    env: str,
    host: str,
    run: str,
    name: str,
    started_local: datetime,
    want_versions: bool,
    size: int | None = None,
    crc32: int | None = None,
) -> KeyPlan:
    """Choose the key of an artifact; raises ForeignObject when only somebody else's is left.

    ``size`` and ``crc32`` are those of a finished artifact: without them nothing is adopted.
    """
    artifact = _Artifact(store, env, host, run, name, started_local, size, crc32)
    versioned, reason = repo.versioned()
    warnings = [("bucket-fallback", repo.note)] if repo.note else []
    if want_versions and versioned:
        key = names.fixed_key(store, type_, host, mode, codec)
        plan = _plan_fixed(repo, key, artifact)
    else:
        if want_versions:
            warnings.append(
                (
                    "bucket-unversioned",
                    f"bucket {repo.bucket} does not keep versions ({reason}): dated keys are used, "
                    "because one key would be one backup. Switch its versioning on, or set "
                    "aws_versioning_enabled: false",
                )
            )
        plan = _plan_dated(repo, artifact)
    return replace(plan, warnings=(*warnings, *plan.warnings))


def _plan_fixed(repo: S3Repository, key: str, artifact: _Artifact) -> KeyPlan:
    stands = repo.head(key)
    owner = _owner(repo, key)
    if owner is not None:
        for ours, theirs, what in (
            (artifact.env, owner.env, "environment"),
            (artifact.host, owner.host, "host"),
        ):
            if theirs is not None and theirs != ours:
                raise ForeignObject(
                    f"{key} in bucket {repo.bucket} belongs to {what} {theirs}, this is {ours}",
                    hint="Give this one its own bucket (…_snapshot_bucket), or another backup_host_name.",
                )
    if stands is not None and _is_ours(stands, artifact):
        return KeyPlan(key, fixed=True, if_none_match=False, adopt=_checked(stands, artifact))
    warnings: tuple[tuple[str, str], ...] = ()
    if stands is not None and owner is None and RUN_METADATA not in stands.metadata:
        message = f"{key} was written by something else and has no manifest; it stays as an older version"
        warnings = (("bucket-unmanaged", message),)
    elif owner == _Owner():
        message = f"the manifest of {key} cannot be read; it stays as an older version"
        warnings = (("bucket-manifest", message),)
    return KeyPlan(key, fixed=True, if_none_match=False, warnings=warnings)


def _plan_dated(repo: S3Repository, artifact: _Artifact) -> KeyPlan:
    tried = []
    for key in _dated_keys(repo, artifact):
        stands = repo.head(key)
        if stands is None and _owner(repo, key) is None:
            return KeyPlan(key, fixed=False, if_none_match=True)
        if stands is not None and _is_ours(stands, artifact):
            return KeyPlan(key, fixed=False, if_none_match=True, adopt=_checked(stands, artifact))
        tried.append(key)
    raise ForeignObject(
        f"bucket {repo.bucket} already has {' and '.join(tried)}, which are not overwritten",
        hint="Repeat the command a second later; if that does not help, look who else writes to this bucket.",
    )


def _dated_keys(repo: S3Repository, artifact: _Artifact) -> Iterator[str]:
    """Yield the keys that may be used, best first."""
    host: str | None = artifact.host
    if artifact.store == "postgres":
        # Its name carries the environment: the host is needed only beside another host's.
        yield artifact.name
        owner = _owner(repo, artifact.name)
        if owner is None or owner.host in (None, artifact.host):
            host = None
    if host is not None:
        yield names.dated_key(artifact.name, host=host)
    yield names.dated_key(artifact.name, host=host, time=artifact.started)
    if host is None:
        yield names.dated_key(artifact.name, host=artifact.host, time=artifact.started)


def _owner(repo: S3Repository, key: str) -> _Owner | None:
    """Return whom the manifest of ``key`` names; None when there is no manifest.

    Read loosely: a newer schema still says whose it is.
    """
    try:
        raw = repo.get_small(key + names.MANIFEST_KEY_SUFFIX, None, MANIFEST_BYTES)
    except NoSuchObject:
        return None
    try:
        said: Any = json.loads(raw)
    except (ValueError, RecursionError):
        return _Owner()
    if not isinstance(said, dict):
        return _Owner()
    env, host, run = (
        value if isinstance(value := said.get(n), str) else None for n in ("env", "host", "run")
    )
    return _Owner(env, host, run)


def _is_ours(stands: StoredObject, artifact: _Artifact) -> bool:
    """Tell whether what stands there is this very artifact, whole."""
    if stands.metadata.get(RUN_METADATA) != artifact.run or stands.size != artifact.size:
        return False
    return not _has_whole_crc32(stands) or artifact.crc32 is None or _fits(stands, artifact)


def _has_whole_crc32(stands: StoredObject) -> bool:
    return stands.crc32 is not None and "-" not in stands.crc32


def _fits(stands: StoredObject, artifact: _Artifact) -> bool:
    return artifact.crc32 is not None and stands.crc32 == encode_crc32(artifact.crc32)


def _checked(stands: StoredObject, artifact: _Artifact) -> StoredObject:
    return replace(stands, checked="crc32" if _fits(stands, artifact) else "size")
