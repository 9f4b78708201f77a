"""How each store stands, by records alone: what the page, the metrics and the alarms show.

The number of queries depends on the stores and hosts, never on how many rows there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import reduce
from operator import or_
from typing import Any

from django.db.models import DateTimeField, Q, QuerySet, Subquery

from hq_backups.clock import aware, stored
from hq_backups.conf import Resolved
from hq_backups.engine.config import STORES
from hq_backups.engine.errors import HQBackupsError
from hq_backups.engine.judgement import EARLY
from hq_backups.models import Artifact, BackupRun
from hq_backups.schedule import COUNTS, GRACE, Slot, Timetable, timetable

TYPES = ("daily", "weekly", "hourly")
SEEN = timedelta(days=45)
"""A host that backed a store up within this time is still expected to; who renames a host forgets the old name."""
RUNNING = timedelta(days=7)
"""For so long a run may go on: an older row was left by a process that nobody saw die."""
GOOD = (BackupRun.Status.OK, BackupRun.Status.WARNING)
NONE, OFF, OK, LATE, FAILED = "none", "off", "ok", "late", "failed"
STATES = (FAILED, NONE, LATE, OK, OFF)
"""How a store may stand, the gravest first."""
POINTS = 90


@dataclass(frozen=True)
class LastGood:
    """The newest good backup of one type."""

    name: str
    run: str
    taken_at: datetime
    size: int | None = None
    """Stored bytes."""
    seconds: float | None = None
    """How long it took; None when this database does not know the run."""
    locations: tuple[Mapping[str, Any], ...] = ()
    verified_at: datetime | None = None
    pk: int | None = None

    @property
    def places(self) -> tuple[str, ...]:
        """Return the kinds of place that hold it, such as ``local`` and ``s3``."""
        kinds = (place.get("medium") or place.get("kind") for place in self.locations)
        return tuple(dict.fromkeys(str(kind) for kind in kinds if kind))


@dataclass(frozen=True)
class Standing:
    """How one store on one host stands."""

    store: str
    host: str
    last_good: Mapping[str, LastGood] = field(default_factory=dict)
    """By type."""
    running: BackupRun | None = None
    last_failed: BackupRun | None = None
    """The newest failed backup, when no good one came after it."""
    next_due: Slot | None = None
    restored_in: float | None = None
    """Seconds that the last restore took, or the last deep verify, which restores into a scratch place."""
    restored_by: BackupRun | None = None
    """That run."""
    state: str = NONE
    late: tuple[str, ...] = ()
    """The types that were due, grace included, and are not there."""
    verified_at: datetime | None = None
    """When any backup of this store and host was last read to its end and found whole."""

    @property
    def newest(self) -> LastGood | None:
        """Return the newest good backup of any type."""
        return max(self.last_good.values(), key=lambda good: good.taken_at, default=None)


@dataclass(frozen=True)
class Point:
    """One good backup, for a curve."""

    at: datetime
    size: int | None
    seconds: float | None
    type: str
    run: str


def standings(resolved: Resolved, now: datetime) -> list[Standing]:
    """Return how each store stands on each of its hosts, in the stores' order."""
    pairs = _pairs(resolved, now)
    good = _good(pairs)
    runs = _runs(pairs, now)
    took = _took(each.run for of_pair in good.values() for each in of_pair)
    return [_standing(resolved, now, pair, good[pair], runs, took) for pair in pairs]


def points(pairs: Iterable[tuple[str, str]], limit: int = POINTS) -> dict[tuple[str, str], list[Point]]:
    """Return the last good backups of each store and host, oldest first; one query for each."""
    names = ("started_at", "size", "seconds", "type", "run")
    found = {}
    for store, host in pairs:
        rows = BackupRun.objects.filter(store=store, host=host, verb="backup", status__in=GOOD)
        newest = rows.order_by("-started_at").values_list(*names)[:limit]
        found[store, host] = [Point(aware(at), *rest) for at, *rest in newest][::-1]
    return found


def _pairs(resolved: Resolved, now: datetime) -> list[tuple[str, str]]:
    """Return each store with its hosts: those that the settings name, else those that the records know."""
    recent = Artifact.objects.filter(taken_at__gte=stored(now - SEEN), managed=True).exclude(host="")
    known = set(recent.order_by().values_list("store", "host").distinct())
    tried = BackupRun.objects.filter(started_at__gte=stored(now - SEEN), verb="backup").exclude(host="")
    known |= set(tried.order_by().values_list("store", "host").distinct())
    assigned: Mapping[str, Sequence[str]] | None = resolved["backup_hosts"]
    pairs = set()
    for store in STORES:
        hosts = {host for name, host in known if name == store}
        if store in resolved.enabled:
            if assigned is not None:
                hosts = {host for host, stores in assigned.items() if store in stores}
            elif store in resolved.local or not hosts:
                hosts.add(resolved["backup_host_name"])
        pairs |= {(store, host) for host in hosts}
    return sorted(pairs, key=lambda pair: (STORES.index(pair[0]), pair[1]))


def _good(pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], list[Artifact]]:
    """Return the newest good artifact of each type, in one query."""
    found: dict[tuple[str, str], list[Artifact]] = {pair: [] for pair in pairs}
    wanted = []
    for store, host in pairs:
        whole = Artifact.objects.filter(store=store, host=host, managed=True, problem="", gone_at=None)
        wanted += [whole.filter(type=type).order_by("-taken_at") for type in TYPES]
    for row in _first_of_each(Artifact.objects.defer("manifest", "problem"), wanted):
        found[row.store, row.host].append(row)
    return found


def _runs(pairs: Sequence[tuple[str, str]], now: datetime) -> list[BackupRun]:
    """Return the first, the newest running, failed and restoring run of each, in one query."""
    wanted = []
    newest = BackupRun.objects.order_by("-started_at")
    for store, host in pairs:
        backups = newest.filter(store=store, host=host, verb="backup")
        wanted.append(backups.filter(status=BackupRun.Status.RUNNING, started_at__gte=stored(now - RUNNING)))
        wanted.append(backups.filter(status=BackupRun.Status.FAILED, started_at__gte=stored(now - SEEN)))
        wanted.append(backups.order_by("started_at"))
        wanted.append(newest.filter(store=store, host=host, verb="verify", status__in=GOOD))
    for store in dict.fromkeys(store for store, _ in pairs):
        done = newest.filter(store=store, status__in=GOOD)
        wanted.append(done.filter(verb="restore"))
        wanted.append(done.filter(verb="verify", facts__deep=True))
    return _first_of_each(BackupRun.objects.defer("steps", "warnings"), wanted)


def _took(runs: Iterable[str]) -> dict[str, float | None]:
    names = sorted(set(filter(None, runs)))
    return dict(BackupRun.objects.filter(run__in=names).values_list("run", "seconds")) if names else {}


def _first_of_each(rows: QuerySet[Any], wanted: Sequence[QuerySet[Any]]) -> list[Any]:
    """Return the first row of each query, by one statement that looks each up in an index.

    Their order must be an index's own: with the key behind it SQLite may read the whole table instead.
    """
    if not wanted:
        return []
    picks = (Q(pk=Subquery(each.values("pk")[:1])) for each in wanted)
    return [_with_zones(row) for row in rows.filter(reduce(or_, picks))]


def _with_zones(row: Any) -> Any:
    """Give a row's times their zone, which they have not where the host switched USE_TZ off, as HQ may."""
    for column in row._meta.concrete_fields:
        if isinstance(column, DateTimeField) and (moment := getattr(row, column.attname)) is not None:
            setattr(row, column.attname, aware(moment))
    return row


def _standing(
    resolved: Resolved,
    now: datetime,
    pair: tuple[str, str],
    artifacts: Sequence[Artifact],
    runs: Sequence[BackupRun],
    took: Mapping[str, float | None],
) -> Standing:
    store, host = pair
    good: dict[str, LastGood] = {}
    for row in sorted(artifacts, key=lambda row: row.taken_at):
        if row.type in TYPES:
            good[row.type] = _last_good(row, took)
    ours = [run for run in runs if run.store == store and run.host == host and run.verb == "backup"]
    running = _newest(run for run in ours if run.status == BackupRun.Status.RUNNING)
    failed = _newest(run for run in ours if run.status == BackupRun.Status.FAILED)
    newest = max((each.taken_at for each in good.values()), default=None)
    if failed is not None and newest is not None and failed.started_at <= newest:
        failed = None
    verified = [run for run in runs if run.store == store and run.verb == "verify"]
    restored = _newest(run for run in runs if run.store == store and (run.verb == "restore" or _is_deep(run)))
    proven = [row.verified_at for row in artifacts] + [
        run.finished_at for run in verified if run.host == host
    ]
    is_on = store in resolved.enabled
    table = _table(resolved, store) if is_on else None
    born = min((run.started_at for run in ours), default=newest)
    late = _late(table, now, good, running, born) if table is not None else ()
    return Standing(
        store,
        host,
        good,
        running=running,
        last_failed=failed,
        next_due=None if table is None else table.next(now),
        restored_in=None if restored is None else restored.seconds,
        restored_by=restored,
        state=_state(is_on, good, failed, late),
        late=late,
        verified_at=max((at for at in proven if at is not None), default=None),
    )


def _state(is_on: bool, good: Mapping[str, LastGood], failed: BackupRun | None, late: Sequence[str]) -> str:
    if not is_on:
        return OFF
    if failed is not None:
        return FAILED
    if not good:
        return NONE
    return LATE if late else OK


def _table(resolved: Resolved, store: str) -> Timetable | None:
    """Return when a store is due; None when its settings are of no use, which is told elsewhere."""
    try:
        return timetable(resolved, store)
    except HQBackupsError:
        return None


def _late(
    table: Timetable,
    now: datetime,
    good: Mapping[str, LastGood],
    running: BackupRun | None,
    born: datetime | None,
) -> tuple[str, ...]:
    """Return the types that should be there: a store younger than what was due, or that runs now, is not late."""
    late = []
    for type, counts in COUNTS.items():
        slots = [slot.due for each in counts if (slot := table.last(now - GRACE, each)) is not None]
        if not slots or born is None or born > max(slots):
            continue
        since = max(slots) - EARLY
        is_done = any(good[each].taken_at >= since for each in counts if each in good)
        is_running = running is not None and running.type in counts and running.started_at >= since
        if not is_done and not is_running:
            late.append(type)
    return tuple(late)


def _last_good(row: Artifact, took: Mapping[str, float | None]) -> LastGood:
    places = row.locations if isinstance(row.locations, list) else []
    return LastGood(
        row.name,
        row.run,
        row.taken_at,
        row.size,
        took.get(row.run),
        tuple(place for place in places if isinstance(place, dict)),
        row.verified_at,
        row.pk,
    )


def _is_deep(run: BackupRun) -> bool:
    return run.verb == "verify" and isinstance(run.facts, dict) and run.facts.get("deep") is True


def _newest(runs: Iterable[BackupRun]) -> BackupRun | None:
    return max(runs, key=lambda run: run.started_at, default=None)
