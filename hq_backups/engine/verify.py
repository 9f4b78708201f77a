"""The verb verify: an artifact is read to its end and checked; deep: a server is started on it."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from hq_backups.engine import names, space
from hq_backups.engine.catalog import select
from hq_backups.engine.config import Config
from hq_backups.engine.errors import DiskFull, Exit, Locked
from hq_backups.engine.events import Events, format_utc, utc_now
from hq_backups.engine.locks import FileLock
from hq_backups.engine.manifest import Manifest
from hq_backups.engine.outer import inside
from hq_backups.engine.repository.local import LocalRepository
from hq_backups.engine.requests import VerifyRequest
from hq_backups.engine.snapshots import verify as snapshots
from hq_backups.engine.source import compare, opened
from hq_backups.engine.stores import open_store, open_stream
from hq_backups.engine.stores.base import Destination, SnapshotStore, StreamStore
from hq_backups.engine.survey import describe

SCRATCH = ".verify-"


def verify(config: Config, request: VerifyRequest, run_id: str, events: Events) -> Exit:
    """Verify one artifact; raises CorruptBackup and says what is wrong."""
    store = open_store(config, request.selection.store)
    entry, location = select(store, request.selection, events)
    if isinstance(store, SnapshotStore):
        return snapshots.verify(store, entry, request, run_id, events)
    events.step("verify", f"reading {entry.name} from {location.get('path') or location.get('key')}")
    manifest = describe(config, entry, location, events)
    store = open_stream(config, manifest.store, manifest.mode)
    if request.records and entry.manifest is not None:
        store.expect(request.records)
    if request.deep:
        _deep(store, manifest, dict(location), run_id, events)
    elif entry.manifest is not None:
        with opened(store, location, manifest, events) as plain:
            facts = store.walk(plain, manifest, events)
            digest = plain.digest()
        compare(digest, manifest)
        told = f"{facts.get('members')} members, whole to the end"
        events.emit("check", name="archive", ok=True, message=told)
    if entry.manifest is None:
        events.warning("no-manifest", f"{entry.name} has no manifest: it could be compared with nothing")
    else:
        events.emit("check", name="sha256", ok=True, message="size and sha256 are as the manifest says")
        if location["kind"] == "local":
            # Not to remember it, on a full disk or as another user, is no fault of the backup.
            with contextlib.suppress(OSError, DiskFull):
                repository = LocalRepository(Path(location["path"]).parent)
                repository.record_verified(
                    manifest.name, manifest.sha256, format_utc(utc_now()), deep=request.deep
                )
    events.emit("verified", store=store.name, verified_run=entry.run, name=entry.name, deep=request.deep)
    return Exit.OK


def _deep(
    store: StreamStore, manifest: Manifest, location: dict[str, object], run_id: str, events: Events
) -> None:
    store.check_deep(manifest)
    repository = LocalRepository(store.settings.backup_dir)
    repository.prepare(events)
    clean_scratch(store, repository, events)
    needed = store.unpacked_size(manifest) + (64 << 20)
    space.require(
        repository.directory, needed, "the unpacked copy", "Verify without --deep, or free space there."
    )
    scratch = repository.directory / f"{SCRATCH}{run_id}"
    with FileLock(repository.directory / f"{SCRATCH}{run_id}.lock", run_id, "verify"):
        tree = scratch / "data"
        scratch.mkdir(mode=0o700)
        try:
            tree.mkdir(mode=0o700)
            outer = inside(store.outer(manifest), scratch / names.OUTER)
            for place in outer.values():
                place.mkdir(mode=0o700, parents=True)
            with opened(store, location, manifest, events) as plain:
                store.unpack(plain, Destination(tree, outer), manifest, events)
                compare(plain.digest(), manifest)
            store.check_unpacked(tree, manifest, events)
            store.deep_check(tree, manifest, events)
        finally:
            store.clean_scratch(tree)
            shutil.rmtree(scratch, ignore_errors=True)
            (repository.directory / f"{SCRATCH}{run_id}.lock").unlink(missing_ok=True)


def clean_scratch(store: StreamStore, repository: LocalRepository, events: Events) -> None:
    """Remove the scratch trees of runs that were killed; one that is in use is left alone."""
    for scratch in sorted(repository.directory.glob(f"{SCRATCH}*")):
        if scratch.suffix == ".lock" or not scratch.is_dir():
            continue
        lock = repository.directory / f"{scratch.name}.lock"
        with contextlib.suppress(Locked), FileLock(lock, scratch.name, "clean"):
            store.clean_scratch(scratch / "data")
            shutil.rmtree(scratch, ignore_errors=True)
            lock.unlink(missing_ok=True)
            events.step("recover", f"removed {scratch.name}, left by a verify that died")
