"""What lies in a bucket, page by page: manifests with their content, and everything else."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal

from hq_backups.engine.errors import RepositoryError, Unreachable
from hq_backups.engine.manifest import MAX_BYTES
from hq_backups.engine.names import MANIFEST_KEY_SUFFIX
from hq_backups.engine.repository.s3_object import FoundManifest, StoredObject, version

if TYPE_CHECKING:
    from hq_backups.engine.repository.s3 import S3Repository

READERS = 6
"""Manifests read at once."""
PAGE = 1000
SMALL = 1 << 20
"""Larger manifests are read one at a time, so that memory stays small."""


def manifests(repo: S3Repository, prefixes: Sequence[str]) -> Iterator[FoundManifest]:
    """Yield every version of every manifest under ``prefixes``."""
    found = (o for o in _everything(repo, prefixes) if o.key.endswith(MANIFEST_KEY_SUFFIX))
    waiting: deque[Future[FoundManifest] | StoredObject] = deque()

    def first() -> FoundManifest:
        item = waiting.popleft()
        return _read(repo, item) if isinstance(item, StoredObject) else item.result()

    with ThreadPoolExecutor(READERS, thread_name_prefix="hqb-manifests") as pool:
        try:
            for each in found:
                waiting.append(each if each.size > SMALL else pool.submit(_read, repo, each))
                if len(waiting) > 2 * READERS:
                    yield first()
            while waiting:
                yield first()
        finally:
            for item in waiting:
                if isinstance(item, Future):
                    item.cancel()


def _read(repo: S3Repository, found: StoredObject) -> FoundManifest:
    """Read one manifest; only a service that is gone is an error of the listing itself."""
    if found.size > MAX_BYTES:
        error = f"it has {found.size} bytes, a manifest has {MAX_BYTES} at most"
        return FoundManifest(found.key, found.version_id, None, error)
    try:
        return FoundManifest(
            found.key, found.version_id, repo.get_small(found.key, found.version_id, MAX_BYTES)
        )
    except Unreachable:
        raise
    except RepositoryError as problem:
        return FoundManifest(found.key, found.version_id, None, problem.message)


def objects(repo: S3Repository, prefixes: Sequence[str]) -> Iterator[StoredObject]:
    """Yield every version of every object under ``prefixes`` that is not a manifest."""
    return (o for o in _everything(repo, prefixes) if not o.key.endswith(MANIFEST_KEY_SUFFIX))


def _everything(repo: S3Repository, prefixes: Sequence[str]) -> Iterator[StoredObject]:
    status, _ = repo.versioning()
    seen: set[tuple[str, str | None]] = set()
    for prefix in prefixes:
        for each in _listed(repo, prefix, status):
            if (each.key, each.version_id) not in seen:
                seen.add((each.key, each.version_id))
                yield each


def _listed(repo: S3Repository, prefix: str, status: str | None) -> Iterator[StoredObject]:
    if status == "Never":
        yield from _pages(repo, prefix, "list_objects_v2", "Contents")
        return
    try:
        yield from _pages(repo, prefix, "list_object_versions", "Versions")
    except RepositoryError as error:
        # Versions cannot be asked for at all: what is visible is listed.
        if status is not None or isinstance(error, Unreachable):
            raise
        yield from _pages(repo, prefix, "list_objects_v2", "Contents")


def _pages(
    repo: S3Repository,
    prefix: str,
    operation: Literal["list_objects_v2", "list_object_versions"],
    field: str,
) -> Iterator[StoredObject]:
    bucket = repo.bucket
    with repo.explained():
        paginator: Any = repo.client.get_paginator(operation)
        for page in paginator.paginate(Bucket=bucket, Prefix=prefix, PaginationConfig={"PageSize": PAGE}):
            for item in page.get(field, ()):
                yield _object(bucket, item)


def _object(bucket: str, item: Mapping[str, Any]) -> StoredObject:
    found = item.get("VersionId")
    # An object from before versioning is read without an id while it is the newest.
    null = "null" if found == "null" and not item.get("IsLatest", True) else version(found)
    return StoredObject(
        bucket, item["Key"], null, int(item["Size"]), item.get("ETag", ""), item["LastModified"]
    )
