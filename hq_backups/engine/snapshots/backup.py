"""The verb backup: a snapshot is taken, accepted only when it is whole, recorded; then old ones go."""

from __future__ import annotations

import time

from hq_backups.engine import crons, forecast, space
from hq_backups.engine.bucket import open_bucket
from hq_backups.engine.config import to_plain
from hq_backups.engine.errors import (
    Exit,
    HQBackupsError,
    NameInUse,
    RepositoryError,
    UploadFailed,
    UsageError,
)
from hq_backups.engine.events import Events, format_utc, utc_now
from hq_backups.engine.expected import Listed, compare
from hq_backups.engine.locks import StoreLock
from hq_backups.engine.manifest import Manifest
from hq_backups.engine.repository.snapshots import SnapshotRecords, bucket_manifests
from hq_backups.engine.requests import BackupRequest
from hq_backups.engine.snapshots.common import TAKING, describe, failure_words, recover, send_manifest
from hq_backups.engine.snapshots.prune import prune
from hq_backups.engine.stores.base import Prepared, SnapshotStore
from hq_backups.engine.when import local_time


def back_up(store: SnapshotStore, request: BackupRequest, run_id: str, events: Events) -> Exit:
    """Take one snapshot; raises when nothing came of it."""
    if store.settings.s3 and not request.upload:
        raise UsageError(
            f"a snapshot of {store.name} goes straight to the bucket: it cannot be kept on this host",
            hint="Leave --no-upload out.",
        )
    records = SnapshotRecords(store.settings.backup_dir)
    records.prepare(events)
    with StoreLock(records.directory, run_id, "backup"):
        if (old := crons.warning(store.name)) is not None:
            events.warning("old-cron", old)
        events.step("prepare", f"asking {store.name} what it holds")
        prepared = store.prepare(events, dry_run=request.dry_run)
        if not request.dry_run:
            recover(store, records, events)
        if not request.accept_shrink:
            _refuse_shrink(store, records, prepared)
        started = utc_now()
        listed = compare(records.manifests(store.name), store.kept(events))
        _warn_of_missing(store, listed, events)
        taken = {each.name for each in listed}
        name = store.new_name(local_time(started, store.config.timezone), taken)
        if request.dry_run:
            events.step("dry-run", f"would take snapshot {name} of {space.human_bytes(prepared.estimate)}")
            return Exit.OK
        try:
            manifest = record(store, records, name, run_id, request.type, prepared, events)
        except NameInUse:
            # A snapshot that failed today has left something, and would keep the day's name to itself all day.
            name = store.new_name(local_time(started, store.config.timezone), taken | {name})
            events.step("snapshot", f"that name is still in use in some shard: taking {name} instead")
            manifest = record(store, records, name, run_id, request.type, prepared, events)
        failure = _send(store, records, manifest, events)
        if request.prune:
            prune(store, records, events)
        return Exit.OK if failure is None else Exit.UPLOAD_FAILED


def _warn_of_missing(store: SnapshotStore, listed: list[Listed], events: Events) -> None:
    """Say that snapshots are gone: an empty list is also the answer of a repository that was lost."""
    missing = [each.name for each in listed if each.manifest is not None and each.kept is None]
    if missing:
        events.warning(
            "missing",
            f"{len(missing)} snapshots are missing in the repository, {max(missing)} among them: was it lost, or not "
            f"mounted? See: list_backups {store.name}",
        )


def record(
    store: SnapshotStore,
    records: SnapshotRecords,
    name: str,
    run: str,
    type_: str,
    prepared: Prepared,
    events: Events,
) -> Manifest:
    """Take a snapshot and write its manifest; a kill in between is finished by the next run."""
    started, began = utc_now(), time.monotonic()
    facts = {
        "name": name,
        "run": run,
        "type": type_,
        "started_at": format_utc(started),
        "source": to_plain(prepared.source),
    }
    note = records.note(TAKING, run, facts)
    try:
        source = store.take(name, prepared, events)
    except BaseException:
        # What could not be aborted now stays on record for the next run.
        if _is_gone(store, name, events):
            note.unlink()
        raise
    manifest = describe(
        store, name, run, type_, started, source,
        duration=time.monotonic() - began, warnings=events.warnings, tools=prepared.tools,
    )  # fmt: skip
    size, new = space.human_bytes(manifest.size), space.human_bytes(int(source.get("new_bytes") or 0))
    events.step("publish", f"{name} is whole: {size}, {new} of it new")
    records.add(manifest)
    note.unlink()
    events.emit("artifact", manifest=to_plain(manifest), location=dict(manifest.repository))
    return manifest


def _is_gone(store: SnapshotStore, name: str, events: Events) -> bool:
    try:
        return all(each.name != name for each in store.kept(events))
    except HQBackupsError:
        return False


def _refuse_shrink(store: SnapshotStore, records: SnapshotRecords, prepared: Prepared) -> None:
    """Refuse a cluster that lost most of what it held at its last good backup."""
    before = [
        m for m in records.manifests(store.name) if m.env == store.config.env and "partial" not in m.source
    ]
    last = max(before, key=lambda m: m.started_at, default=None)
    forecast.refuse_shrink(last, prepared)
    forecast.refuse_loss(store, last, prepared.estimate, prepared.source)


def _send(
    store: SnapshotStore, records: SnapshotRecords, manifest: Manifest, events: Events
) -> HQBackupsError | None:
    """Put the manifest, and those that earlier runs could not, into the bucket; return what failed."""
    if not store.settings.s3:
        return None
    try:
        # A single object is sent with much patience: whether anybody is there is asked with little.
        open_bucket(store).probe()
        send_manifest(store, manifest)
        send_missing(store, records, events)
    except RepositoryError as error:
        failure = UploadFailed(
            f"its manifest did not reach the bucket: {failure_words(error)}", store=store.name
        )
        events.error(failure)
        return failure
    return None


def send_missing(store: SnapshotStore, records: SnapshotRecords, events: Events) -> Exit:
    """Send every manifest that the bucket lacks. Under the lock."""
    there = {(m.name, m.source.get("uuid")) for m in bucket_manifests(open_bucket(store), store.name)}
    sent = 0
    for manifest in records.manifests(store.name):
        if (manifest.name, manifest.source.get("uuid")) not in there:
            send_manifest(store, manifest)
            sent += 1
    events.step("upload", f"{sent} manifests sent" if sent else "the bucket has every manifest")
    return Exit.OK


def upload(store: SnapshotStore, run_id: str, events: Events) -> Exit:
    """Send the manifests that the bucket lacks; the snapshots are there already."""
    if not store.settings.s3:
        raise UsageError(f"the snapshots of {store.name} lie in a directory, there is nothing to upload")
    records = SnapshotRecords(store.settings.backup_dir)
    records.prepare(events)
    with StoreLock(records.directory, run_id, "upload"):
        try:
            open_bucket(store).probe()
            return send_missing(store, records, events)
        except RepositoryError as error:
            raise UploadFailed(error.message, store=store.name, hint=error.hint or None) from error
