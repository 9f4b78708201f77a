from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hq_backups.engine.errors import Exit
from hq_backups.engine.judgement import (
    GRACE,
    MOST_GRACE,
    BucketFacts,
    Finding,
    Problem,
    Schedule,
    Seen,
    age_words,
    judge,
    lines,
    one_line,
    worst,
)

GOOD = BucketFacts("bucket", versioned=True)
NIGHT = Schedule(0, UTC)
MONDAY = datetime(2026, 11, 23, 0, 0, tzinfo=UTC)
DAY = timedelta(days=1)
HOUR = timedelta(hours=1)
ZONES = ("UTC", "Europe/Berlin", "America/New_York", "Africa/Cairo", "Asia/Kolkata", "Australia/Lord_Howe")


def backup(taken_at: datetime, type_: str = "daily", size: int = 10_000, **more: object) -> Seen:
    facts = {"form": "plain gzip", "managed": True, "took": HOUR, **more}
    return Seen(f"{type_}_{taken_at:%m_%d}", type_, taken_at, size, **facts)  # type: ignore[arg-type]


def slots(schedule: Schedule, until: datetime, days: int) -> list[tuple[datetime, str]]:
    """Return the due times of ``days`` days before a moment, with the type of each."""
    today = until.astimezone(schedule.timezone).date() + DAY
    made = []
    for number in range(days + 2, -1, -1):
        day = today - number * DAY
        due = schedule.due(day)
        if due <= until:
            made.append((due, "weekly" if day.isoweekday() == 7 else "daily"))
    return made


def ran(schedule: Schedule, now: datetime, took: timedelta = HOUR, days: int = 16) -> list[Seen]:
    """Return what a bucket shows now when every run took so long."""
    done = [(due, type_) for due, type_ in slots(schedule, now, days) if due + took <= now]
    return [backup(due, type_, took=took) for due, type_ in done]


def said(seen: list[Seen], now: datetime, schedule: Schedule = NIGHT, **more: object) -> list[str]:
    return lines(judge("postgres", seen, schedule, now, GOOD, **more))  # type: ignore[arg-type]


def codes(seen: list[Seen], now: datetime, schedule: Schedule = NIGHT) -> list[str]:
    return [f.code for f in judge("postgres", seen, schedule, now, GOOD)]


moments = st.datetimes(datetime(2021, 1, 10), datetime(2035, 1, 1), timezones=st.just(UTC))
schedules = st.builds(Schedule, st.integers(0, 23), st.sampled_from([ZoneInfo(z) for z in ZONES]))


class TestSchedule:
    @given(schedules, moments, st.booleans())
    def test_every_moment_lies_between_two_due_times(
        self, schedule: Schedule, now: datetime, weekly: bool
    ) -> None:
        last, following = schedule.last(now, weekly=weekly), schedule.next(now, weekly=weekly)
        assert last <= now < following
        # Clocks are put forward and back by an hour at most.
        assert abs(following - last - (7 * DAY if weekly else DAY)) <= HOUR
        local = last.astimezone(schedule.timezone)
        assert not weekly or local.isoweekday() == 7
        assert local.hour == schedule.nadir_hour or local.astimezone(UTC) == schedule.due(local.date())

    @given(schedules, moments, st.integers(1, 240))
    def test_runs_as_they_should_be_never_alarm(self, schedule: Schedule, now: datetime, took: int) -> None:
        found = judge("postgres", ran(schedule, now, took * timedelta(minutes=1)), schedule, now, GOOD)
        assert [f.code for f in found] == ["newest", "newest"]

    @given(schedules, moments, st.integers(5, 13))
    def test_runs_that_are_always_slow_do_not_either(
        self, schedule: Schedule, now: datetime, took: int
    ) -> None:
        found = judge("postgres", ran(schedule, now, took * HOUR), schedule, now, GOOD)
        assert [f.code for f in found] == ["newest", "newest"]

    @given(schedules, moments, st.integers(1, 12 * 24), st.integers(1, 30))
    def test_runs_that_ended_are_told_within_a_day_and_for_ever(
        self, schedule: Schedule, died: datetime, later: int, took: int
    ) -> None:
        took_ = took * HOUR
        seen = ran(schedule, died, took_)
        now = died + later * HOUR
        missed = schedule.next(max(s.taken_at for s in seen))
        exits = worst(f.exit_code for f in judge("postgres", seen, schedule, now, GOOD))
        if now >= missed + MOST_GRACE:
            assert exits is Exit.BAD_BACKUP
        if took <= 2 and now >= missed + GRACE:
            assert exits is Exit.BAD_BACKUP
        if now < missed + GRACE:
            assert exits is Exit.OK

    @given(schedules, moments, st.integers(0, 20 * 24))
    def test_the_first_line_says_two_days_only_when_it_is_true(
        self, schedule: Schedule, died: datetime, later: int
    ) -> None:
        seen, now = ran(schedule, died), died + later * HOUR
        age = now - max(s.taken_at for s in seen)
        first, second = judge("postgres", seen, schedule, now, GOOD)[:2]
        assert (first.code == "stale") == (age > 2 * DAY)
        assert first.type == "daily"
        weekly = max(s.taken_at for s in seen if s.type == "weekly")
        assert second.type == "weekly"
        if second.code == "stale":
            assert now - weekly > 7 * DAY

    @given(schedules, moments, st.data())
    def test_a_weekly_that_was_left_out_is_told(
        self, schedule: Schedule, now: datetime, data: st.DataObject
    ) -> None:
        seen = [s for s in ran(schedule, now) if s.type == "daily" or now - s.taken_at > 7 * DAY + GRACE]
        assume(any(s.type == "weekly" for s in seen))
        found = judge("postgres", seen, schedule, now, GOOD)
        last = schedule.last(now - GRACE, weekly=True)
        assert last > now - 8 * DAY
        assert [f.code for f in found if f.type == "weekly"] == ["stale"]

    @given(schedules, moments, st.integers(0, 6 * 24))
    def test_a_young_store_is_not_stale_before_its_first_due_time(
        self, schedule: Schedule, born: datetime, later: int
    ) -> None:
        now = born + later * HOUR
        found = judge("postgres", [backup(born, "manual")], schedule, now, GOOD)
        first = schedule.next(born - timedelta(seconds=1))
        if now < first + GRACE:
            assert found[0].code == "not-due"
        if now >= first + GRACE:
            assert found[0].code == "missing"


class TestLines:
    """2026-11-22 is a Sunday."""

    def test_are_todays(self) -> None:
        now = MONDAY + 2 * DAY + 5 * HOUR
        assert said(ran(NIGHT, now), now) == [
            "[OK] Last daily postgres backup is daily_11_25",
            "[OK] Last weekly postgres backup is weekly_11_22",
        ]

    @pytest.mark.parametrize("hour", [0, 16, 22])
    def test_monday_is_no_false_alarm(self, hour: int) -> None:
        schedule = Schedule(hour, UTC)
        for check in range(3, 24, 4):
            now = MONDAY + check * HOUR
            assert codes(ran(schedule, now, timedelta(hours=3.9)), now, schedule) == ["newest", "newest"]

    def test_old_backups_are_told_with_their_age(self) -> None:
        now = MONDAY + 14 * DAY
        first, second, *hints = said(ran(NIGHT, MONDAY + 2 * DAY + 2 * HOUR), now)
        assert (
            first
            == "[ALERT] No daily postgres backup in last two days: the last one is 12 days old (daily_11_25)"
        )
        assert second == (
            "[ALERT] No weekly postgres backup in last seven days: the last one is 15 days old (weekly_11_22)"
        )
        assert hints[0].startswith("  next: run_backup postgres --type daily")
        assert len(hints) == 2

    def test_one_that_was_due_is_told_before_two_days_are_over(self) -> None:
        now = MONDAY + DAY + GRACE
        first, second, third, *_ = said(ran(NIGHT, MONDAY + HOUR), now)
        assert first == "[OK] Last daily postgres backup is daily_11_23"
        assert second == "[OK] Last weekly postgres backup is weekly_11_22"
        assert third == (
            "[ALERT] The daily postgres backup that was due 2026-11-24T00:00:00Z (nadir_hour 0) is not there: "
            "the last one is 28 hours old (daily_11_23)"
        )
        before = now - timedelta(seconds=1)
        assert codes(ran(NIGHT, MONDAY + HOUR), before) == ["newest", "newest"]

    def test_an_empty_bucket(self) -> None:
        first, second, *_ = said([], MONDAY)
        assert first == "[ALERT] No daily postgres backup in last two days: bucket bucket has none at all"
        assert second == "[ALERT] No weekly postgres backup in last seven days: bucket bucket has none at all"

    def test_another_hosts_backups_are_named(self) -> None:
        other = backup(MONDAY, host="pg9")
        first, *_ = said([], MONDAY + HOUR, elsewhere=other)
        assert first.endswith("has none of this host, the newest is of pg9 (daily_11_23)")

    def test_a_young_store(self) -> None:
        assert said([backup(MONDAY + HOUR)], MONDAY + 2 * HOUR) == [
            "[OK] Last daily postgres backup is daily_11_23",
            "[OK] No weekly postgres backup is due yet: the first one is due 2026-11-29T00:00:00Z",
        ]

    def test_of_untrusted_keys_are_harmless(self) -> None:
        evil = backup(MONDAY, problem=Problem("gone", "a\x1b[2J\nRESULT ok \u202e is gone"))
        for line in said([evil], MONDAY + HOUR):
            assert line.isprintable()
        assert one_line("a\nb\r\x00\ud800") == "a b???"


class TestDamage:
    NOW = MONDAY + 3 * DAY + 6 * HOUR

    def found(self, *changed: Seen) -> list[Finding]:
        there = {s.key: s for s in ran(NIGHT, self.NOW)} | {s.key: s for s in changed}
        return list(judge("postgres", list(there.values()), NIGHT, self.NOW, GOOD))

    def test_of_the_newest_takes_it_out_of_the_count(self) -> None:
        gone = backup(MONDAY + 3 * DAY, problem=Problem("gone", "daily_11_26 is gone"))
        found = self.found(gone)
        assert [(f.code, f.key) for f in found] == [
            ("newest", "daily_11_25"),
            ("newest", "weekly_11_22"),
            ("late", "daily_11_25"),
            ("gone", "daily_11_26"),
        ]
        assert found[3].line == "[ALERT] daily_11_26 is gone"
        assert found[3].age == 6 * 3600

    def test_of_all_is_said(self) -> None:
        bad = backup(MONDAY, problem=Problem("gone", "it is gone"))
        first, *_ = said([bad], self.NOW)
        assert first.endswith("in last two days: the last one is damaged (daily_11_23)")

    @pytest.mark.parametrize(
        ("code", "days", "told"),
        [("gone", 6, True), ("gone", 9, False), ("manifest-unusable", 9, False), ("size-differs", 9, True)],
    )
    def test_of_old_ones_is_told_while_they_must_be_there(self, code: str, days: int, told: bool) -> None:
        old = backup(MONDAY + 3 * DAY - days * DAY, problem=Problem(code, "x"))
        assert (code in {f.code for f in self.found(old)}) is told

    @pytest.mark.parametrize(("size", "told"), [(0, True), (20, True), (127, True), (128, False)])
    def test_a_dump_that_failed_is_empty(self, size: int, told: bool) -> None:
        seen = [replace_size(s, size) for s in ran(NIGHT, self.NOW)]
        assert ("empty" in codes(seen, self.NOW)) is told

    def test_many_are_counted(self) -> None:
        bad = [backup(self.NOW - n * HOUR, problem=Problem("gone", f"{n}")) for n in range(25)]
        found = [f for f in judge("postgres", bad, NIGHT, self.NOW, GOOD) if f.severity == "alert"]
        assert found[-1].line == "[ALERT] 15 more backups are damaged"


def replace_size(seen: Seen, size: int) -> Seen:
    return backup(seen.taken_at, seen.type, size)


class TestShrinking:
    NOW = MONDAY + 3 * DAY + 6 * HOUR

    def sized(self, *sizes: int, **last: object) -> list[Finding]:
        """Return what is found when the last backups have these sizes, newest last."""
        days = [s.taken_at for s in ran(NIGHT, self.NOW)][-len(sizes) :]
        seen = [backup(d, size=n, form="plain gzip") for d, n in zip(days[:-1], sizes, strict=False)]
        seen.append(backup(days[-1], size=sizes[-1], **last))
        return [f for f in judge("postgres", seen, NIGHT, self.NOW, GOOD) if f.code == "shrunk"]

    def test_is_told_with_both_sizes(self) -> None:
        (found,) = self.sized(100 << 20, 104 << 20, 30 << 20)
        assert found.line == (
            "[ALERT] daily_11_26 is much smaller than the ones before: 30.0 MiB, 30 % of 100.0 MiB"
        )
        assert (found.size, found.usual_size) == (30 << 20, 100 << 20)

    def test_to_half_is_none(self) -> None:
        assert self.sized(1000, 1000, 500) == []
        assert len(self.sized(1000, 1000, 499)) == 1

    def test_one_odd_backup_before_does_not_count(self) -> None:
        assert self.sized(1000, 1000, 90_000, 900) == []

    def test_that_is_meant_ends_by_itself(self) -> None:
        assert len(self.sized(9000, 9000, 9000, 1000, 1000)) == 1
        assert self.sized(9000, 9000, 1000, 1000, 1000, 1000) == []

    def test_another_form_is_no_shrinking(self) -> None:
        assert self.sized(9000, 9000, 1000, form="dump gzip") == []
        assert self.sized(1000) == []


class TestVersions:
    @pytest.mark.parametrize(
        ("versioned", "fixed", "code", "exits"),
        [
            (True, True, None, Exit.OK),
            (False, True, "unversioned", Exit.BAD_BACKUP),
            (None, True, "versioning-unknown", Exit.OK),
            (False, False, None, Exit.OK),
            (None, False, None, Exit.OK),
        ],
    )
    def test_are_needed_for_fixed_keys(
        self, versioned: bool | None, fixed: bool, code: str | None, exits: Exit
    ) -> None:
        facts = BucketFacts("b", versioned, "it was never switched on", fixed)
        now = MONDAY + 5 * HOUR
        found = judge("postgres", ran(NIGHT, now), NIGHT, now, facts)
        assert [f.code for f in found[2:]] == ([code] if code else [])
        assert worst(f.exit_code for f in found) is exits


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        ([], Exit.OK),
        ([Exit.OK, Exit.USAGE], Exit.USAGE),
        ([Exit.USAGE, Exit.ERROR], Exit.ERROR),
        ([Exit.ERROR, Exit.BAD_BACKUP, Exit.USAGE], Exit.BAD_BACKUP),
        ([Exit.UPLOAD_FAILED, Exit.OK], Exit.ERROR),
    ],
)
def test_the_worst_counts(given_: list[Exit], expected: Exit) -> None:
    assert worst(given_) is expected


@pytest.mark.parametrize(
    ("age", "words"),
    [
        (-5, "0 minutes"),
        (59, "0 minutes"),
        (60, "1 minute"),
        (3600, "1 hour"),
        (172_799, "47 hours"),
        (172_800, "2 days"),
    ],
)
def test_ages(age: int, words: str) -> None:
    assert age_words(timedelta(seconds=age)) == words
