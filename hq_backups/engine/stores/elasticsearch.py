"""Elasticsearch: snapshots that the cluster itself keeps, in a bucket or a shared directory.

The names are those that HQ's own restore_es_snapshot looks for: ``<repository>_<year>_<month>_<day>``, unpadded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from hq_backups.engine import names, space
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
    UsageError,
)
from hq_backups.engine.events import Events
from hq_backups.engine.manifest import Manifest
from hq_backups.engine.requests import RestoreRequest
from hq_backups.engine.stores.base import Kept, Prepared, Situation, SnapshotStore

SHOWN = 20
"""Indices that a message names."""


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
        self._require_space(max((each.size for each in now.values()), default=0))
        source = {
            "cluster": self._about.get("cluster_name"),
            "cluster_uuid": self._about.get("cluster_uuid"),
            "version": self._version,
            "repository": self.repository,
            "indices": {name: {"shards": found[name].shards} for name in opened},
            "closed": closed,
        }
        documents = sum(each.docs for each in now.values())
        return Prepared(
            sum(each.size for each in now.values()),
            {**source, "documents": documents},
            {"elasticsearch": self._version},
        )

    def _require_space(self, largest: int) -> None:
        """Refuse a repository that could become full: from a full one nothing can be deleted any more."""
        if (path := repository.seen_here(self.cluster, self.wanted)) is not None:
            space.require(
                path,
                largest,
                "as much as the largest index has",
                "A full repository cannot even delete its snapshots. Let old ones go while it can "
                f"(prune_backups {self.name}), keep fewer (elasticsearch_backup_days), or enlarge it: df -h {path}",
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
            body |= {"bytes": sizes.get(index, 0), **_documents(before.get(index), after.get(index))}
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
        """Return what the repository holds: its own list, and their times where all can be read."""
        if not repository.require(self.cluster, self.wanted, writing=False):
            if not register:
                events.warning(
                    "not-registered",
                    f"repository {self.repository} is not registered on the cluster {self.cluster.url}: a backup or a "
                    "restore does that",
                )
                return []
            repository.ensure(self.cluster, self.wanted, events, readonly=self._readonly)
        listed = snapshot.listed(self.cluster, self.repository)
        details: dict[str, snapshot.Snapshot] = {}
        unreadable: dict[str, str] = {}
        try:
            details = {s.name: s for s in snapshot.described(self.cluster, self.repository)}
        except ServiceError:
            # One that cannot be read hides all the others: only now each is asked for by itself.
            for each in listed:
                try:
                    found = snapshot.find(self.cluster, self.repository, each.name)
                except ServiceError as error:
                    unreadable[each.name] = (
                        f"its metadata cannot be read: {error.facts.get('reason') or error.message}"
                    )
                else:
                    if found is None:
                        unreadable[each.name] = "its metadata are missing in the repository"
                    else:
                        details[each.name] = found
        return [self._kept(each, details.get(each.name), unreadable.get(each.name)) for each in listed]

    @staticmethod
    def _kept(listed: snapshot.Snapshot, full: snapshot.Snapshot | None, problem: str | None) -> Kept:
        if full is None:
            return Kept(listed.name, listed.uuid, names.day_of_snapshot(listed.name), problem)
        taken = datetime.fromtimestamp(full.started / 1000, UTC) if full.started else None
        return Kept(full.name, full.uuid, taken, problem or full.problem())

    def survey(self, name: str) -> Mapping[str, Any]:
        """Ask what a snapshot holds that somebody else took."""
        found = self._found(name)
        if (problem := found.problem()) is not None:
            raise CorruptBackup(problem, name=name)
        size, new, sizes = self._sizes(name)
        return {
            "version": found.version,
            "repository": self.repository,
            "snapshot": name,
            "uuid": found.uuid,
            "shards": found.shards,
            "indices": {index: {"bytes": sizes.get(index, 0)} for index in found.indices},
            "bytes": size,
            "new_bytes": new,
            "finished": found.ended,
        }

    def _found(self, name: str) -> snapshot.Snapshot:
        try:
            found = snapshot.find(self.cluster, self.repository, name)
        except ServiceError as error:
            if not error.facts.get("status"):
                raise
            why = error.facts.get("reason") or error.message
            raise CorruptBackup(f"its metadata cannot be read: {why}", name=name) from error
        if found is None:
            raise CorruptBackup("the repository does not have it any more", name=name)
        return found

    def _sizes(self, name: str) -> tuple[int, int, dict[str, int]]:
        try:
            return snapshot.sizes(self.cluster, self.repository, name)
        except ServiceError as error:
            if not error.facts.get("status"):
                raise
            why = error.facts.get("reason") or error.message
            raise CorruptBackup(f"the metadata of its shards cannot be read: {why}", name=name) from error

    def remove(self, name: str) -> None:
        """Delete a snapshot."""
        snapshot.delete(self.cluster, self.repository, name)

    def check(self, manifest: Manifest) -> str:
        """Read every metadata file of a snapshot, and compare with the manifest."""
        if not repository.require(self.cluster, self.wanted, writing=False):
            raise CorruptBackup(f"repository {self.repository} is not registered", name=manifest.name)
        found = self._found(manifest.name)
        recorded = manifest.source
        if recorded.get("uuid") and found.uuid != recorded["uuid"]:
            raise CorruptBackup("another snapshot has its name: the uuid differs", name=manifest.name)
        if (problem := found.problem(list(recorded.get("indices") or ()))) is not None:
            raise CorruptBackup(problem, name=manifest.name)
        size, _, _ = self._sizes(manifest.name)
        if recorded.get("bytes") is not None and size != recorded["bytes"]:
            raise CorruptBackup(
                f"it has {size} bytes, its manifest says {recorded['bytes']}", name=manifest.name
            )
        return f"{len(found.indices)} indices, {found.shards} shards; all metadata can be read"

    def parts(self, manifest: Manifest) -> dict[str, int]:
        """Return the indices of a snapshot, and the bytes of each."""
        return {n: int(b.get("bytes") or 0) for n, b in (manifest.source.get("indices") or {}).items()}

    def situation(self, manifest: Manifest, request: RestoreRequest) -> Situation:
        """Look at what is live, what stands in the way, and the nodes' disks."""
        sizes = self.parts(manifest)
        wanted = tuple(request.indices or sizes)
        if unknown := sorted(set(wanted) - set(sizes)):
            raise UsageError(
                f"{manifest.name} does not hold {', '.join(unknown[:5])}",
                hint=f"It holds: {', '.join(sorted(sizes)[:SHOWN])}",
            )
        found = indices.indices(self.cluster)
        named = indices.aliases(found)
        prefix = request.rename_prefix or ""
        for index in wanted:
            target = prefix + index
            if target in named:
                raise PreflightFailed(
                    f"{target} is an alias of {', '.join(named[target][:5])}: no index can take its name",
                    hint="Remove the alias first, or restore with --rename-prefix.",
                )
            if prefix and target in found:
                raise PreflightFailed(
                    f"index {target} is there already", hint="Take another --rename-prefix, or delete it."
                )
        there = [found[n] for n in wanted if n in found] if not prefix else []
        if closed := [i.name for i in there if not i.open]:
            raise PreflightFailed(
                f"these indices are closed, and so cannot be saved first: {', '.join(closed[:SHOWN])}",
                hint="Open them, or delete them when they are of no use, then repeat the command.",
            )
        live = tuple(i.name for i in there if i.health != "red")
        now = indices.stats(self.cluster, live)
        growth = sum(max(0, sizes[n] - now[n].size) if n in now else sizes[n] for n in wanted)
        largest = max((sizes[n] for n in wanted), default=0)
        free = indices.free_bytes(self.cluster)
        return Situation(
            wanted,
            live,
            tuple(i.name for i in there if i.health == "red"),
            {
                "indices": {prefix + n: self._fate(n, found, now, prefix) for n in wanted},
                "aliases": {a: n for a, n in named.items() if set(n) & set(wanted)} if not prefix else {},
            },
            -1 if free is None else free,
            growth + (0 if prefix else largest),
            largest,
        )

    @staticmethod
    def _fate(
        name: str, found: Mapping[str, indices.Index], now: Mapping[str, indices.Stats], prefix: str
    ) -> str:
        if prefix or name not in found:
            return "made anew"
        if name not in now:
            return "replaced; it is red and cannot be saved first"
        return f"replaced, with its {now[name].docs} documents; saved first"

    def try_out(self, manifest: Manifest, part: str, scratch: str, events: Events) -> int:
        """Restore an index under another name, count, delete it."""
        target = _scratch_name(scratch, part)
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


def _documents(before: indices.Stats | None, after: indices.Stats | None) -> dict[str, Any]:
    """Return how many documents a snapshot may hold that was taken between two moments."""
    known = [each for each in (before, after) if each is not None]
    if not known:
        return {}
    counts = [each.docs for each in known]
    # Writers that worked meanwhile may have been caught at any point; without them the number is exact.
    operations = [each.operations for each in known]
    churn = max(operations) - min(operations) if len(known) == 2 else max(counts)
    return {
        "documents": counts[-1],
        "least_documents": max(0, min(counts) - churn),
        "most_documents": max(counts) + churn,
        "quiet": churn == 0,
    }


def _scratch_name(prefix: str, index: str) -> str:
    """Return a name for a trial; Elasticsearch takes 255 bytes at most."""
    return (prefix + index).encode()[:255].decode("utf-8", "ignore")
