"""The verb check: what a store's bucket holds, judged by the schedule. Asks nothing but the bucket."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from zoneinfo import ZoneInfo

from hq_backups.engine import crons, judgement, names
from hq_backups.engine.bucket import bucket_of
from hq_backups.engine.config import Config, StoreConfig
from hq_backups.engine.errors import (
    AccessDenied,
    BadCredentials,
    BadManifest,
    ClockSkew,
    ConfigurationError,
    Exit,
    HQBackupsError,
    NewerManifest,
    NoSuchBucket,
    NoSuchObject,
    RepositoryError,
    Unreachable,
    WrongRegion,
)
from hq_backups.engine.events import Events, format_utc, parse_utc, utc_now
from hq_backups.engine.judgement import BucketFacts, Finding, Problem, Schedule, Seen
from hq_backups.engine.manifest import MAX_BYTES, Manifest, load_manifest
from hq_backups.engine.repository.s3 import FoundManifest, S3Repository, StoredObject
from hq_backups.engine.repository.s3_compare import encode_crc32
from hq_backups.engine.repository.s3_object import RUN_METADATA
from hq_backups.engine.requests import CheckRequest
from hq_backups.engine.snapshots import check as snapshots
from hq_backups.engine.stores import open_store
from hq_backups.engine.stores.base import SnapshotStore

STATUS_FILE = "s3_backup_status.txt"
STATUS_MODE = 0o644
"""As the old script's: monitoring that runs as somebody else reads it where the directory lets it."""

NOTE = "[ERROR] Alarms: "
"""How a line begins that is no finding of the bucket."""

CODES: dict[type[HQBackupsError], str] = {
    Unreachable: "unreachable",
    AccessDenied: "denied",
    BadCredentials: "credentials",
    WrongRegion: "region",
    NoSuchBucket: "no-such-bucket",
    ClockSkew: "clock",
    ConfigurationError: "configuration",
}
"""What a failure to ask is called in findings; whatever else a service answers is ``service``."""


def check(config: Config, request: CheckRequest, run_id: str, events: Events) -> Exit:
    """Judge one store's backups in its bucket, tell it, and write the status file."""
    settings = config.store(request.store)
    if request.only_notes:
        change_notes(settings, request.notes, events)
        return Exit.OK
    now = utc_now()
    try:
        findings = _look(config, settings, request, now, events)
    except HQBackupsError as error:
        findings = (_not_asked(request.store, error),)
    except Exception as error:
        fault = HQBackupsError(f"{type(error).__name__}: {error}")
        if request.status_file:
            fault_found = (_not_asked(request.store, fault),)
            write_status(config, settings, fault_found, now, events, request.notes)
        raise
    for finding in findings:
        events.emit("finding", store=request.store, **finding.to_plain())
    if request.status_file:
        write_status(config, settings, findings, now, events, request.notes)
    return judgement.worst(finding.exit_code for finding in findings)


def _look(
    config: Config, settings: StoreConfig, request: CheckRequest, now: datetime, events: Events
) -> tuple[Finding, ...]:
    store = open_store(config, request.store)
    if isinstance(store, SnapshotStore):
        schedule = Schedule(request.nadir_hour, _zone(config.timezone))
        return snapshots.look(store, schedule, now, events)
    return look(config, settings, request, now)


def look(config: Config, settings: StoreConfig, request: CheckRequest, now: datetime) -> tuple[Finding, ...]:
    """Ask the bucket and judge; raises what keeps it from answering."""
    repo = bucket_of(config, settings)
    status, why = repo.versioning()
    found = gather(repo, request.store)
    mine = [s for s in found.seen if of_env(s, config.env)]
    ours = [s for s in mine if request.host is None or of_host(s, request.host)]
    theirs = max((s for s in mine if s not in ours and s.host), key=lambda s: s.taken_at, default=None)
    facts = BucketFacts(
        repo.bucket,
        None if status is None else status == "Enabled",
        why or "",
        fixed_keys=repo.config.versioning,
    )
    schedule = Schedule(request.nadir_hour, _zone(config.timezone))
    judged = judgement.judge(request.store, prove(repo, ours), schedule, now, facts, elsewhere=theirs)
    notes = [("bucket-fallback", repo.note)] if repo.note else []
    if (old := crons.warning(request.store)) is not None:
        notes.append(("old-cron", old))
    notes += [("newer-manifest", text) for text in found.newer[:1]]
    return (*judged, *(Finding(code, judgement.WARNING, text) for code, text in notes))


def _zone(name: str | None) -> tzinfo:
    if name is not None:
        return ZoneInfo(name)
    return utc_now().astimezone().tzinfo or UTC


def _not_asked(store: str, error: HQBackupsError) -> Finding:
    code = CODES.get(type(error), "configuration" if error.exit_code is Exit.USAGE else "service")
    message = f"The {store} backups could not be checked: {error.message}"
    return Finding(code, judgement.ERROR, message, error.hint, exit=error.exit_code)


def of_env(seen: Seen, env: str) -> bool:
    """Tell whether a backup may be of an environment: fixed keys of the old scripts do not say."""
    return seen.env in (None, env, names.safe(env))


def of_host(seen: Seen, host: str) -> bool:
    """Tell whether a backup may be of a host; the old scripts wrote whatever ``hostname`` printed."""
    if seen.host is None or seen.host in (host, names.safe(host)):
        return True
    return not seen.managed and seen.host.split(".")[0] == host.split(".")[0]


@dataclass
class Found:
    """What a bucket holds of one store."""

    seen: list[Seen] = field(default_factory=list)
    newer: list[str] = field(default_factory=list)
    """What is said of manifests that only a newer release can read."""
    useless: dict[str, str] = field(default_factory=dict)
    """Why no manifest of a key can be used, by key."""


def gather(repo: S3Repository, store: str) -> Found:
    """Read the bucket's manifests, then list its objects: one that comes meanwhile is no missing one.

    Manifests are let go at once: a bucket that nobody prunes has thousands.
    """
    found = Found()
    prefix = names.PREFIX[store]
    described: list[Seen] = []
    for each in repo.list_manifests([prefix]):
        described += _described(repo, each, store, found)
    objects = {(o.key, o.version_id): o for o in repo.list_objects([prefix, *names.OLD_KEY_PREFIXES])}
    claimed = set()
    for seen in described:
        place = (seen.key, seen.version_id)
        claimed.add(place)
        found.seen.append(_compared(seen, objects.get(place)))
    for place, stored in objects.items():
        if place not in claimed:
            found.seen += _unmanaged(stored, store, found)
    return found


def _described(repo: S3Repository, each: FoundManifest, store: str, found: Found) -> Iterator[Seen]:
    """Yield what a manifest describes, or note why it cannot be used."""
    key = each.key.removesuffix(names.MANIFEST_KEY_SUFFIX)
    try:
        manifest = load_manifest(_raw(repo, each), each.key)
        if manifest.repository.get("key") != key:
            raise BadManifest(f"it is about {manifest.repository.get('key')!r}", name=each.key)
    except NewerManifest as error:
        found.newer.append(f"{error.message}. {error.hint}")
    except BadManifest as error:
        found.useless[key] = error.message
    except NoSuchObject:
        pass  # gone since it was listed, as a rule of the bucket may have it
    else:
        if manifest.store == store:
            yield _managed(manifest, key)


def _raw(repo: S3Repository, each: FoundManifest) -> bytes:
    """Return a manifest's bytes; raises when the bucket gives none at all, and BadManifest for this one."""
    if each.raw is not None:
        return each.raw
    try:
        return repo.get_small(each.key, each.version_id, MAX_BYTES)
    except (AccessDenied, BadCredentials, Unreachable, ClockSkew, NoSuchObject):
        raise
    except RepositoryError as error:
        raise BadManifest(error.message, name=each.key) from error


def _managed(m: Manifest, key: str) -> Seen:
    version = m.repository.get("version_id") or None
    began = parse_utc(m.started_at)
    return Seen(
        key, m.type, began, m.size, f"{m.mode} {m.codec}", version, m.env, m.host, managed=True,
        took=parse_utc(m.finished_at) - began, run=m.run, crc32=m.crc32,
    )  # fmt: skip


def _compared(seen: Seen, stored: StoredObject | None) -> Seen:
    """Mark a backup whose object is gone or has another size."""
    if stored is None:
        problem = Problem("gone", f"{seen.key} is not in the bucket any more, its manifest is")
        return replace(seen, problem=problem)
    # No run began after its object stood there, whatever its host's clock said.
    taken_at = min(seen.taken_at, stored.last_modified)
    if stored.size == seen.size:
        return replace(seen, taken_at=taken_at)
    text = f"{seen.key} has {stored.size} bytes, its manifest says {seen.size}"
    return replace(seen, taken_at=taken_at, size=stored.size, problem=Problem("size-differs", text))


def _unmanaged(stored: StoredObject, store: str, found: Found) -> Iterator[Seen]:
    """Yield an object without a usable manifest, if its key is one of a backup."""
    old = names.recognise(stored.key.rsplit("/", 1)[-1], is_key=True)
    if old is None or old.store != store:
        return
    why = found.useless.get(stored.key)
    codec = {".tar.bz": "bzip2", ".zst": "zstd", ".tar.zst": "zstd"}.get(old.ext, "gzip")
    yield Seen(
        stored.key,
        old.type or "manual",
        stored.last_modified,
        stored.size,
        f"{old.mode} {codec}",
        stored.version_id,
        old.env,
        old.host,
        problem=Problem("manifest-unusable", f"{stored.key} has no manifest that can be used: {why}")
        if why
        else None,
    )


def prove(repo: S3Repository, seen: Sequence[Seen]) -> list[Seen]:
    """Ask for the newest good backup of each type what the service knows of its bytes, until one is right."""
    by_age = sorted(seen, key=lambda s: s.taken_at, reverse=True)
    right: set[str] = set()
    proven = []
    for each in by_age:
        if each.problem is None and each.managed and each.type not in right:
            each = replace(each, problem=_head_problem(repo, each))
            if each.problem is None:
                right.add(each.type)
        proven.append(each)
    return proven


def _head_problem(repo: S3Repository, each: Seen) -> Problem | None:
    stands = repo.head(each.key, each.version_id)
    if stands is None:
        return Problem("gone", f"{each.key} is not in the bucket any more, its manifest is")
    expected = encode_crc32(int(each.crc32, 16)) if each.crc32 else None
    # A checksum of the parts' checksums (with a dash) says nothing without the parts.
    if stands.crc32 and expected and "-" not in stands.crc32 and stands.crc32 != expected:
        text = f"{each.key} has the CRC32 {stands.crc32}, by its manifest it is {expected}"
        return Problem("checksum-differs", text)
    run = stands.metadata.get(RUN_METADATA)
    if run is not None and run != each.run:
        return Problem("replaced", f"{each.key} was sent by run {run}, its manifest is of {each.run}")
    return None


def write_status(
    config: Config,
    settings: StoreConfig,
    findings: Sequence[Finding],
    now: datetime,
    events: Events,
    notes: Sequence[str] = (),
) -> None:
    """Write the status file, whole or not at all; that it cannot be written is a warning."""
    checked = f"Checked {format_utc(now)} on {config.host}"
    _put_status(settings, [*judgement.lines(findings), *_note_lines(notes), checked], events)


def change_notes(settings: StoreConfig, notes: Sequence[str], events: Events) -> None:
    """Put other notes into the status file that stands; without one there is nothing to change."""
    path = settings.backup_dir / STATUS_FILE
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            lines = file.read(MAX_BYTES).decode("utf-8", "replace").splitlines()
    except OSError as error:
        events.warning("status-file", f"{path} cannot be read: {error.strerror or error}")
        return
    kept = [line for line in lines if not line.startswith(NOTE)]
    _put_status(settings, [*kept[:-1], *_note_lines(notes), *kept[-1:]], events)


def _note_lines(notes: Sequence[str]) -> list[str]:
    return [NOTE + judgement.one_line(note) for note in notes]


def _put_status(settings: StoreConfig, lines: Sequence[str], events: Events) -> None:
    path = settings.backup_dir / STATUS_FILE
    try:
        _write(path, "\n".join([*lines, ""]).encode("utf-8", "backslashreplace"))
    except OSError as error:
        events.warning("status-file", f"{path} cannot be written: {error.strerror or error}")
    else:
        events.emit("status", store=settings.store, path=str(path))


def _write(path: Path, content: bytes) -> None:
    # Two checks may run at once; a run that clears up removes what ends so, once a writer is dead or not.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    for last in (False, True):
        temporary.unlink(missing_ok=True)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(content)
                os.fchmod(fd, STATUS_MODE)
                file.flush()
                os.fsync(fd)
            os.rename(temporary, path)
            return
        except FileNotFoundError:
            if last:
                raise
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
