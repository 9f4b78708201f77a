"""Artifacts' rows, made from what the catalog lists: untrusted, and rebuilt at any time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any

from django.db import router, transaction

from hq_backups.engine.events import parse_utc, utc_now

IDENTITY = ("store", "name", "run", "env", "host", "taken_at")
MAX_INTEGER = 2**63 - 1
TEXT = {"run": 255, "store": 32, "mode": 32, "type": 32, "env": 128, "host": 255, "name": 1024, "sha256": 64}


def sync(
    entries: Iterable[Mapping[str, Any]], stores: Iterable[str], *, complete: bool = True
) -> tuple[int, int]:
    """Make the artifact rows of ``stores`` what ``entries`` say; return how many are there and how many went.

    Where the catalog could not be read whole (``complete`` is false), nothing is marked as gone.
    """
    from hq_backups.models import Artifact

    rows = list(entries)
    with transaction.atomic(using=router.db_for_write(Artifact)):
        listed = write_entries(rows)
        write_runs(rows)
        if not complete:
            return len(listed), 0
        present = Artifact.objects.filter(store__in=list(stores), gone_at=None)
        gone = [pk for pk, *key in present.values_list("pk", *IDENTITY) if tuple(key) not in listed]
        for start in range(0, len(gone), 500):
            Artifact.objects.filter(pk__in=gone[start : start + 500]).update(gone_at=utc_now())
    return len(listed), len(gone)


def write_entries(entries: Iterable[Mapping[str, Any]]) -> set[tuple[Any, ...]]:
    """Write the rows of catalog entries; return their identities."""
    from hq_backups.models import Artifact

    rows: dict[tuple[Any, ...], Artifact] = {}
    for entry in entries:
        fields = artifact_fields(entry)
        if fields is not None:
            key = tuple(fields[name] for name in IDENTITY)
            rows[key] = Artifact(**_join(rows.get(key), fields))
    changed = ["mode", "type", "size", "sha256", "managed", "problem", "gone_at", "locations"]
    for extra in ("verified_at", "manifest"):
        # A list without them must not wipe out what is known.
        _upsert([row for row in rows.values() if getattr(row, extra)], [*changed, extra])
    _upsert([row for row in rows.values() if not row.verified_at and not row.manifest], changed)
    return set(rows)


def write_runs(entries: Iterable[Mapping[str, Any]]) -> None:
    """Write a row for each run that a manifest tells of and that has none, or one that never ended.

    A restore of the database that holds the records puts back a row of the very backup that was running then.
    """
    from hq_backups.models import BackupRun

    told = [f for f in map(artifact_fields, entries) if f and f["managed"] and f["run"] and not f["problem"]]
    shared = ("run", "store", "mode", "type", "env", "host", "size")
    made = [
        BackupRun(
            **{name: fields[name] for name in shared},
            verb="backup",
            started_at=fields["taken_at"],
            status=BackupRun.Status.OK,
            exit_code=0,
            artifact=fields["name"],
        )
        for fields in told
    ]
    BackupRun.objects.bulk_create(made, batch_size=200, ignore_conflicts=True)
    for start in range(0, len(made), 500):
        runs = [row.run for row in made[start : start + 500]]
        unended = BackupRun.objects.filter(run__in=runs, verb="backup", status=BackupRun.Status.RUNNING)
        unended.update(status=BackupRun.Status.OK, exit_code=0)


def _join(known: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """Make one row of an artifact whose good and bad copies are listed apart."""
    if known is None:
        return fields
    problems = [text for text in (known.problem, fields["problem"]) if text]
    return {**fields, "problem": "; ".join(problems), "locations": known.locations + fields["locations"]}


def _upsert(rows: list[Any], fields: list[str]) -> None:
    from hq_backups.models import Artifact

    Artifact.objects.bulk_create(
        rows, batch_size=200, update_conflicts=True, unique_fields=IDENTITY, update_fields=fields
    )


def artifact_fields(entry: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a row's fields from an entry, which is untrusted; None without a name or a time."""
    taken = moment(entry.get("taken_at"))
    if taken is None or not entry.get("name"):
        return None
    text = {name: sane(str(entry.get(name) or ""))[:limit] for name, limit in TEXT.items()}
    return {
        **text,
        "taken_at": taken,
        "size": integer(entry.get("size")),
        "managed": bool(entry.get("managed")),
        "problem": sane(str(entry.get("problem") or "")),
        "verified_at": moment(entry.get("verified_at")),
        "gone_at": None,
        "manifest": sane(dict(entry.get("manifest") or {})),
        "locations": sane(list(entry.get("locations") or [])),
    }


def moment(value: object) -> datetime | None:
    """Return a time of the wire format, or None."""
    with suppress(ValueError, TypeError):
        return parse_utc(str(value))
    return None


def integer(value: object) -> int | None:
    """Return what a big integer column can hold, or None."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MAX_INTEGER:
        return int(value)
    return None


def sane(value: Any) -> Any:
    """Return ``value`` without what PostgreSQL's text and jsonb refuse: NUL, lone surrogates, NaN."""
    if isinstance(value, str):
        return value.replace("\x00", "?").encode("utf-8", "replace").decode()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {sane(str(k)): sane(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [sane(v) for v in value]
    return value
