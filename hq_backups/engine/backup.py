"""The verb backup: one pass from the store to the disk and the bucket, tested, published, pruned.

The order is the promise: stream ended well → file synced → read back → published → last part sent →
object compared → its manifest → prune. Whatever fails before ``publish`` leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from hq_backups.engine import crons, forecast, mirror, names, space
from hq_backups.engine.bucket import BucketUpload
from hq_backups.engine.catalog import good_local
from hq_backups.engine.config import Config, to_plain
from hq_backups.engine.errors import Exit, HQBackupsError, UploadFailed
from hq_backups.engine.events import Events, format_utc, utc_now
from hq_backups.engine.locks import StoreLock
from hq_backups.engine.manifest import Manifest
from hq_backups.engine.prune import prune
from hq_backups.engine.repository.local import LocalRepository
from hq_backups.engine.requests import BackupRequest
from hq_backups.engine.snapshots import backup as snapshots
from hq_backups.engine.stores import open_store
from hq_backups.engine.stores.base import Prepared, SnapshotStore, Stream, StreamStore
from hq_backups.engine.streams import ArtifactWriter, Digest, ReadBack
from hq_backups.engine.upload import send_missing
from hq_backups.engine.verify import clean_scratch
from hq_backups.engine.when import local_time


@dataclass(frozen=True)
class Run:
    """One attempt: who, what and when."""

    id: str
    store: str
    type: str
    started: datetime
    """UTC."""
    local: datetime
    """The same moment in the host's time zone, which names and retention go by."""


def back_up(config: Config, request: BackupRequest, run_id: str, events: Events) -> Exit:
    """Make one artifact; raises when nothing came of it, returns UPLOAD_FAILED when only the local copy did."""
    store = open_store(config, request.store)
    if isinstance(store, SnapshotStore):
        return snapshots.back_up(store, request, run_id, events)
    started = utc_now()
    run = Run(run_id, store.name, request.type, started, local_time(started, config.timezone))
    repository = LocalRepository(store.settings.backup_dir)
    repository.prepare(events)
    with StoreLock(repository.directory, run.id, "backup"):
        if not request.dry_run:
            repository.recover(events)
            clean_scratch(store, repository, events)
        if (old := crons.warning(store.name)) is not None:
            events.warning("old-cron", old)
        name = names.local_name(store.name, config.env, run.type, run.local, store.mode, config.compression)
        events.step("prepare", f"asking {store.name} what it holds")
        # The bucket is asked meanwhile: both answer from elsewhere.
        with ThreadPoolExecutor(1, "hqb-bucket") as pool:
            opening = (
                pool.submit(_open_bucket, store, run, name, repository, events, request.dry_run)
                if request.upload
                else None
            )
            last = forecast.newest_good(store)
            prepared = store.prepare(last, events)
            bucket = opening.result() if opening is not None else None
        forecast.require_space(repository, last, prepared, events)
        if not request.accept_shrink:
            forecast.refuse_shrink(last, prepared)
        if request.accept_bad_pages:
            events.warning(
                "bad-pages",
                "as asked, no page's checksum is looked at: what is damaged in the store is so here too",
            )
        if request.dry_run:
            where = f" and {bucket.where}" if bucket is not None else ""
            events.step("dry-run", f"would write {repository.directory / name}{where}")
            return Exit.OK
        manifest = _make(store, prepared, run, name, repository, bucket, last, request, events)
        failure = bucket.finish(manifest) if bucket is not None else None
        if bucket is not None and failure is None:
            failure = _send_older(store, repository, run, events)
        if failure is not None:
            events.error(UploadFailed(_reason(failure), store=store.name))
        if request.prune:
            prune(store, repository, events, extra_days=0 if failure is None else 1)
        if request.upload:
            mirror.copy(store, repository.directory, events)
        return Exit.OK if failure is None else Exit.UPLOAD_FAILED


def _send_older(
    store: StreamStore, repository: LocalRepository, run: Run, events: Events
) -> HQBackupsError | None:
    """Send what earlier runs could not; return what failed."""
    if all(m.run == run.id for m in good_local(store)):
        return None
    try:
        send_missing(store, repository, events)
    except HQBackupsError as error:
        return error
    return None


def _open_bucket(
    store: StreamStore, run: Run, name: str, repository: LocalRepository, events: Events, dry_run: bool
) -> BucketUpload | None:
    """Open the store's bucket, if it has one, and choose the key; raises ForeignObject."""
    if not store.settings.s3:
        return None
    bucket = BucketUpload(store, repository, events, tidy=not dry_run)
    bucket.plan(name, run.id, run.type, run.local, store.mode)
    return bucket


def _reason(failure: BaseException) -> str:
    if isinstance(failure, HQBackupsError):
        return f"{failure.message}. {failure.hint}".strip(". ")
    return str(failure) or repr(failure)


def _make(
    store: StreamStore,
    prepared: Prepared,
    run: Run,
    name: str,
    repository: LocalRepository,
    bucket: BucketUpload | None,
    last: Manifest | None,
    request: BackupRequest,
    events: Events,
) -> Manifest:
    """Write, test and publish the artifact; whatever goes wrong, its half is removed."""
    began = time.monotonic()
    partial = repository.partial(run.id)
    try:
        digest, facts = _write(store, prepared, run, partial, bucket, request.accept_bad_pages, events)
        if not request.accept_shrink:
            # Nothing is published yet, and the upload not completed.
            forecast.refuse_loss(store, last, digest.plain_size, facts)
        manifest = Manifest(
            store=store.name,
            mode=store.mode,
            type=run.type,
            env=store.config.env,
            host=store.config.host,
            run=run.id,
            started_at=format_utc(run.started),
            finished_at=format_utc(utc_now()),
            local_date=f"{run.local:%Y-%m-%d}",
            name=name,
            size=digest.size,
            sha256=digest.sha256,
            crc32=f"{digest.crc32:08x}",
            plain_size=digest.plain_size,
            plain_sha256=digest.plain_sha256,
            codec=store.config.compression,
            source={**prepared.source, **facts},
            tools=dict(prepared.tools),
            duration=round(time.monotonic() - began, 3),
            warnings=list(events.warnings),
            repository={"kind": "local", "path": str(repository.directory / name)},
        )
        events.step("publish", f"{name} is whole: {space.human_bytes(digest.size)}")
        repository.publish(manifest)
    except BaseException:
        if bucket is not None:
            bucket.abort()
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    events.emit("artifact", manifest=to_plain(manifest), location=dict(manifest.repository))
    return manifest


def _write(
    store: StreamStore,
    prepared: Prepared,
    run: Run,
    partial: Path,
    bucket: BucketUpload | None,
    accept_bad_pages: bool,
    events: Events,
) -> tuple[Digest, dict[str, object]]:
    """Stream the store into ``partial`` while it is read back and uploaded."""
    about = f", about {space.human_bytes(prepared.estimate)}" if prepared.estimate else ""
    events.step("backup", f"reading {store.name}{about}")
    with contextlib.ExitStack() as stack:
        followers: list[ReadBack | BucketUpload] = []

        def written(size: int) -> None:
            for follower in followers:
                follower.advance(size)

        writer = ArtifactWriter(partial, store.config.compression, store.config.compression_level, written)
        stack.callback(writer.close)
        read_back = ReadBack(partial)
        stack.callback(read_back.close)
        followers.append(read_back)
        if bucket is not None:
            bucket.start(partial, prepared.estimate)
            followers.append(bucket)
        stream = stack.enter_context(store.open_stream(prepared, run.id, accept_bad_pages=accept_bad_pages))
        total = _copy(stream, writer, prepared, events)
        facts = dict(stream.finish())
        writer.finish()
        events.progress("backup", total, total, final=True)
        events.step("read-back", "reading the artifact back from disk")
        return read_back.finish(writer), facts


def _copy(stream: Stream, writer: ArtifactWriter, prepared: Prepared, events: Events) -> int:
    total = 0
    while True:
        buffer = writer.buffer()
        filled = 0
        # A pipe gives what is in it: fill the buffer, so that few large pieces reach the compressor.
        with memoryview(buffer) as view:
            while filled < len(buffer):
                count = stream.readinto(view[filled:])
                if not count:
                    break
                filled += count
        total += filled
        writer.put(buffer, filled)
        if filled < len(buffer):
            return total
        # An estimate that was passed says nothing more: only the end is the end.
        events.progress("backup", total, prepared.estimate if total < prepared.estimate else None)
