"""The verb prune: our own snapshots that retention no longer asks for are deleted, one by one."""

from __future__ import annotations

import dataclasses
from datetime import date

from hq_backups.engine import retention
from hq_backups.engine.bucket import open_bucket
from hq_backups.engine.errors import Exit, HQBackupsError
from hq_backups.engine.events import Events, utc_now
from hq_backups.engine.expected import Listed, compare
from hq_backups.engine.locks import StoreLock
from hq_backups.engine.repository.snapshots import SnapshotRecords, forget_in_bucket
from hq_backups.engine.requests import PruneRequest
from hq_backups.engine.snapshots.common import recover
from hq_backups.engine.stores.base import SnapshotStore
from hq_backups.engine.when import local_time


def prune_verb(store: SnapshotStore, request: PruneRequest, run_id: str, events: Events) -> Exit:
    """Prune by itself."""
    records = SnapshotRecords(store.settings.backup_dir)
    records.prepare(events)
    with StoreLock(records.directory, run_id, "prune"):
        if not request.dry_run:
            recover(store, records, events)
        prune(store, records, events, manual_older_than=request.manual_older_than, dry_run=request.dry_run)
    return Exit.OK


def prune(
    store: SnapshotStore,
    records: SnapshotRecords,
    events: Events,
    *,
    manual_older_than: int | None = None,
    dry_run: bool = False,
) -> None:
    """Decide by retention's rules; what cannot be deleted now is a warning, and tried again by the next run."""
    now = utc_now()
    ours = [each for each in compare(records.manifests(store.name), store.kept(events)) if each.manifest]
    decisions = retention.decide(
        [a for each in ours if (a := _artifact(each)) is not None],
        store.settings.retention,
        today=local_time(now, store.config.timezone).date(),
        now=now,
        manual_older_than=manual_older_than,
    )
    there = {each.name for each in ours if each.kept is not None}
    for decision in decisions:
        name = decision.artifact.name
        if decision.keep:
            events.emit("kept", name=name, reason=decision.reason)
            continue
        if not dry_run:
            try:
                if name in there:
                    store.remove(name)
                _forget(store, records, name, events)
            except HQBackupsError as error:
                # One failure is everybody's: a snapshot runs, or the repository is full.
                events.warning(
                    "prune", f"{name} could not be deleted, the next run tries again: {error.message}"
                )
                return
        events.emit("pruned", name=name, reason=decision.reason, dry_run=dry_run)


def _forget(store: SnapshotStore, records: SnapshotRecords, name: str, events: Events) -> None:
    records.drop(name)
    if not store.settings.s3:
        return
    try:
        forget_in_bucket(open_bucket(store), name)
    except HQBackupsError as error:
        events.warning("prune", f"the manifest of {name} stays in the bucket: {error.message}")


def _artifact(each: Listed) -> retention.Artifact | None:
    manifest = each.manifest
    if manifest is None:
        return None
    artifact = retention.Artifact(
        name=manifest.name,
        type=manifest.type,
        local_date=date.fromisoformat(manifest.local_date),
        taken_at=manifest.taken_at,
        good=each.problem is None,
        managed=True,
        host=manifest.host,
        env=manifest.env,
        store=manifest.store,
    )
    # There is one number of days, for whatever the schedule made.
    return artifact if manifest.type == "manual" else dataclasses.replace(artifact, type="daily")
