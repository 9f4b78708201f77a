"""Everything that is wrong now, from every source that can be asked: for mails, pages, metrics and probes.

Each source stands alone and takes a bounded time; one that cannot be asked becomes a problem itself, and ends no
alarm that only it could see.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from django.conf import settings

from hq_backups import alarm_state, alerts, mailing, recorded
from hq_backups.alarm_state import State
from hq_backups.alerts import Report
from hq_backups.bounded import within
from hq_backups.commandline import typed
from hq_backups.conf.findings import ERROR as FINDING_ERROR
from hq_backups.engine.events import utc_now
from hq_backups.engine.judgement import age_words
from hq_backups.problems import ERROR, WARNING, Problem, ordered

if TYPE_CHECKING:
    from hq_backups.conf import Resolved

logger = logging.getLogger(__name__)

SECONDS = 10.0
"""How long one source may take."""
CHECK_EVERY = timedelta(hours=4)
UNCHECKED = 3 * CHECK_EVERY
"""A check that has run here before and was silent for so long does not run any more."""
SILENT = timedelta(minutes=30)
"""A dispatcher that comes every ten minutes and was silent for so long is dead."""
NOBODY = "nobody"


@dataclass(frozen=True)
class Look:
    """What one source said."""

    problems: tuple[Problem, ...] = ()
    reports: tuple[Report, ...] = ()
    """What of it is told by mail from here; what others tell, or a check tells itself, is not among them."""


@dataclass(frozen=True)
class Health:
    """How the backups of this host, and of those that share its database, stand."""

    at: datetime
    host: str
    problems: tuple[Problem, ...]
    """Gravest first."""
    unanswered: Mapping[str, str]
    """Sources that could not be asked, and why."""
    reports: tuple[Report, ...] = ()

    @property
    def ok(self) -> bool:
        """Return whether nothing but warnings was found."""
        return all(problem.severity == WARNING for problem in self.problems)

    def to_plain(self) -> dict[str, Any]:
        """Return plain data, without the inner workings."""
        return {
            "ok": self.ok,
            "at": self.at.isoformat(),
            "host": self.host,
            "problems": [problem.to_plain() for problem in self.problems],
            "unanswered": dict(self.unanswered),
        }


def survey(resolved: Resolved, now: datetime | None = None, *, dispatching: bool = False) -> Health:
    """Ask every source; raises nothing. ``dispatching``: the dispatcher asks, who tells for every host."""
    now = now or utc_now()
    host = str(resolved["backup_host_name"] or "")
    notes: list[str] = []
    state = alarm_state.load(alerts.directory(resolved), notes)
    sources: dict[str, Callable[[], Look]] = {
        "settings": lambda: _settings(resolved, host),
        "state": lambda: _state(state, notes, resolved, host, now),
        "mail": lambda: _mail(resolved, state, host),
        "database": lambda: _database(resolved, state, host, now, dispatching=dispatching),
        "broker": lambda: _broker(resolved, host),
    }
    looks: list[Look] = []
    unanswered: dict[str, str] = {}
    for name, ask in sources.items():
        try:
            looks.append(ask())
        except Exception as error:
            logger.debug("the source %s failed", name, exc_info=True)
            why = mailing.redact(mailing.said(error), mailing.secrets(resolved))
            unanswered[name] = why
            problem = Problem(
                name, ERROR, None, _SILENT_TITLES.get(name, f"{name} cannot be asked"), why, host=host
            )
            problem = replace(problem, command=typed(resolved, "list_backups", "--config", host=host))
            looks.append(Look((problem,), (Report(name, (problem,)),)))
    if "database" in unanswered:
        # The file still knows what this host made: it can begin an alarm, but not end one.
        looks.append(_without_database(resolved, state, host, now))
    found = (problem for look in looks for problem in look.problems)
    problems = tuple(ordered(problem for problem in found if alerts.concerns(resolved, problem)))
    reports = tuple(
        replace(report, problems=tuple(p for p in report.problems if alerts.concerns(resolved, p)))
        for look in looks
        for report in look.reports
    )
    return Health(now, host, problems, unanswered, reports)


_SILENT_TITLES = {
    "database": "the database with the history cannot be read",
    "broker": "the message broker does not answer: nothing is started by the schedule",
}


def _settings(resolved: Resolved, host: str) -> Look:
    problems = tuple(
        Problem(
            f"settings/{finding.id}/{finding.setting or ''}",
            ERROR,
            finding.store,
            f"a setting is wrong: {finding.message}",
            finding.hint,
            typed(resolved, "list_backups", "--config", host=host),
            host,
        )
        for finding in resolved.check()
        if finding.level == FINDING_ERROR
    )
    return Look(problems, (Report("settings/", problems),))


def _state(state: State, notes: list[str], resolved: Resolved, host: str, now: datetime) -> Look:
    """Return what the last checks found, which they told themselves, and whether they still run."""
    problems = [p for checked in state.checks.values() for p in checked.problems]
    late = []
    for store, checked in sorted(state.checks.items()):
        if now - checked.at > UNCHECKED:
            late.append(
                Problem(
                    f"unchecked/{store}@{host}",
                    ERROR,
                    store,
                    f"not checked for {age_words(now - checked.at)}",
                    f"check_s3_backups should run every {age_words(CHECK_EVERY)}; it last did at "
                    f"{checked.at:%Y-%m-%d %H:%M} UTC. Look at the schedule, its cron job or its timer.",
                    typed(resolved, "check_s3_backups", store, host=host),
                    host,
                )
            )
    damaged = [
        Problem("alarms/file", WARNING, None, "alarm state cannot be used", n, host=host) for n in notes
    ]
    return Look((*problems, *late, *damaged), (Report("unchecked/", tuple(late)),))


def _mail(resolved: Resolved, state: State, host: str) -> Look:
    """Return what keeps alarms from arriving; what cannot be mailed is shown everywhere else."""
    test = typed(resolved, "check_s3_backups", "--send-test-email", host=host)
    problems = []
    kind = mailing.delivers_nowhere(resolved)
    if not mailing.recipients(resolved):
        words = "neither check_s3_backups_email nor ADMINS is set"
        problems.append(
            Problem(f"mail/{NOBODY}", WARNING, None, "alarms are mailed to nobody", words, test, host)
        )
    elif kind:
        words = f"the mail backend is {mailing.backend(resolved)}"
        problems.append(
            Problem(
                "mail/nowhere",
                WARNING,
                None,
                f"alarm mails go nowhere: the backend is {kind}",
                words,
                test,
                host,
            )
        )
    if state.undelivered is not None:
        problems.append(undelivered(resolved, state))
    return Look(tuple(problems))


def undelivered(resolved: Resolved, state: State) -> Problem:
    """Return the problem that mails cannot be sent."""
    host = str(resolved["backup_host_name"] or "")
    lost = state.undelivered
    why = lost.why if lost else ""
    since = f" since {lost.since:%Y-%m-%d %H:%M} UTC" if lost else ""
    test = typed(resolved, "check_s3_backups", "--send-test-email", host=host)
    return Problem("mail/undelivered", ERROR, None, f"alarm mails cannot be sent{since}", why, test, host)


def _database(resolved: Resolved, state: State, host: str, now: datetime, *, dispatching: bool) -> Look:
    """Return what the records say of runs, of the schedule and of workers."""
    recorded.probe(SECONDS)
    runs = recorded.failed_runs(resolved, state, host, now)
    missed = recorded.missed(resolved, state, host, now)
    idle = recorded.idle_workers(resolved, now)
    beat = recorded.silent_dispatcher(resolved, host, now, SILENT)
    all_ = (*runs.ours, *runs.died, *runs.theirs, *missed, *idle, *beat)
    # While the dispatcher is alive it tells for every host, and the checks of one host leave that to it.
    alone = dispatching or bool(beat) or recorded.last_tick() is None
    mine = [p for p in missed if dispatching or p.host == host]
    told = [p for p in mine if alone or p.key in state.alarms]
    reports = [
        Report("run/", (*runs.ours, *(runs.died if dispatching else ()))),
        Report("missed/", tuple(told)),
        Report("database"),
        Report("beat", beat),
    ]
    if alone:
        reports.append(Report("worker/", idle))
    return Look(all_, tuple(reports))


def _without_database(resolved: Resolved, state: State, host: str, now: datetime) -> Look:
    ours = tuple(outcome.problem for outcome in state.runs.values() if outcome.problem is not None)
    missed = tuple(recorded.missed_here(resolved, state, host, now))
    return Look((*ours, *missed), (Report("", (*ours, *missed)),))


def _broker(resolved: Resolved, host: str) -> Look:
    """Ask the broker, where the host has named one."""
    url = getattr(settings, "CELERY_BROKER_URL", "") or getattr(settings, "BROKER_URL", "")
    if not url or str(url).startswith("memory:"):
        return Look((), (Report("broker"),))
    within(SECONDS, lambda: _ping(str(url)), what="the message broker")
    return Look((), (Report("broker"),))


def _ping(url: str) -> None:
    from kombu import Connection

    with Connection(url, connect_timeout=3, transport_options={"socket_timeout": 3}) as connection:
        # Redis is pinged by it too (kombu.transport.redis.Channel).
        connection.ensure_connection(max_retries=1, interval_start=0, interval_step=0, timeout=3)
