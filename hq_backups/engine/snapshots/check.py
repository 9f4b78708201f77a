"""The verb check: what the repository should hold and does, judged by the schedule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime

from hq_backups.engine import crons, judgement
from hq_backups.engine.bucket import open_bucket
from hq_backups.engine.catalog import Entry, entries
from hq_backups.engine.errors import CorruptBackup, RepositoryError
from hq_backups.engine.events import Events, parse_utc
from hq_backups.engine.judgement import BucketFacts, Finding, Problem, Schedule, Seen
from hq_backups.engine.requests import CatalogRequest
from hq_backups.engine.stores.base import SnapshotStore

VERSIONS_HINT = (
    "Deleting a snapshot only hides its files there: add a lifecycle rule to the bucket that lets noncurrent versions "
    "expire (NoncurrentVersionExpiration, some days more than elasticsearch_backup_days) and aborts incomplete uploads "
    "(AbortIncompleteMultipartUpload)."
)


def look(store: SnapshotStore, schedule: Schedule, now: datetime, events: Events) -> tuple[Finding, ...]:
    """Ask the cluster and judge; raises what keeps it from answering."""
    found = entries(store, CatalogRequest((store.name,), store.medium), events)
    mine = [e for e in found if e.env in (None, store.config.env)]
    seen = _proven(store, [_seen(e) for e in mine if "before_restore" not in e.name], mine)
    place = store.location("")["repository"]
    facts = BucketFacts(str(place), True, fixed_keys=False, what="repository")
    judged = judgement.judge(store.name, seen, schedule, now, facts)
    local = store.medium == "local"
    notes = [f if not local else replace(f, hint=f.hint.replace(" --source s3", "")) for f in judged]
    if (old := crons.warning(store.name)) is not None:
        notes.append(Finding("old-cron", judgement.WARNING, old))
    return (*notes, *_versions(store))


def _seen(entry: Entry) -> Seen:
    problem = None
    if entry.problem is not None:
        missing = "is missing" in entry.problem
        problem = Problem("gone" if missing else "damaged", f"{entry.name}: {entry.problem}")
    began = parse_utc(entry.taken_at)
    took = parse_utc(entry.manifest.finished_at) - began if entry.manifest else None
    # What HQ's own cron took is a day's backup too, and has no size that could be compared.
    type_ = entry.type if entry.managed else "daily"
    size = entry.size if entry.managed else judgement.EMPTY
    return Seen(
        entry.name, type_, began, size, entry.mode if entry.managed else "unmanaged",
        None, entry.env, entry.host, entry.managed, took, entry.run, None, problem,
    )  # fmt: skip


def _proven(store: SnapshotStore, seen: list[Seen], found: list[Entry]) -> list[Seen]:
    """Read the metadata of the newest good snapshot, until those of one are right."""
    manifests = {e.name: e.manifest for e in found if e.manifest is not None}
    proven = []
    right = False
    for each in sorted(seen, key=lambda s: (s.taken_at, s.key), reverse=True):
        manifest = manifests.get(each.key)
        if each.problem is None and not right and manifest is not None:
            try:
                store.check(manifest)
                right = True
            except CorruptBackup as error:
                each = replace(each, problem=Problem("damaged", error.message))
        proven.append(each)
    return proven


def _versions(store: SnapshotStore) -> Iterator[Finding]:
    """Yield a warning for a bucket that keeps what retention deletes."""
    if not store.settings.s3:
        return
    try:
        bucket = open_bucket(store)
        versioned, _ = bucket.versioned()
        expires = versioned and bucket.expires_noncurrent()
    except RepositoryError as error:
        message = f"whether the bucket keeps versions cannot be asked: {error.message}"
        yield Finding("versioning-unknown", judgement.WARNING, message, error.hint)
        return
    if versioned and not expires:
        message = f"bucket {bucket.bucket} keeps every version for good: deleted snapshots still fill it"
        yield Finding("noncurrent-versions", judgement.WARNING, message, VERSIONS_HINT)
