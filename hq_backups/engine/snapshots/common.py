"""What the verbs share: a snapshot's manifest, and what a killed run left."""

from __future__ import annotations

import contextlib
import hashlib
import json
import zlib
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from hq_backups.engine.bucket import open_bucket
from hq_backups.engine.config import Config
from hq_backups.engine.errors import CorruptBackup, HQBackupsError
from hq_backups.engine.events import Events, format_utc, parse_utc, utc_now
from hq_backups.engine.manifest import UNMANAGED, Manifest
from hq_backups.engine.repository.snapshots import SnapshotRecords, bucket_key
from hq_backups.engine.stores.base import SnapshotStore
from hq_backups.engine.when import local_time

TAKING, SCRATCH = "taking", "scratch"


def describe(
    store: SnapshotStore,
    name: str,
    run: str,
    type_: str,
    started: datetime,
    source: Mapping[str, Any],
    *,
    finished: datetime | None = None,
    duration: float = 0.0,
    warnings: list[str] | None = None,
    tools: Mapping[str, str] | None = None,
) -> Manifest:
    """Return a snapshot's manifest; its sha256 is of what identifies it, for it has no file of ours."""
    identity = {
        k: source.get(k) for k in ("cluster_uuid", "repository", "snapshot", "uuid", "bytes", "shards")
    }
    raw = json.dumps(identity, sort_keys=True).encode()
    sha256, size = hashlib.sha256(raw).hexdigest(), int(source.get("bytes") or 0)
    return Manifest(
        store=store.name,
        mode=store.mode,
        type=type_,
        env=store.config.env,
        host=store.config.host,
        run=run,
        started_at=format_utc(started),
        finished_at=format_utc(finished or utc_now()),
        local_date=f"{local_time(started, store.config.timezone):%Y-%m-%d}",
        name=name,
        size=size,
        sha256=sha256,
        crc32=f"{zlib.crc32(raw):08x}",
        plain_size=size,
        plain_sha256=sha256,
        codec="none",
        source=dict(source),
        tools=dict(tools or {}),
        duration=round(duration, 3),
        warnings=list(warnings or ()),
        repository=store.location(name),
    )


def survey(config: Config, store: SnapshotStore, name: str, taken_at: str) -> Manifest:
    """Return what stands for the manifest of a snapshot that somebody else took."""
    source = dict(store.survey(name))
    run = f"{UNMANAGED}{hashlib.sha256(str(source.get('uuid')).encode()).hexdigest()[:16]}"
    ended = source.pop("finished", 0)
    finished = datetime.fromtimestamp(ended / 1000, UTC) if ended else None
    return describe(store, name, run, "manual", parse_utc(taken_at), source, finished=finished)


def recover(store: SnapshotStore, records: SnapshotRecords, events: Events) -> None:
    """Finish or remove what killed runs left in the cluster. Only under the lock."""
    records.recover(events)
    clean_scratch(store, records, events)
    for path, note in records.notes(TAKING):
        name = str(note.get("name"))
        kept = {each.name: each for each in store.kept(events)}
        if name in {m.name for m in records.manifests(store.name)} or name not in kept:
            path.unlink()
            continue
        adopted = False
        if kept[name].problem is None:
            with contextlib.suppress(CorruptBackup):
                _adopt(store, records, note, events)
                adopted = True
        if not adopted:
            # FAILED, unreadable, or still running with nobody who would accept it.
            store.remove(name)
            events.step("recover", f"removed snapshot {name}, left by a run that died")
        path.unlink()


def _adopt(store: SnapshotStore, records: SnapshotRecords, note: Mapping[str, Any], events: Events) -> None:
    name = str(note["name"])
    found = dict(store.survey(name))
    found.pop("finished", None)
    # What was counted before it began says nothing of what was written meanwhile.
    source = {**note.get("source", {}), **found, "adopted": True}
    started = parse_utc(str(note["started_at"]))
    records.add(describe(store, name, str(note["run"]), str(note["type"]), started, source))
    events.step("recover", f"finished {name}, whose run was killed")


def clean_scratch(store: SnapshotStore, records: SnapshotRecords, events: Events) -> None:
    """Remove what drills and trials of killed runs left. Only under the lock."""
    for path, note in records.notes(SCRATCH):
        # One that cannot be read is named after its run, as its indices are.
        prefix = note.get("prefix") or store.scratch(path.name.removeprefix(".").partition(f".{SCRATCH}.")[0])
        for name in store.clean_scratch(str(prefix)):
            events.step("recover", f"removed index {name}, left by a run that died")
        path.unlink()


def send_manifest(store: SnapshotStore, manifest: Manifest) -> None:
    """Put a manifest into the bucket, beside the repository; raises RepositoryError."""
    open_bucket(store).put_manifest(bucket_key(manifest.name), manifest.to_json())


def failure_words(error: HQBackupsError) -> str:
    """Return an error's cause and what to do, as one sentence for another message."""
    return f"{error.message}. {error.hint}".strip(". ")
