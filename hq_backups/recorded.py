"""What the records say is wrong: failed and dead runs, missed ones, workers and a dispatcher that are silent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from django.db import connections, router
from django.db.models import Max, Min

from hq_backups import claims
from hq_backups.alarm_state import State
from hq_backups.bounded import within
from hq_backups.clock import aware, stored
from hq_backups.commandline import typed
from hq_backups.engine.errors import Exit, HQBackupsError
from hq_backups.engine.judgement import MOST_GRACE, age_words
from hq_backups.problems import ALERT, ERROR, Problem
from hq_backups.reaper import KILLED
from hq_backups.schedule import COUNTS, GRACE, Slot, is_covered, timetable
from hq_backups.watching import TITLES, VERBS, next_command, run_key

if TYPE_CHECKING:
    from hq_backups.conf import Resolved

RECENT = timedelta(days=30)
"""A host that has made nothing of a store for so long does not make it any more."""
TYPES = ("daily", "weekly", "hourly")


@dataclass(frozen=True)
class FailedRuns:
    """What failed last and has not been good since."""

    ours: tuple[Problem, ...] = ()
    died: tuple[Problem, ...] = ()
    """Of other hosts, and killed: nobody there told anybody."""
    theirs: tuple[Problem, ...] = ()
    """Of other hosts, which told it themselves."""


def probe(seconds: float) -> None:
    """Raise when the database does not answer in time; a server that hangs is asked in a thread."""
    from hq_backups.models import BackupRun

    alias = router.db_for_read(BackupRun)
    if connections[alias].vendor != "postgresql":
        BackupRun.objects.order_by().values_list("pk")[:1].exists()
        return

    def ask() -> None:
        connection = connections[alias].copy()
        options = connection.settings_dict.get("OPTIONS") or {}
        connection.settings_dict = {
            **connection.settings_dict,
            "OPTIONS": {**options, "connect_timeout": max(2, int(seconds / 2))},
        }
        try:
            with connection.cursor() as cursor:
                cursor.execute(f"SELECT 1 FROM {connection.ops.quote_name(BackupRun._meta.db_table)} LIMIT 1")  # noqa: S608
        finally:
            connection.close()

    within(seconds, ask, what="the database")


def failed_runs(resolved: Resolved, state: State, host: str, now: datetime) -> FailedRuns:
    """Return the verbs whose last run failed; this host's own file knows more of its runs than the records."""
    from hq_backups.models import BackupRun

    ended = BackupRun.objects.filter(verb__in=VERBS, started_at__gte=stored(now - RECENT)).exclude(
        status="running"
    )
    newest = ended.order_by().values("host", "store", "verb").annotate(newest=Max("pk"))
    rows = BackupRun.objects.filter(pk__in=[each["newest"] for each in newest])
    ours = {key: outcome.problem for key, outcome in state.runs.items()}
    died: list[Problem] = []
    theirs: list[Problem] = []
    for row in rows:
        problem = _of_row(resolved, row)
        if row.host == host:
            known = state.runs.get(f"{row.store}/{row.verb}")
            # To the second: the file keeps no parts of one.
            if known is None or read(row.finished_at or row.started_at) > known.at + timedelta(seconds=1):
                ours[f"{row.store}/{row.verb}"] = problem
        elif problem is not None:
            (died if row.error == KILLED else theirs).append(problem)
    return FailedRuns(tuple(p for p in ours.values() if p is not None), tuple(died), tuple(theirs))


def _of_row(resolved: Resolved, row: Any) -> Problem | None:
    if row.status != "failed" or row.exit_code == Exit.LOCKED:
        return None
    verb = "upload" if row.exit_code == Exit.UPLOAD_FAILED else row.verb
    kind = f"{row.type} " if row.type in TYPES else ""
    title = TITLES[verb].format(type=kind)
    if row.error == KILLED:
        title = f"the {kind}{row.verb} was killed"
    cause = ". ".join(part.strip(". ") for part in (row.error, row.hint) if part)
    began = f"Run {row.run} began at {read(row.started_at):%Y-%m-%d %H:%M} UTC"
    return Problem(
        run_key(row.store, verb, row.host),
        ALERT if verb == "upload" else ERROR,
        row.store,
        title,
        ". ".join(part for part in (cause, began) if part),
        next_command(resolved, row.store, verb, row.type, row.host),
        row.host,
    )


def missed(resolved: Resolved, state: State, host: str, now: datetime) -> tuple[Problem, ...]:
    """Return what was due long enough ago and was not made, on every host that should have."""
    from hq_backups.models import BackupRun

    backups = BackupRun.objects.filter(verb="backup", type__in=TYPES, started_at__lte=stored(now)).order_by()
    made = backups.made().values("host", "store", "type")
    last: dict[tuple[str, str], dict[str, datetime]] = {}
    for row in made.annotate(at=Max("started_at")):
        last.setdefault((row["host"], row["store"]), {})[row["type"]] = read(row["at"])
    began = {
        (r["host"], r["store"]): read(r["at"])
        for r in backups.values("host", "store").annotate(at=Min("started_at"))
    }
    working = {
        (r["host"], r["store"])
        for r in backups.filter(status="running", started_at__gt=stored(now - MOST_GRACE)).values(
            "host", "store"
        )
    }
    for store, types in _remembered(state).items():
        mine = last.setdefault((host, store), {})
        for type_, at in types.items():
            mine[type_] = max(at, mine.get(type_, at))
    found: list[Problem] = []
    for where, store in _expected(resolved, host, last, now):
        if (where, store) not in working:
            born = began.get((where, store)) or state.since
            found += _missed(resolved, store, where, last.get((where, store), {}), born, now)
    return tuple(found)


def missed_here(resolved: Resolved, state: State, host: str, now: datetime) -> Iterator[Problem]:
    """Yield what this host should have made, by what it remembers itself."""
    for store in resolved.local:
        yield from _missed(resolved, store, host, _remembered(state).get(store, {}), state.since, now)


def _remembered(state: State) -> dict[str, dict[str, datetime]]:
    found: dict[str, dict[str, datetime]] = {}
    for key, good in state.good.items():
        store, _, type_ = key.partition("/")
        found.setdefault(store, {})[type_] = good.at
    return found


def _expected(
    resolved: Resolved, host: str, last: Mapping[tuple[str, str], Mapping[str, datetime]], now: datetime
) -> list[tuple[str, str]]:
    """Return which hosts should make which stores: as the settings say, else as they have done."""
    hosts = resolved["backup_hosts"]
    if hosts is not None:
        pairs = [(where, store) for where, stores in hosts.items() for store in stores]
    else:
        pairs = [(host, store) for store in resolved.local]
        pairs += [
            pair
            for pair, types in last.items()
            if max(types.values(), default=now - 2 * RECENT) > now - RECENT
        ]
    on = set(resolved.enabled)
    return sorted({(where, store) for where, store in pairs if store in on})


def _missed(
    resolved: Resolved,
    store: str,
    host: str,
    last: Mapping[str, datetime],
    born: datetime | None,
    now: datetime,
) -> Iterator[Problem]:
    try:
        table = timetable(resolved, store)
    except HQBackupsError:
        # Its settings are wrong, which is told as such.
        return
    done = [Slot(store, type_, at) for type_, at in last.items()]
    for type_ in TYPES:
        slot = table.last(now - GRACE, type_)
        if slot is None or is_covered(slot, done) or born is None or born > slot.due:
            continue
        newest = max((at for each, at in last.items() if each in COUNTS[type_]), default=None)
        since = f"no {type_} backup for {age_words(now - newest)}" if newest else f"no {type_} backup at all"
        yield Problem(
            f"missed/{store}@{host}/{type_}",
            ALERT,
            store,
            since,
            f"One was due at {slot.due:%Y-%m-%d %H:%M} UTC and was not made: either nothing started it, or it failed.",
            typed(resolved, "run_backup", store, "--type", type_, host=host),
            host,
            f"taken at {newest:%Y-%m-%d %H:%M} UTC, {age_words(now - newest)} old" if newest else "",
        )


def idle_workers(resolved: Resolved, now: datetime) -> tuple[Problem, ...]:
    """Return the hosts whose queue nobody serves."""
    oldest: dict[str, datetime] = {}
    for row in claims.not_picked_up(now):
        queued = read(row.queued_at)
        oldest[row.host] = min(queued, oldest.get(row.host, queued))
    return tuple(
        Problem(
            f"worker/{where}",
            ERROR,
            None,
            f"no worker on hq_backups.{where}",
            f"A backup was sent there {age_words(now - at)} ago and nobody has taken it. Look at the "
            f"worker: systemctl status 'hq_backups*' on {where}.",
            typed(resolved, "run_backup", "all", "--type", "auto", host=where),
            where,
        )
        for where, at in sorted(oldest.items())
    )


def tick(host: str, now: datetime) -> None:
    """Note that the dispatcher has looked, for whoever shares its database."""
    from hq_backups.models import Dispatcher

    Dispatcher.objects.update_or_create(host=host[:255], defaults={"seen_at": stored(now)})


def last_tick() -> datetime | None:
    """Return when a dispatcher has looked last; None where the schedule is cron's."""
    from hq_backups.models import Dispatcher

    at: datetime | None = Dispatcher.objects.aggregate(at=Max("seen_at"))["at"]
    return None if at is None else read(at)


def read(moment: datetime) -> datetime:
    """Return a record's time in UTC."""
    return aware(moment).astimezone(UTC)


def silent_dispatcher(resolved: Resolved, host: str, now: datetime, silent: timedelta) -> tuple[Problem, ...]:
    """Return that the schedule stands still, where it ran before and was not switched off."""
    at = last_tick()
    setting = resolved.effective.get("backup_schedule")
    off = setting is not None and setting.value is False
    if at is None or off or not silent < now - at < RECENT:
        return ()
    return (
        Problem(
            "beat",
            ERROR,
            None,
            f"the schedule has stood still for {age_words(now - at)}",
            f"The task hq_backups.dispatch_due comes every ten minutes and came last at {at:%Y-%m-%d %H:%M} UTC: "
            "Celery's beat, its broker or the worker of the periodic queue is dead, so no backup is started.",
            typed(resolved, "run_backup", "all", "--type", "auto", host=host),
            host,
        ),
    )
