"""Elasticsearch: snapshots that the cluster itself keeps, in a bucket or a shared directory.

The names are those that HQ's own restore_es_snapshot looks for: ``<repository>_<year>_<month>_<day>``, unpadded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

from hq_backups.engine import names
from hq_backups.engine.config import Config, StoreConfig
from hq_backups.engine.elasticsearch import indices, repository, restoring, snapshot
from hq_backups.engine.elasticsearch.client import Address, Cluster
from hq_backups.engine.elasticsearch.repository import Wanted
from hq_backups.engine.elasticsearch.restoring import Expected
from hq_backups.engine.elasticsearch.snapshot import Patience
from hq_backups.engine.errors import (
    ConfigurationError,
    CorruptBackup,
    PreflightFailed,
    ServiceError,
)
from hq_backups.engine.events import Events
from hq_backups.engine.manifest import Manifest
from hq_backups.engine.requests import RestoreRequest
from hq_backups.engine.stores.base import Kept, Prepared, Situation, SnapshotStore
from hq_backups.engine.stores.elasticsearch_holdings import Holdings
from hq_backups.engine.stores.elasticsearch_outlook import SHOWN, Outlook


class Elasticsearch(SnapshotStore):
    """A cluster, and the one repository of it that is ours."""

    name = "elasticsearch"
    mode = "snapshot"
    counted = "documents"

    def __init__(self, config: Config, settings: StoreConfig) -> None:
        """Take the settings; nothing is asked yet."""
        super().__init__(config, settings)
        options = settings.options
        self.repository = str(options["repository"])
        self.patience = Patience(**(options.get("patience") or {}))
        self.cluster = Cluster(
            Address(
                tuple(options["urls"]),
                options.get("username"),
                options.get("password"),
                options.get("ca_file"),
            ),
            **({"read_seconds": options["read_seconds"]} if options.get("read_seconds") else {}),
        )

    @property
    def medium(self) -> str:
        """Return where the repository lies."""
        return "s3" if self.settings.s3 else "local"

    def location(self, name: str) -> dict[str, Any]:
        """Return where a snapshot lies."""
        place = {"bucket": self.settings.bucket} if self.settings.s3 else {"path": self._directory}
        return {
            "kind": "snapshot",
            "medium": self.medium,
            "repository": self.repository,
            "snapshot": name,
            **place,
        }

    @property
    def _readonly(self) -> bool:
        return bool(self.settings.options.get("readonly"))

    @property
    def _directory(self) -> str:
        return str(self.settings.options.get("location") or self.repository)

    @cached_property
    def _about(self) -> Mapping[str, Any]:
        return self.cluster.about

    @property
    def _version(self) -> str:
        return str(self._about["version"].get("number"))

    @property
    def _holdings(self) -> Holdings:
        return Holdings(self.cluster, self.repository)

    @property
    def _outlook(self) -> Outlook:
        return Outlook(self.cluster, self.wanted, self._holdings)

    @cached_property
    def wanted(self) -> Wanted:
        """Return the repository that the settings ask for."""
        if not self.settings.s3:
            return Wanted(self.repository, "fs", {"location": self._directory})
        if not self.settings.bucket:
            raise ConfigurationError(
                "backup_es_s3 is on, but there is no bucket", hint="Set es_snapshot_bucket."
            )
        s3 = self.config.s3
        version = tuple(int(n) for n in self._version.split(".")[:2] if n.isdecimal())
        return Wanted(
            self.repository,
            "s3",
            repository.s3_settings(
                self.settings.bucket, s3.endpoint if s3 else None, s3.region if s3 else None, version=version
            ),
        )

    def prepare(self, events: Events, only: Collection[str] = (), *, dry_run: bool = False) -> Prepared:
        """Check the cluster, its indices, or ``only`` some of them, and the repository."""
        if self._readonly:
            raise PreflightFailed(
                f"es_repository_readonly is set: this cluster writes nothing to {self.repository}",
                hint="Back up on the cluster that writes to it. To restore: --rename-prefix, or delete what is live.",
            )
        if dry_run:
            repository.require(self.cluster, self.wanted, writing=True)
        else:
            # On a small node even a repository's test waits for a snapshot that runs.
            snapshot.wait_for_others(self.cluster, self.patience, events)
            repository.ensure(self.cluster, self.wanted, events)
        found = {n: i for n, i in self._indices().items() if not only or n in only}
        closed = sorted(i.name for i in found.values() if not i.open)
        snapshot.require_whole({i.name: i.health for i in found.values()})
        if closed:
            events.warning(
                "closed",
                f"closed indices are not in the backup: {', '.join(closed[:SHOWN])}; open them, or delete them",
            )
        opened = sorted(i.name for i in found.values() if i.open)
        if not opened:
            raise PreflightFailed(
                "the cluster has no open index: there is nothing to back up",
                hint=f"Is it the right cluster? {self.cluster.url}: list_backups --config",
            )
        now = indices.stats(self.cluster, opened)
        self._outlook.require_repository({name: each.size for name, each in now.items()})
        source = {
            "cluster": self._about.get("cluster_name"),
            "cluster_uuid": self._about.get("cluster_uuid"),
            "version": self._version,
            "repository": self.repository,
            "indices": {n: {"shards": found[n].shards, "replicas": found[n].replicas} for n in opened},
            "closed": closed,
        }
        documents = sum(each.docs for each in now.values())
        return Prepared(
            sum(each.size for each in now.values()),
            {**source, "documents": documents},
            {"elasticsearch": self._version},
        )

    def _indices(self) -> dict[str, indices.Index]:
        return {n: i for n, i in indices.indices(self.cluster).items() if not i.is_scratch}

    def new_name(self, started: datetime, taken: Collection[str], purpose: str = "") -> str:
        """Return the day's name, with the time of day where that is taken or for a ``purpose`` of its own."""
        return names.snapshot_name(self.repository, started, taken, purpose)

    def take(self, name: str, prepared: Prepared, events: Events) -> Mapping[str, Any]:
        """Take a snapshot of the prepared indices, and count what is in them."""
        described = {n: dict(b) for n, b in prepared.source["indices"].items()}
        wanted = sorted(described)
        snapshot.wait_for_others(self.cluster, self.patience, events)
        before = indices.stats(self.cluster, wanted)
        events.step("backup", f"snapshot {name} of {len(wanted)} indices")
        done = snapshot.take(self.cluster, self.repository, name, wanted, self.patience, events)
        after = indices.stats(self.cluster, wanted)
        size, new, sizes = snapshot.sizes(self.cluster, self.repository, name)
        events.progress("snapshot", new, new, final=True)
        for index, body in described.items():
            body |= {"bytes": sizes.get(index, 0), **indices.documents(before.get(index), after.get(index))}
        return {
            **prepared.source,
            "indices": described,
            "snapshot": name,
            "uuid": done.uuid,
            "shards": done.shards,
            "documents": sum(body.get("documents") or 0 for body in described.values()),
            "bytes": size,
            "new_bytes": new,
        }

    def kept(self, events: Events, *, register: bool = False) -> list[Kept]:
        """Return what the repository holds, once it is registered."""
        if not repository.require(self.cluster, self.wanted, writing=False):
            if not register:
                events.warning(
                    "not-registered",
                    f"repository {self.repository} is not registered on the cluster {self.cluster.url}: a backup or a "
                    "restore does that",
                )
                return []
            repository.ensure(self.cluster, self.wanted, events, readonly=self._readonly)
        return self._holdings.kept()

    def survey(self, name: str) -> Mapping[str, Any]:
        """Ask what a snapshot holds that somebody else took."""
        return self._holdings.survey(name)

    def check(self, manifest: Manifest) -> str:
        """Read every metadata file of a snapshot, and compare with the manifest."""
        if not repository.require(self.cluster, self.wanted, writing=False):
            raise CorruptBackup(f"repository {self.repository} is not registered", name=manifest.name)
        return self._holdings.check(manifest)

    def remove(self, name: str) -> None:
        """Delete a snapshot."""
        snapshot.delete(self.cluster, self.repository, name)

    def parts(self, manifest: Manifest) -> dict[str, int]:
        """Return the indices of a snapshot, and the bytes of each."""
        return {n: int(b.get("bytes") or 0) for n, b in (manifest.source.get("indices") or {}).items()}

    def situation(self, manifest: Manifest, request: RestoreRequest) -> Situation:
        """Look at what is live, what stands in the way, and the disks."""
        saves = not request.rename_prefix and not self._readonly
        return self._outlook.situation(manifest, request, self.parts(manifest), saves=saves)

    def present(self, parts: Collection[str]) -> dict[str, str]:
        """Return which indices are there, and the health of each."""
        found = indices.indices(self.cluster)
        return {n: (found[n].health or "?") if found[n].open else "closed" for n in parts if n in found}

    def try_out(self, manifest: Manifest, part: str, scratch: str, events: Events) -> int:
        """Restore an index under another name, count, delete it."""
        target = indices.scratch_name(scratch, part)
        try:
            return self._restore(manifest, part, target, events)
        finally:
            with contextlib.suppress(ServiceError):
                indices.delete(self.cluster, target)

    def put_beside(self, manifest: Manifest, part: str, name: str, events: Events) -> int:
        """Restore an index under another name, to stay."""
        try:
            return self._restore(manifest, part, name, events)
        except BaseException:
            with contextlib.suppress(ServiceError):
                indices.delete(self.cluster, name)
            raise

    def replace(self, manifest: Manifest, part: str, events: Events) -> int:
        """Close the index that is there, and restore over it."""
        there = indices.indices(self.cluster).get(part)
        if there is not None and there.open:
            indices.close(self.cluster, part)
        try:
            return self._restore(manifest, part, part, events)
        except PreflightFailed:
            if there is not None:
                indices.reopen(self.cluster, part)
            raise

    def _restore(self, manifest: Manifest, part: str, target: str, events: Events) -> int:
        body = (manifest.source.get("indices") or {}).get(part) or {}
        expected = Expected(
            part, int(body.get("shards") or 0), body.get("least_documents"), body.get("most_documents")
        )
        return restoring.restore(
            self.cluster, self.repository, manifest.name, expected, target, self.patience, events
        )

    def drop(self, part: str) -> None:
        """Delete an index, by its exact name."""
        indices.delete(self.cluster, part)

    def scratch(self, run: str) -> str:
        """Return the beginning of a run's own index names."""
        return f"{indices.SCRATCH}{run.lower()[:60]}-"

    def clean_scratch(self, prefix: str) -> list[str]:
        """Delete the indices that begin so, one by one."""
        if not prefix.startswith(indices.SCRATCH) or prefix == indices.SCRATCH:
            raise ValueError(f"{prefix!r} is not the beginning of a run's own names")
        left = sorted(n for n in indices.indices(self.cluster) if n.startswith(prefix))
        for name in left:
            indices.delete(self.cluster, name)
        return left

    def next_steps(self, parts: Sequence[str] = ()) -> list[str]:
        """Return what HQ needs after a restore of its indices."""
        env = self.config.env
        return [
            f"commcare-cloud {env} django-manage check_services",
            "Pillows go on from their checkpoints in PostgreSQL, which know nothing of this restore: what was changed "
            "since the snapshot is missing until it is indexed again. Reset their KafkaCheckpoint rows to the time of "
            "the snapshot, or reindex what was restored:",
            f"commcare-cloud {env} django-manage ptop_preindex",
            f"commcare-cloud {env} downtime end",
        ]
