"""Who is told what, when: by the clock alone."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hq_backups.alarm_state import Alarm, State
from hq_backups.alerts import (
    AGAIN,
    CLAIM,
    EARLY,
    FORGOTTEN,
    Report,
    Telling,
    claimed,
    due,
    observe,
    told,
    untold,
)
from hq_backups.problems import Problem

NOW = datetime(2026, 11, 24, 3, 0, tzinfo=UTC)
MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
LATE = Problem("missed/postgres@pg0/daily", "alert", "postgres", "no daily backup for 31 hours")
DOWN = Problem("run/couch/backup@pg0", "error", "couch", "the backup failed")


def seen(*problems: Problem) -> list[Report]:
    return [
        Report("missed/", tuple(p for p in problems if p is LATE)),
        Report(DOWN.key, tuple({DOWN} & {*problems})),
    ]


def keys(telling: Telling) -> tuple[list[str], list[str], list[str]]:
    started, lasting, over = (
        [a.problem.key for a in part] for part in (telling.started, telling.lasting, telling.over)
    )
    return started, lasting, over


def turn(state: State, now: datetime, *problems: Problem, works: bool = True) -> tuple[State, Telling]:
    """Look and mail once."""
    state = observe(state, seen(*problems), now)
    telling = due(state, now)
    if not telling:
        return state, telling
    state = claimed(state, telling, now)
    return (
        (told(state, telling, now), telling) if works else (untold(state, telling, now, "refused"), Telling())
    )


def test_a_problem_is_told_when_it_starts_once_a_day_and_when_it_is_over() -> None:
    state, mails = State(), []
    for number in range(0, 6 * 8):  # a check every four hours, for eight days
        now = NOW + number * 4 * HOUR + timedelta(seconds=number % 3)
        state, telling = turn(state, now, *([LATE] if number < 6 * 7 else []))
        if telling:
            mails.append((number * 4, [len(part) for part in keys(telling)]))
    assert mails == [
        (0, [1, 0, 0]),
        *((24 * day, [0, 1, 0]) for day in range(1, 7)),
        (24 * 7, [0, 0, 1]),
    ]
    assert state.alarms == {}


def test_several_problems_are_one_mail_the_gravest_first() -> None:
    _, telling = turn(State(), NOW, LATE, DOWN)
    assert keys(telling) == ([DOWN.key, LATE.key], [], [])


def test_what_cannot_be_sent_is_sent_at_the_next_occasion() -> None:
    state, telling = turn(State(), NOW, LATE, works=False)
    assert not telling
    assert state.undelivered is not None
    assert state.undelivered.since == NOW
    state, telling = turn(state, NOW + 10 * MINUTE, LATE)
    assert keys(telling) == ([LATE.key], [], [])
    assert state.undelivered is None


def test_what_began_and_ended_while_no_mail_went_is_told_all_the_same() -> None:
    state, _ = turn(State(), NOW, LATE, works=False)
    state, _ = turn(state, NOW + HOUR, works=False)
    state, telling = turn(state, NOW + 5 * HOUR)
    assert keys(telling) == ([], [], [LATE.key])
    assert telling.over[0].told_at is None
    assert telling.over[0].over_at == NOW + HOUR
    assert state.alarms == {}


def test_a_source_that_could_not_look_ends_no_alarm() -> None:
    state, _ = turn(State(), NOW, LATE, DOWN)
    state = observe(state, [Report(DOWN.key)], NOW + HOUR)
    assert keys(due(state, NOW + HOUR)) == ([], [], [DOWN.key])


def test_a_scope_is_a_key_or_the_beginning_of_keys() -> None:
    assert Report("a/").covers("a/b")
    assert Report("a/b").covers("a/b")
    assert not Report("a/b").covers("a/bc")
    assert not Report("a").covers("a/b")


def test_what_another_process_is_sending_is_not_sent_twice_unless_that_one_died() -> None:
    state = observe(State(), seen(LATE), NOW)
    state = claimed(state, due(state, NOW), NOW)
    assert not due(state, NOW + MINUTE)
    assert keys(due(state, NOW + CLAIM)) == ([LATE.key], [], [])


def test_what_comes_back_while_its_end_is_being_mailed_is_told_as_new() -> None:
    state, _ = turn(State(), NOW, LATE)
    state = observe(state, seen(), NOW + HOUR)
    telling = due(state, NOW + HOUR)
    state = observe(claimed(state, telling, NOW + HOUR), seen(LATE), NOW + HOUR + MINUTE)
    state = told(state, telling, NOW + HOUR + MINUTE)
    assert keys(due(state, NOW + HOUR + 2 * MINUTE)) == ([LATE.key], [], [])


def test_a_clock_that_was_wrong_silences_nothing() -> None:
    future = NOW + 300 * DAY
    state = State(alarms={LATE.key: Alarm(LATE, future, told_at=future, claimed_until=future + CLAIM)})
    assert keys(due(observe(state, seen(LATE), NOW), NOW)) == ([], [LATE.key], [])


def test_warnings_are_mailed_to_nobody() -> None:
    mild = replace(LATE, severity="warning")
    assert observe(State(), [Report("missed/", (mild,))], NOW).alarms == {}


def test_an_end_that_can_be_told_to_nobody_is_forgotten_after_a_month() -> None:
    state, _ = turn(State(), NOW, LATE, works=False)
    state, _ = turn(state, NOW + HOUR, works=False)
    assert observe(state, [], NOW + HOUR + FORGOTTEN).alarms == {}


_step = st.tuples(
    st.integers(1, 60 * 30), st.booleans(), st.booleans(), st.booleans()
)  # minutes on, LATE there, DOWN there, mail works


@given(st.lists(_step, max_size=60))
def test_however_it_goes_no_alarm_is_lost_none_is_repeated_and_each_is_taken_back(
    steps: list[tuple[int, bool, bool, bool]],
) -> None:
    state, now = State(), NOW
    log: dict[str, list[tuple[str, datetime]]] = {LATE.key: [], DOWN.key: []}
    since: dict[str, datetime] = {}
    for minutes, late, down, works in steps:
        now += minutes * MINUTE
        problems = [p for p, there in ((LATE, late), (DOWN, down)) if there]
        state, telling = turn(state, now, *problems, works=works)
        for word, part in zip(("start", "again", "over"), keys(telling), strict=True):
            for key in part:
                log[key].append((word, now))
        for problem in (LATE, DOWN):
            is_there = problem in problems
            if is_there and works:
                # A mail that works leaves nothing that is there untold, and none told longer ago than a day.
                last = log[problem.key][-1]
                assert last[0] in ("start", "again")
                assert now - last[1] < AGAIN - EARLY
            if not is_there and works:
                assert problem.key not in state.alarms
            since.setdefault(problem.key, now)
    for story in log.values():
        for (before, then), (word, at) in pairwise(story):
            if word == "start":
                assert before == "over"
            if word == "again":
                assert before in ("start", "again")
                assert at - then >= AGAIN - EARLY
        assert not story or story[0][0] in ("start", "over")


def test_a_mail_that_is_late_for_a_day_is_not_sent_twice() -> None:
    state, _ = turn(State(), NOW, LATE)
    state, telling = turn(state, NOW + 5 * DAY, LATE)
    assert keys(telling) == ([], [LATE.key], [])
    assert not turn(state, NOW + 5 * DAY + HOUR, LATE)[1]


@pytest.mark.parametrize("minutes", [0, 1, 60 * 12, 60 * 23])
def test_a_day_is_not_over_before_it_is(minutes: int) -> None:
    state, _ = turn(State(), NOW, LATE)
    assert not turn(state, NOW + minutes * MINUTE, LATE)[1]
