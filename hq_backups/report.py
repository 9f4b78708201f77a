"""How everything stands, for monitoring: plain data, whatever is dead."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from django.db import Error

from hq_backups import conf, health, history
from hq_backups.engine.events import format_utc, utc_now
from hq_backups.history import LastGood, Standing
from hq_backups.problems import ALERT, ERROR, Problem, ordered

OK, FAILING = "ok", "failing"
DATABASE = "database"
"""The key of the problem that the records cannot be read."""


@dataclass(frozen=True)
class Report:
    """What there is to say now."""

    at: datetime
    standings: tuple[Standing, ...]
    problems: tuple[Problem, ...]
    database: bool = True
    """Whether the records could be read."""

    @property
    def status(self) -> str:
        """Return whether somebody must look."""
        return FAILING if any(each.severity in (ERROR, ALERT) for each in self.problems) else OK

    def to_plain(self) -> dict[str, Any]:
        """Return the public JSON form."""
        return {
            "status": self.status,
            "generated_at": format_utc(self.at),
            "database": self.database,
            "stores": [_standing(each, self.at) for each in self.standings],
            "problems": [
                {name: value for name, value in each.to_plain().items() if value not in ("", None)}
                for each in self.problems
            ],
        }


def report(now: datetime | None = None) -> Report:
    """Ask everything that can be asked; what cannot is itself a problem."""
    now = now or utc_now()
    resolved = conf.resolve()
    problems = list(health.survey(resolved, now).problems)
    try:
        standings = tuple(history.standings(resolved, now))
    except (Error, OSError) as error:
        if not any(problem.key == DATABASE for problem in problems):
            problems.append(unreadable(error))
        return Report(now, (), tuple(ordered(problems)), database=False)
    return Report(now, standings, tuple(ordered([*problems, *_never(standings, problems)])))


def unreadable(error: Exception) -> Problem:
    """Return the problem of records that cannot be read; the driver's own words may name hosts and users."""
    return Problem(
        DATABASE,
        ERROR,
        None,
        "the database with the history cannot be read",
        f"It answers {type(error).__name__}. Backups, and checks of the bucket, go on without it.",
        "list_backups",
    )


def _never(standings: Iterable[Standing], known: Sequence[Problem]) -> Iterable[Problem]:
    """Yield the stores without any good backup that nothing else tells of: who never had one misses none."""
    told = {(problem.store, problem.host) for problem in known}
    for each in standings:
        if each.state == history.NONE and (each.store, each.host) not in told:
            title = f"no good backup of {each.store} is recorded"
            yield Problem(f"none/{each.store}@{each.host}", ALERT, each.store, title, host=each.host)


def _standing(each: Standing, now: datetime) -> dict[str, Any]:
    return {
        "store": each.store,
        "host": each.host,
        "state": each.state,
        "late": list(each.late),
        "last_good": {type: _good(good, now) for type, good in sorted(each.last_good.items())},
        "running_since": _time(each.running.started_at if each.running else None),
        "last_failed": each.last_failed.run if each.last_failed else None,
        "verified_at": _time(each.verified_at),
        "restored_in_seconds": each.restored_in,
        "next_due": {"type": each.next_due.type, "at": _time(each.next_due.due)} if each.next_due else None,
    }


def _good(good: LastGood, now: datetime) -> dict[str, Any]:
    return {
        "name": good.name,
        "taken_at": _time(good.taken_at),
        "age_seconds": round((now - good.taken_at).total_seconds()),
        "size": good.size,
        "seconds": good.seconds,
        "places": list(good.places),
        "verified_at": _time(good.verified_at),
    }


def _time(moment: datetime | None) -> str | None:
    return None if moment is None else format_utc(moment)
