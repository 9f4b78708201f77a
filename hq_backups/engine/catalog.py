"""All artifacts of all repositories, from their manifests: works with no database at all."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hq_backups.engine import names
from hq_backups.engine.bucket import open_bucket
from hq_backups.engine.errors import (
    BackupNotFound,
    BadManifest,
    CorruptBackup,
    PreflightFailed,
    RepositoryError,
    ServiceError,
)
from hq_backups.engine.events import Events, format_utc
from hq_backups.engine.expected import compare
from hq_backups.engine.manifest import Manifest, load_manifest
from hq_backups.engine.repository.local import LocalArtifact, LocalRepository
from hq_backups.engine.repository.snapshots import SnapshotRecords, bucket_manifests
from hq_backups.engine.requests import CatalogRequest, Selection
from hq_backups.engine.stores.base import SnapshotStore, Store, StreamStore

if TYPE_CHECKING:
    from hq_backups.engine.repository.s3 import FoundManifest, S3Repository


@dataclass(frozen=True)
class Entry:
    """One artifact, wherever it lies."""

    store: str
    mode: str
    type: str
    env: str | None
    host: str | None
    taken_at: str
    """UTC."""
    name: str
    size: int
    sha256: str | None
    managed: bool
    verified_at: str | None
    run: str | None
    locations: tuple[dict[str, Any], ...]
    problem: str | None = None
    manifest: Manifest | None = field(default=None, repr=False)

    @property
    def good(self) -> bool:
        """Tell whether it may be chosen as ``latest``."""
        return self.managed and self.problem is None

    def to_plain(self) -> dict[str, Any]:
        """Return the public JSON form."""
        public = {f: getattr(self, f) for f in self.__dataclass_fields__ if f != "manifest"}
        return {**public, "locations": [dict(place) for place in self.locations]}


def entries(store: Store, request: CatalogRequest, events: Events, *, register: bool = False) -> list[Entry]:
    """Return a store's artifacts, newest first; a bucket that fails is a warning when both were asked for.

    With ``register`` a server is told of its repository where it does not know it yet.
    """
    if isinstance(store, SnapshotStore):
        return _since(merge(_snapshot_entries(store, request, events, register)), request)
    assert isinstance(store, StreamStore)  # noqa: S101 - there are these two kinds
    found: list[Entry] = []
    if request.source in ("local", "all"):
        found += local_entries(store)
    if request.source == "s3" or (request.source == "all" and store.settings.s3):
        try:
            found += bucket_entries(store, events)
        except RepositoryError as error:
            if request.source == "s3":
                raise
            events.warning(
                "bucket-unread", f"the bucket's backups are not listed: {error.message}. {error.hint}"
            )
    return _since(merge(found), request)


def _since(merged: list[Entry], request: CatalogRequest) -> list[Entry]:
    if request.since:
        return [e for e in merged if e.taken_at[:10] >= request.since]
    return merged


def _snapshot_entries(
    store: SnapshotStore, request: CatalogRequest, events: Events, register: bool
) -> list[Entry]:
    """Return what a server's repository holds, and what it should hold by the manifests and does not."""
    if request.source not in (store.medium, "all"):
        return []
    records = SnapshotRecords(store.settings.backup_dir)
    manifests = list(records.manifests(store.name))
    if store.settings.s3:
        try:
            manifests += bucket_manifests(open_bucket(store), store.name)
        except RepositoryError as error:
            events.warning(
                "bucket-unread", f"the bucket's manifests are not read: {error.message}. {error.hint}"
            )
    try:
        kept = store.kept(events, register=register)
    except ServiceError as error:
        if request.source != "all":
            raise
        events.warning("cluster-unread", f"the snapshots are not compared: {error.message}. {error.hint}")
        silent = "the cluster did not answer: whether it is still there is not known"
        return [_managed(m, store.location(m.name), silent, None) for m in manifests]
    found = []
    for each in compare(manifests, kept):
        location, verified = store.location(each.name), None
        if each.manifest is not None:
            verified = records.verified_at(each.manifest)
            found.append(_managed(each.manifest, location, each.problem, verified))
            continue
        old = names.OldName(store.name)
        taken = (each.kept.taken_at if each.kept else None) or datetime.fromtimestamp(0, UTC)
        entry = _unmanaged(old, each.name, 0, taken, location, each.problem)
        found.append(replace(entry, mode=store.mode, env=store.config.env))
    return found


def local_entries(store: StreamStore) -> list[Entry]:
    """Return what lies in the store's backup directory."""
    repository = LocalRepository(store.settings.backup_dir)
    try:
        found = [e for a in repository.found() if (e := _local_entry(a, store)) is not None]
        return found + [e for a in repository.directories() if (e := _local_entry(a, store)) is not None]
    except PermissionError as error:
        raise PreflightFailed(
            f"{repository.directory} cannot be read", hint=f"Run as its owner (sudo -u {store.owner()} …)."
        ) from error


def _local_entry(found: LocalArtifact, store: StreamStore) -> Entry | None:
    location = {"kind": "local", "path": str(found.path)}
    if found.manifest is not None:
        if found.manifest.store != store.name:
            return None
        return _managed(found.manifest, location, found.problem, found.verified_at)
    old = names.recognise(found.path.name)
    if old is None or old.store != store.name:
        return None
    taken = datetime.fromtimestamp(found.mtime, UTC)
    problem = found.problem
    if problem is None and found.path.is_dir():
        problem = store.directory_problem(found.path)
    return _unmanaged(old, found.path.name, found.size, taken, location, problem)


def bucket_entries(store: StreamStore, events: Events) -> list[Entry]:
    """Return what lies in the store's bucket, by its manifests and, without them, by its keys."""
    bucket = open_bucket(store)
    prefix = names.PREFIX[store.name]
    described: list[Entry] = []
    useless: dict[str, str] = {}
    for manifest in bucket.list_manifests([prefix]):
        try:
            described += _described(manifest, store, bucket)
        except BadManifest as error:
            events.warning("bad-manifest", error.message)
            why = f"{error.message}. {error.hint}".strip(". ")
            useless[manifest.key.removesuffix(names.MANIFEST_KEY_SUFFIX)] = why
    objects = list(bucket.list_objects([prefix, *names.OLD_KEY_PREFIXES]))
    there = {(o.key, o.version_id): o for o in objects}
    found = [_compare(entry, there) for entry in described]
    known = {(p["key"], p["version_id"]) for e in described for p in e.locations}
    for each in objects:
        old = names.recognise(each.key.rsplit("/", 1)[-1], is_key=True)
        if (each.key, each.version_id) in known or old is None or old.store != store.name:
            continue
        location = {"kind": "s3", "bucket": bucket.bucket, "key": each.key, "version_id": each.version_id}
        # A manifest that cannot be used does not make its object an old script's.
        problem = useless.get(each.key)
        found.append(_unmanaged(old, each.key, each.size, each.last_modified, location, problem))
    return found


def _described(found: FoundManifest, store: StreamStore, bucket: S3Repository) -> list[Entry]:
    """Return what a manifest in the bucket describes, if it is this store's; raises BadManifest."""
    key = found.key.removesuffix(names.MANIFEST_KEY_SUFFIX)
    if found.raw is None:
        raise BadManifest(found.error or "it could not be read", name=found.key)
    manifest = load_manifest(found.raw, found.key)
    if manifest.repository.get("key") != key:
        raise BadManifest(f"it is about {manifest.repository.get('key')!r}", name=found.key)
    if manifest.store != store.name:
        return []
    version = manifest.repository.get("version_id") or None
    location = {"kind": "s3", "bucket": bucket.bucket, "key": key, "version_id": version}
    return [_managed(manifest, location, None, None)]


def _compare(entry: Entry, there: dict[tuple[str, str | None], Any]) -> Entry:
    """Mark an entry whose object is gone or has another size: it is not a good backup."""
    (place,) = entry.locations
    stored = there.get((place["key"], place["version_id"]))
    if stored is None:
        return replace(entry, problem="its object is not in the bucket")
    if stored.size != entry.size:
        return replace(entry, problem=f"its object has {stored.size} bytes, its manifest says {entry.size}")
    return entry


def _managed(m: Manifest, location: dict[str, Any], problem: str | None, verified_at: str | None) -> Entry:
    if m.surveyed:
        # No run of ours writes that: less would be asked of such an archive.
        problem = problem or "its manifest says that it has none"
    return Entry(
        m.store, m.mode, m.type, m.env, m.host, m.started_at, m.name, m.size, m.sha256, True, verified_at, m.run,
        (location,), problem, m,
    )  # fmt: skip


def _unmanaged(
    old: names.OldName,
    name: str,
    size: int,
    taken: datetime,
    location: dict[str, Any],
    problem: str | None,
) -> Entry:
    return Entry(
        old.store, old.mode, old.type or "manual", old.env, old.host, format_utc(taken), name, size, None, False, None,
        None, (location,), problem, None,
    )  # fmt: skip


def merge(found: Iterable[Entry]) -> list[Entry]:
    """Join what is one artifact in several places; newest first."""
    by_run: dict[tuple[str, str, str], Entry] = {}
    rest: list[Entry] = []
    for entry in found:
        if entry.run is None:
            rest.append(entry)
            continue
        # Two runs of one second have one id, and of blobs that nobody touched one sha256.
        key = entry.run, entry.sha256 or "", entry.name
        known = by_run.get(key)
        if known is None:
            by_run[key] = entry
            continue
        # A damaged copy does not make the other one bad: it is listed by itself.
        if (known.problem is None) != (entry.problem is None):
            rest.append(entry)
            continue
        by_run[key] = replace(
            known,
            locations=known.locations + entry.locations,
            verified_at=known.verified_at or entry.verified_at,
        )
    return sorted([*by_run.values(), *rest], key=lambda e: e.taken_at, reverse=True)


_CONFUSED = {"couch", "blobdb"}


def select(store: Store, selection: Selection, events: Events) -> tuple[Entry, dict[str, Any]]:
    """Find the artifact that is meant, and the place to read it from; raises BackupNotFound."""
    path = Path(selection.name)
    # Some keys begin with a slash too.
    if (
        isinstance(store, StreamStore)
        and path.is_absolute()
        and selection.source != "s3"
        and (os.path.lexists(path) or not store.settings.s3)
    ):
        return _by_path(store, path)
    source = selection.source or (store.medium if isinstance(store, SnapshotStore) else "all")
    request = CatalogRequest((store.name,), source)
    known = entries(store, request, events, register=True)
    try:
        entry = (_latest if selection.name == "latest" else _named)(store, selection, known)
    except BackupNotFound as missing:
        # What a bucket that cannot be read holds is not known: it may be there.
        if request.source == "all" and store.settings.s3:
            try:
                open_bucket(store).probe()
            except RepositoryError as error:
                raise error from missing
        raise
    places = [p for p in entry.locations if selection.source in (None, p["kind"], p.get("medium"))]
    if selection.version_id is not None:
        places = [p for p in places if p.get("version_id") == selection.version_id]
    places.sort(key=lambda p: p["kind"] != "local")
    return entry, places[0]


def _by_path(store: StreamStore, path: Path) -> tuple[Entry, dict[str, Any]]:
    """Return a file, or a bare directory, that may lie anywhere and be called anything."""
    if path.is_dir() and (problem := store.directory_problem(path)) is not None:
        raise CorruptBackup(problem, name=path)
    if not (path.is_dir() or path.is_file()):
        raise BackupNotFound(name=path, store=store.name, near="")
    found = LocalRepository(path.parent).at(path.name)
    entry = _local_entry(found, store)
    if entry is None and found.manifest is None:
        old = names.recognise(path.name)
        # In 2017 the script for CouchDB called its archives blobdb_…: what they hold decides.
        if old is not None and old.store != store.name and {old.store, store.name} != _CONFUSED:
            raise BackupNotFound(name=path, store=store.name, near=f": by its name it is of {old.store}")
        taken = datetime.fromtimestamp(found.mtime, UTC)
        location = {"kind": "local", "path": str(path)}
        nameless = names.OldName(store.name, ext=path.name[path.name.find(".") :])
        entry = _unmanaged(nameless, path.name, found.size, taken, location, found.problem)
    if entry is None:
        raise BackupNotFound(name=path, store=store.name, near=": its manifest is of another store")
    if entry.problem is not None:
        raise CorruptBackup(entry.problem, name=path)
    return entry, entry.locations[0]


def _latest(store: Store, selection: Selection, known: list[Entry]) -> Entry:
    env = store.config.env
    good = [e for e in known if e.good and e.env == env and selection.host in (None, e.host)]
    if not good:
        bad = next((e for e in known if e.managed and e.env == env), None)
        near = f": the newest one, {bad.name}, is not good ({bad.problem})" if bad and bad.problem else ""
        raise BackupNotFound(name="latest", store=store.name, near=near)
    hosts = sorted({e.host for e in good if e.host is not None})
    if len(hosts) > 1:
        raise PreflightFailed(
            f"several hosts have backups of {store.name}: {', '.join(hosts)}",
            hint=f"Choose one: --host {hosts[0]}",
        )
    return good[0]


def _named(store: Store, selection: Selection, known: list[Entry]) -> Entry:
    wanted = selection.name

    def fits(entry: Entry) -> bool:
        keys = {p.get("key") for p in entry.locations}
        versions = {p.get("version_id") for p in entry.locations}
        # A service that keeps its objects as files drops the slash that old keys begin with.
        return (
            (wanted in ({entry.name, entry.run} | keys) or wanted.removeprefix("/") in keys)
            and selection.host in (None, entry.host)
            and (selection.version_id is None or selection.version_id in versions)
        )

    fitting = [e for e in known if fits(e)]
    good = [e for e in fitting if e.problem is None]
    if selection.source == "s3":
        # Two runs of one day have one name, but each its own key.
        good = [e for e in good if any(p.get("key") == wanted for p in e.locations)] or good
    if good:
        hosts = sorted({e.host for e in good if e.host is not None})
        if len(hosts) > 1:
            raise PreflightFailed(
                f"several hosts have a backup {wanted}: {', '.join(hosts)}",
                hint=f"Choose one: --host {hosts[0]}",
            )
        if good[0].managed:
            return good[0]
        # The time of an upload says nothing against the file that was uploaded.
        return next((e for e in good if e.locations[0]["kind"] == "local"), good[0])
    if fitting:
        raise CorruptBackup(str(fitting[0].problem), name=wanted)
    candidates = [n for e in known for n in (e.name, e.run) if n]
    near = get_close_matches(wanted, candidates, n=3, cutoff=0.5)
    raise BackupNotFound(name=wanted, store=store.name, near=f"; near: {', '.join(near)}" if near else "")


def good_local(store: Store) -> list[Manifest]:
    """Return the manifests of the good, managed artifacts of the backup directory, oldest first."""
    found = LocalRepository(store.settings.backup_dir).found()
    good = [a.manifest for a in found if a.manifest is not None and a.problem is None]
    return sorted((m for m in good if m.store == store.name), key=lambda m: m.started_at)
