"""The manifests of snapshots that a server keeps itself: here, and in the bucket beside them.

They are what is expected to be there. A repository that was lost answers with an empty list, and nothing else
would notice.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hq_backups.engine import names
from hq_backups.engine.errors import BadManifest, NoSuchObject
from hq_backups.engine.manifest import Manifest, load_manifest
from hq_backups.engine.repository.local import LocalRepository

if TYPE_CHECKING:
    from hq_backups.engine.repository.s3 import S3Repository

BUCKET_PREFIX = "hq_backups/manifests/"
"""Elasticsearch keeps its own files at the bucket's root, in ``indices/`` and ``tests-…/``: never here."""
_NOTE = ".note.json"


class SnapshotRecords(LocalRepository):
    """The directory of one store's manifests; a snapshot has no file beside its own."""

    def manifests(self, store: str) -> Iterator[Manifest]:
        """Yield every manifest of ``store`` that can be read."""
        with contextlib.suppress(FileNotFoundError):
            for path in sorted(self.directory.glob(".*.json")):
                if path.name.endswith((_NOTE, ".verified.json", ".pending.json", ".upload.json")):
                    continue
                with contextlib.suppress(BadManifest, OSError):
                    manifest = load_manifest(path.read_bytes(), path.name)
                    if manifest.store == store and names.manifest_name(manifest.name) == path.name:
                        yield manifest

    def add(self, manifest: Manifest) -> None:
        """Write a manifest."""
        self.write_atomically(self.directory / names.manifest_name(manifest.name), manifest.to_json())

    def drop(self, name: str) -> None:
        """Forget a snapshot that is gone."""
        for path in (names.manifest_name(name), f".{name}.verified.json"):
            (self.directory / path).unlink(missing_ok=True)

    def verified_at(self, manifest: Manifest) -> str | None:
        """Return when a snapshot was verified last."""
        return self._verified_at(manifest)

    def note(self, kind: str, run: str, facts: dict[str, Any]) -> Path:
        """Remember what a run is about to do, for the one after it if it is killed; return where."""
        path = self.directory / f".{run}.{kind}{_NOTE}"
        self.write_atomically(path, json.dumps(facts).encode())
        return path

    def notes(self, kind: str) -> list[tuple[Path, dict[str, Any]]]:
        """Return what runs have noted and not taken back, oldest first; of one that cannot be read, nothing."""
        found = []
        for path in sorted(self.directory.glob(f".*.{kind}{_NOTE}")):
            facts: Any = None
            with contextlib.suppress(OSError, ValueError):
                facts = json.loads(path.read_bytes())
            found.append((path, facts if isinstance(facts, dict) else {}))
        return found


def bucket_key(name: str) -> str:
    """Return where a snapshot's manifest lies in the bucket."""
    return f"{BUCKET_PREFIX}{name}{names.MANIFEST_KEY_SUFFIX}"


def bucket_manifests(bucket: S3Repository, store: str) -> list[Manifest]:
    """Return the manifests in a bucket; raises RepositoryError when it cannot be read."""
    found = []
    for each in bucket.list_manifests([BUCKET_PREFIX]):
        if each.raw is None:
            continue
        with contextlib.suppress(BadManifest, NoSuchObject):
            manifest = load_manifest(each.raw, each.key)
            if manifest.store == store and bucket_key(manifest.name) == each.key:
                found.append(manifest)
    return found


def forget_in_bucket(bucket: S3Repository, name: str) -> None:
    """Remove a manifest from the bucket."""
    key = bucket_key(name)
    with bucket.explained(key):
        bucket.client.delete_object(Bucket=bucket.bucket, Key=key)
