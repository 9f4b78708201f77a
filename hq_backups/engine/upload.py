"""The verb upload: sends the finished local artifacts that the bucket still lacks."""

from __future__ import annotations

from hq_backups.engine.bucket import BucketUpload, open_bucket
from hq_backups.engine.catalog import bucket_entries, good_local
from hq_backups.engine.config import Config
from hq_backups.engine.errors import CorruptBackup, Exit, RepositoryError, UploadFailed
from hq_backups.engine.events import Events
from hq_backups.engine.locks import StoreLock
from hq_backups.engine.manifest import Manifest
from hq_backups.engine.repository.local import LocalRepository, file_sha256
from hq_backups.engine.requests import UploadRequest
from hq_backups.engine.snapshots import backup as snapshots
from hq_backups.engine.stores import open_store
from hq_backups.engine.stores.base import SnapshotStore, StreamStore
from hq_backups.engine.when import local_time


def upload(config: Config, request: UploadRequest, run_id: str, events: Events) -> Exit:
    """Send what is missing, oldest first; raises UploadFailed at the first that does not arrive."""
    store = open_store(config, request.store)
    if isinstance(store, SnapshotStore):
        return snapshots.upload(store, run_id, events)
    repository = LocalRepository(store.settings.backup_dir)
    repository.prepare(events)
    with StoreLock(repository.directory, run_id, "upload"):
        repository.recover(events)
        try:
            open_bucket(store).probe()
            return send_missing(store, repository, events)
        except RepositoryError as error:
            raise UploadFailed(error.message, store=store.name, hint=error.hint or None) from error


def send_missing(store: StreamStore, repository: LocalRepository, events: Events) -> Exit:
    """Send every good local artifact that the bucket lacks. Under the lock."""
    # Two runs can begin in one second, and then have one id.
    there = {(e.run, e.sha256): e for e in bucket_entries(store, events) if e.problem is None}
    newest: dict[str, str] = {}
    for entry in there.values():
        if entry.host == store.config.host:
            newest[entry.type] = max(newest.get(entry.type, ""), entry.taken_at)
    sent = 0
    for manifest in good_local(store):
        if (manifest.run, manifest.sha256) in there:
            continue
        bucket = BucketUpload(store, repository, events)
        local = local_time(manifest.taken_at, store.config.timezone)
        bucket.plan(manifest.name, manifest.run, manifest.type, local, manifest.mode, manifest)
        if bucket.fixed and newest.get(manifest.type, "") > manifest.started_at:
            events.step("upload", f"{manifest.name} stays here: a newer {manifest.type} one is in the bucket")
            continue
        _send(bucket, repository, manifest, events)
        sent += 1
    events.step("upload", f"{sent} sent" if sent else "the bucket has everything")
    return Exit.OK


def _send(bucket: BucketUpload, repository: LocalRepository, manifest: Manifest, events: Events) -> None:
    path = repository.directory / manifest.name
    events.step("upload", f"sending {manifest.name} to {bucket.where}")
    # Never send what could no longer be restored.
    if file_sha256(path) != manifest.sha256:
        raise CorruptBackup("its sha256 is not the recorded one", name=manifest.name)
    bucket.start(path, manifest.size)
    bucket.advance(manifest.size)
    if (failure := bucket.finish(manifest)) is not None:
        raise UploadFailed(getattr(failure, "message", str(failure)), store=manifest.store) from failure
