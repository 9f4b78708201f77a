"""Who is told what, and when: one mail when a problem starts, one a day while it lasts, one when it is over.

:func:`observe`, :func:`due`, :func:`claimed`, :func:`told` and :func:`untold` decide, as pure functions of what is
remembered and the clock; :func:`tell` is the shell around them. Warnings are shown, never mailed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from hq_backups import alarm_state, mailing, signals
from hq_backups.alarm_state import Alarm, State, Undelivered
from hq_backups.engine.events import utc_now
from hq_backups.problems import ALERT, ERROR, Problem, ordered

if TYPE_CHECKING:
    from hq_backups.conf import Resolved

AGAIN = timedelta(hours=24)
"""How long after a mail about it the next one goes, while it lasts."""
EARLY = timedelta(minutes=15)
"""So much sooner it may go: checks come by the hour, and one that came a second early would be a turn late."""
CLAIM = timedelta(minutes=5)
"""How long one process may take to send; after that it is thought dead, and another one sends."""
FORGOTTEN = timedelta(days=30)
"""How long something that is over waits to be told."""


@dataclass(frozen=True)
class Report:
    """Everything that one source sees now within its scope: what it does not name there is over."""

    scope: str
    """A key, or with a slash at its end the beginning of keys."""
    problems: tuple[Problem, ...] = ()

    def covers(self, key: str) -> bool:
        """Tell whether a key is in the scope."""
        return key.startswith(self.scope) if self.scope.endswith("/") else key == self.scope


@dataclass(frozen=True)
class Telling:
    """What one mail says."""

    started: tuple[Alarm, ...] = ()
    lasting: tuple[Alarm, ...] = ()
    over: tuple[Alarm, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.started or self.lasting or self.over)

    @property
    def keys(self) -> set[str]:
        """Return what it is about."""
        return {alarm.problem.key for alarm in (*self.started, *self.lasting, *self.over)}


def observe(state: State, reports: Iterable[Report], now: datetime) -> State:
    """Return the state after what was seen: alarms begin, last, end."""
    reports = list(reports)
    seen = {p.key: p for p in ordered(p for r in reports for p in r.problems) if p.severity in (ERROR, ALERT)}
    alarms = dict(state.alarms)
    for key, problem in seen.items():
        known = alarms.get(key)
        alarms[key] = replace(known, problem=problem, over_at=None) if known else Alarm(problem, now)
    for key, alarm in state.alarms.items():
        if key not in seen and alarm.over_at is None and any(report.covers(key) for report in reports):
            alarms[key] = replace(alarm, over_at=now)
    kept = {k: a for k, a in alarms.items() if a.over_at is None or now - a.over_at < FORGOTTEN}
    return replace(state, alarms=kept)


def due(state: State, now: datetime) -> Telling:
    """Return what is to be told now, gravest first."""
    free = [alarm for alarm in state.alarms.values() if not _is_claimed(alarm, now)]
    by_key = {alarm.problem.key: alarm for alarm in free}
    sorted_ = [by_key[problem.key] for problem in ordered(alarm.problem for alarm in free)]
    live = [alarm for alarm in sorted_ if alarm.over_at is None]
    return Telling(
        tuple(alarm for alarm in live if alarm.told_at is None),
        tuple(alarm for alarm in live if alarm.told_at is not None and _is_again(alarm.told_at, now)),
        tuple(alarm for alarm in sorted_ if alarm.over_at is not None),
    )


def _is_again(told_at: datetime, now: datetime) -> bool:
    # A mail from the future was sent by a clock that was wrong: it must not silence the alarm.
    return now - told_at >= AGAIN - EARLY or told_at - now > CLAIM


def _is_claimed(alarm: Alarm, now: datetime) -> bool:
    return alarm.claimed_until is not None and now < alarm.claimed_until <= now + CLAIM


def claimed(state: State, telling: Telling, now: datetime) -> State:
    """Return the state in which nobody else sends the same."""
    return _each(state, telling.keys, lambda alarm: replace(alarm, claimed_until=now + CLAIM))


def told(state: State, telling: Telling, now: datetime) -> State:
    """Return the state after the mail was taken by the server."""
    over = {alarm.problem.key for alarm in telling.over}
    alarms = dict(_each(state, telling.keys - over, lambda a: replace(a, told_at=now)).alarms)
    for key in over & set(alarms):
        if alarms[key].over_at is None:
            # It came back while the mail said that it is over: that is a new one.
            alarms[key] = replace(alarms[key], told_at=None, since=now)
        else:
            del alarms[key]
    return replace(_each(replace(state, alarms=alarms), telling.keys, _unclaimed), undelivered=None)


def untold(state: State, telling: Telling, now: datetime, why: str) -> State:
    """Return the state after a mail that could not be sent: all of it stays pending."""
    since = state.undelivered.since if state.undelivered else now
    return replace(_each(state, telling.keys, _unclaimed), undelivered=Undelivered(since, now, why[:1000]))


def _unclaimed(alarm: Alarm) -> Alarm:
    return replace(alarm, claimed_until=None)


def _each(state: State, keys: set[str], change: Callable[[Alarm], Alarm]) -> State:
    alarms = {key: change(alarm) if key in keys else alarm for key, alarm in state.alarms.items()}
    return replace(state, alarms=alarms)


def concerns(resolved: Resolved, problem: Problem) -> bool:
    """Return whether a problem is anybody's: that of a store that was switched off is over."""
    return problem.store is None or problem.store in resolved.switched_on


def directory(resolved: Resolved) -> Path:
    """Return where alarms are remembered; a setting that is of no use leaves nothing remembered, but mails go."""
    return Path(resolved["backup_state_dir"] or os.devnull)


@dataclass(frozen=True)
class Told:
    """What came of telling."""

    sent_to: tuple[str, ...] = ()
    """Empty: no mail went."""
    failed: str = ""
    """Why a mail that was due did not go."""
    notes: tuple[str, ...] = ()
    """What is wrong with the remembering."""


def tell(
    resolved: Resolved,
    reports: Iterable[Report],
    *,
    remember: Callable[[State], State] = lambda state: state,
    mail: bool = True,
    now: datetime | None = None,
) -> Told:
    """Take in what was seen, tell the host's receivers, and mail whatever is due; raises nothing for a mail.

    ``remember`` adds to the state what else is known. Nothing is locked while a mail is on its way.
    """
    reports = list(reports)
    now = (now or utc_now()).replace(microsecond=0)
    where = directory(resolved)
    with alarm_state.opened(where, now) as held:
        before = held.state
        off = [Report(key) for key, alarm in before.alarms.items() if not concerns(resolved, alarm.problem)]
        held.state = observe(remember(before), [*reports, *off], now)
        if not mailing.recipients(resolved):
            # What lasts waits for somebody to be named; what is over concerns nobody then.
            mail, held.state = False, _without_over(held.state)
        telling = due(held.state, now) if mail else Telling()
        if telling:
            held.state = claimed(held.state, telling, now)
        after = held.state
    notes = held.notes
    sent_to: tuple[str, ...] = ()
    failed = ""
    if telling:
        sent_to, failed = _mail(resolved, telling, after, now, notes)
    # After the mail: a receiver may hang.
    _signal(before, after)
    return Told(sent_to, failed, tuple(dict.fromkeys(notes)))


def _mail(
    resolved: Resolved, telling: Telling, after: State, now: datetime, notes: list[str]
) -> tuple[tuple[str, ...], str]:
    """Send it and remember what came of it; return to whom it went, or why it did not."""
    sent_to: tuple[str, ...] = ()
    failed = ""
    try:
        sent_to = mailing.send_alarms(resolved, telling, after, now)
    except mailing.NotSent as error:
        failed = error.message
    with alarm_state.opened(directory(resolved), now) as held:
        # A state that was lost meanwhile, or never kept, is the one that was just used.
        state = held.state if held.state.alarms else after
        held.state = untold(state, telling, now, failed) if failed else told(state, telling, now)
    notes += held.notes
    return sent_to, failed


def _without_over(state: State) -> State:
    return replace(state, alarms={k: a for k, a in state.alarms.items() if a.over_at is None})


def _signal(before: State, after: State) -> None:
    live = {key for key, alarm in before.alarms.items() if alarm.over_at is None}
    now_live = {key for key, alarm in after.alarms.items() if alarm.over_at is None}
    for key in sorted(now_live - live):
        signals.send(signals.problem_started, problem=after.alarms[key].problem)
    for key in sorted(live - now_live):
        signals.send(signals.problem_ended, problem=before.alarms[key].problem)
