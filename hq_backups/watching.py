"""Tells how a run went to those who are not looking: signals, mails, the heartbeat.

Everything here comes after the run has ended, takes a bounded time, needs no database, and can neither stop a run
nor change its exit code.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from hq_backups import alarm_state, alerts, heartbeat, signals
from hq_backups.alarm_state import Good, Outcome, State
from hq_backups.alerts import Report, Told
from hq_backups.bounded import within
from hq_backups.commandline import typed
from hq_backups.engine.config import Job
from hq_backups.engine.errors import Exit, HQBackupsError
from hq_backups.engine.events import Event, Sink, parse_utc, utc_now
from hq_backups.last_good import good_words
from hq_backups.problems import ALERT, ERROR, Problem

if TYPE_CHECKING:
    from hq_backups.conf import Resolved

logger = logging.getLogger(__name__)

VERBS = ("backup", "upload", "verify")
"""What is watched; a restore has an operator who looks."""
SECONDS = 60.0
"""How long a run that has ended may be kept by telling of it."""
TITLES = {
    "backup": "the {type}backup failed",
    "upload": "the backup is not in the bucket: its upload failed",
    "verify": "a backup did not pass its verification",
}
REGULAR = ("daily", "weekly")


class Watcher:
    """Reads one run's events, and tells at its end."""

    def __init__(self, resolved: Resolved, job: Job, say: Sink) -> None:
        """Watch a run of ``job``; what goes wrong with telling is said to ``say``."""
        self.resolved, self.job, self.say = resolved, job, say
        self.host = job.config.host
        selection = job.request.get("selection") or {}
        self.store = str(job.request.get("store") or selection.get("store") or "")
        self.type = str(job.request.get("type") or "")
        self.error: Mapping[str, Any] = {}
        self.manifest: Mapping[str, Any] = {}
        self.began = utc_now()

    def __call__(self, event: Event) -> None:
        """Take in one event."""
        if event.kind == "error":
            self.error = event.data
        elif event.kind == "artifact":
            self.manifest = event.data.get("manifest") or self.manifest

    def ended(self, code: Exit) -> None:
        """Tell how it went."""
        if self.job.verb in VERBS:
            _safely(self.say, self.job.run, lambda: self._tell(code))

    def _tell(self, code: Exit) -> list[str]:
        now = utc_now().replace(microsecond=0)
        outcomes = self._outcomes(code, now)

        def remember(state: State) -> State:
            good = dict(state.good)
            if self.job.verb == "backup" and outcomes.get("backup", True) is None:
                made = _moment(self.manifest.get("started_at")) or self.began.replace(microsecond=0)
                name, size = str(self.manifest.get("name") or "")[:255], self.manifest.get("size")
                good[f"{self.store}/{self.type}"] = Good(made, name, size if isinstance(size, int) else None)
            runs = {**state.runs, **{f"{self.store}/{v}": Outcome(now, p) for v, p in outcomes.items()}}
            if self.job.verb == "backup":
                runs["all/backup"] = Outcome(now)
            return replace(state, runs=runs, good=good)

        reports = [Report(run_key(self.store, v, self.host), (p,) if p else ()) for v, p in outcomes.items()]
        if self.job.verb == "backup":
            reports.append(Report(run_key("all", "backup", self.host)))
        told = alerts.tell(self.resolved, reports, remember=remember, now=now)
        notes = notes_of(told)
        if self.job.verb == "backup" and outcomes:
            notes += beat(self.resolved)
        self._signal(code, now, outcomes)
        return notes

    def _outcomes(self, code: Exit, now: datetime) -> dict[str, Problem | None]:
        """Return what the run says of each verb: a problem, or None when that is well."""
        verb = self.job.verb
        if code is Exit.LOCKED and not (verb == "backup" and self.type in REGULAR):
            # Whoever holds the store tells how that went; only a night's backup will not come by itself.
            return {}
        if code is Exit.OK:
            done: dict[str, Problem | None] = {verb: None}
            if verb == "backup" and self.job.request.get("upload") and self.job.config.store(self.store).s3:
                done["upload"] = None
            return done
        if verb == "backup" and code is Exit.UPLOAD_FAILED:
            return {"backup": None, "upload": self._problem("upload", now)}
        return {verb: self._problem(verb, now)}

    def _problem(self, verb: str, now: datetime) -> Problem:
        cause = ". ".join(str(self.error.get(part) or "").strip().rstrip(".") for part in ("message", "hint"))
        kind = f"{self.type} " if self.type in (*REGULAR, "hourly") else ""
        return Problem(
            run_key(self.store, verb, self.host),
            ALERT if verb == "upload" else ERROR,
            self.store,
            TITLES[verb].format(type=kind),
            cause.strip(". ") or f"run {self.job.run} ended and did not say why",
            next_command(self.resolved, self.store, verb, self.type, self.host),
            self.host,
            good_words(self._known(), self.store, now),
        )

    def _known(self) -> State:
        return alarm_state.load(alerts.directory(self.resolved))

    def _signal(self, code: Exit, now: datetime, outcomes: Mapping[str, Problem | None]) -> None:
        about = {"store": self.store, "run": self.job.run, "host": self.host}
        if self.job.verb == "backup" and "backup" in outcomes and outcomes["backup"] is None:
            made = {"name": self.manifest.get("name"), "size": self.manifest.get("size"), "type": self.type}
            seconds = (now - self.began).total_seconds()
            signals.send(signals.backup_succeeded, **about, **made, seconds=max(0.0, seconds))
        for verb, problem in outcomes.items():
            if problem is not None:
                words = {
                    part: str(self.error.get(name) or "")
                    for part, name in (("error", "message"), ("hint", "hint"))
                }
                signals.send(signals.backup_failed, **about, **words, verb=verb, exit_code=int(code))


def refused(resolved: Resolved, store: str | None, error: HQBackupsError, type_: str, say: Sink) -> None:
    """Tell of a backup that could not even begin, of one store or of all."""

    def work() -> list[str]:
        now = utc_now().replace(microsecond=0)
        host = str(resolved["backup_host_name"] or "")
        problem = Problem(
            run_key(store or "all", "backup", host),
            ERROR,
            store,
            "the backup could not begin" if store else "no backup could begin",
            f"{error.message}. {error.hint}".strip(". "),
            next_command(resolved, store or "all", "backup", type_, host),
            host,
            good_words(alarm_state.load(alerts.directory(resolved)), store, now) if store else "",
        )
        outcome = {f"{store or 'all'}/backup": Outcome(now, problem)}
        told = alerts.tell(
            resolved,
            [Report(problem.key, (problem,))],
            remember=lambda state: replace(state, runs={**state.runs, **outcome}),
            now=now,
        )
        return [*notes_of(told), *beat(resolved)]

    _safely(say, None, work)


def _safely(say: Sink, run: str | None, work: Callable[[], list[str]]) -> None:
    """Do it within its time; whatever goes wrong is said, and nothing else."""
    try:
        notes = within(SECONDS, work, what="telling of the run")
    except (Exception, KeyboardInterrupt) as error:
        logger.debug("telling failed", exc_info=True)
        notes = [f"not everybody could be told of this run: {str(error) or type(error).__name__}"]
    for note in notes:
        try:
            say(Event("warning", {"code": "alarm", "message": note}, run))
        except Exception:
            logger.exception("a reader of the run's events failed")


def notes_of(told: Told) -> list[str]:
    """Return what is to be said of telling."""
    failed = [f"an alarm mail could not be sent, it stays pending: {told.failed}"] if told.failed else []
    return [*told.notes, *failed]


def beat(resolved: Resolved) -> list[str]:
    """Send the heartbeat: well only while nothing that this host knows of is wrong; return what is to be said of it."""
    state = alarm_state.load(alerts.directory(resolved))
    found = [alarm.problem for alarm in state.alarms.values() if alarm.over_at is None]
    found += [
        p for checked in state.checks.values() for p in checked.problems if p.severity in (ERROR, ALERT)
    ]
    note = heartbeat.beat(resolved, ok=not any(alerts.concerns(resolved, problem) for problem in found))
    return [note] if note else []


def run_key(store: str, verb: str, host: str) -> str:
    """Return the key of a verb that fails on a store: the same one for each run, so that it is told once."""
    return f"run/{store}/{verb}@{host}"


def next_command(resolved: Resolved, store: str, verb: str, type_: str, host: str) -> str:
    """Return what to type once the cause is mended."""
    if verb == "upload":
        return typed(resolved, "upload_backups", store, host=host)
    if verb == "verify":
        return typed(resolved, "list_backups", store, host=host)
    return typed(resolved, "run_backup", store, *(["--type", type_] if type_ else []), host=host)


def _moment(value: object) -> datetime | None:
    try:
        return parse_utc(str(value))
    except ValueError:
        return None
