"""The verb verify: a snapshot's metadata are read; deep: every part of it is restored, counted and deleted."""

from __future__ import annotations

import contextlib

from hq_backups.engine.catalog import Entry
from hq_backups.engine.errors import CorruptBackup, DiskFull, Exit, NotEnoughSpace
from hq_backups.engine.events import Events, format_utc, utc_now
from hq_backups.engine.locks import StoreLock
from hq_backups.engine.manifest import Manifest
from hq_backups.engine.repository.snapshots import SnapshotRecords
from hq_backups.engine.requests import RestoreRequest, Selection, VerifyRequest
from hq_backups.engine.snapshots.common import SCRATCH, clean_scratch, survey
from hq_backups.engine.space import human_bytes
from hq_backups.engine.stores.base import SnapshotStore


def verify(store: SnapshotStore, entry: Entry, request: VerifyRequest, run_id: str, events: Events) -> Exit:
    """Verify one snapshot; raises CorruptBackup and says what is wrong."""
    events.step("verify", f"reading the metadata of {entry.name}")
    manifest = entry.manifest or survey(store.config, store, entry.name, entry.taken_at)
    events.emit("check", name="metadata", ok=True, message=store.check(manifest))
    records = SnapshotRecords(store.settings.backup_dir)
    if request.deep:
        records.prepare(events)
        with StoreLock(records.directory, run_id, "verify"):
            clean_scratch(store, records, events)
            _drill(store, records, manifest, run_id, events)
    if entry.manifest is None:
        events.warning(
            "no-manifest", f"{entry.name} has no manifest: its documents were compared with nothing"
        )
    else:
        with contextlib.suppress(OSError, DiskFull):
            at = format_utc(utc_now())
            records.record_verified(manifest.name, manifest.sha256, at, deep=request.deep)
    events.emit("verified", store=store.name, verified_run=entry.run, name=entry.name, deep=request.deep)
    return Exit.OK


def _drill(
    store: SnapshotStore, records: SnapshotRecords, manifest: Manifest, run_id: str, events: Events
) -> None:
    """Restore each part under a name of its own; every damaged one is told, not only the first."""
    sizes = store.parts(manifest)
    beside = RestoreRequest(Selection(store.name, manifest.name), rename_prefix=store.scratch(run_id))
    situation = store.situation(manifest, beside)
    # One at a time: it takes the room of the largest.
    if 0 <= situation.free < situation.largest:
        raise NotEnoughSpace(
            path="the data nodes",
            free=human_bytes(situation.free),
            needed=human_bytes(situation.largest),
            hint="Free space there, or verify without --deep.",
        )
    note = records.note(SCRATCH, run_id, {"prefix": store.scratch(run_id)})
    damaged, done = [], 0
    for part in sorted(sizes):
        try:
            documents = store.try_out(manifest, part, store.scratch(run_id), events)
        except CorruptBackup as error:
            damaged.append(part)
            events.emit("check", name=part, ok=False, message=error.message)
        else:
            events.emit("check", name=part, ok=True, message=f"{documents} documents")
        done += sizes[part]
        events.progress("drill", done, sum(sizes.values()))
    store.clean_scratch(store.scratch(run_id))
    note.unlink()
    if damaged:
        raise CorruptBackup(
            f"{len(damaged)} of {len(sizes)} indices cannot be restored from it: {', '.join(damaged[:10])}",
            name=manifest.name,
            hint="Later snapshots may share its damaged files: verify them with --deep too. When one index's files are "
            "damaged, only a snapshot to a new repository is sure to be whole.",
        )
