from __future__ import annotations

from dataclasses import replace
from datetime import UTC, date, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hq_backups.engine.config import TYPES, Retention
from hq_backups.engine.retention import Artifact, Decision, decide

NOW = datetime(2026, 11, 25, 2, 30, tzinfo=UTC)  # a Wednesday
TODAY = NOW.date()


def made(
    age: timedelta,
    type_: str = "daily",
    *,
    good: bool = True,
    managed: bool = True,
    now: datetime = NOW,
    **more: str,
) -> Artifact:
    at = now - age
    name = f"{more.get('store', 'postgres')}_{type_}_{at:%Y_%m_%d_%H%M%S}"
    facts = {"host": "pg0", "env": "prod", "store": "postgres"} | more
    return Artifact(name, type_, at.date(), at, good, managed, **facts)


def days(n: float) -> timedelta:
    return timedelta(days=n)


def kept(decisions: list[Decision]) -> list[int]:
    return [i for i, d in enumerate(decisions) if d.keep]


class TestAges:
    @pytest.mark.parametrize(("n", "ages"), [(0, [0]), (1, [0, 1]), (2, [0, 1, 2])])
    def test_n_days_keep_what_is_at_most_n_calendar_days_old(self, n: int, ages: list[int]) -> None:
        artifacts = [made(days(age)) for age in range(6)]
        assert kept(decide(artifacts, Retention(days=n), TODAY, NOW)) == ages

    def test_the_day_counts_not_the_hour(self) -> None:
        just_before_midnight = made(timedelta(hours=2, minutes=31))  # yesterday
        new = made(days(0))
        assert kept(decide([new, just_before_midnight], Retention(days=0), TODAY, NOW)) == [0]
        assert kept(decide([new, just_before_midnight], Retention(days=1), TODAY, NOW)) == [0, 1]

    def test_weeks_are_seven_days(self) -> None:
        artifacts = [made(days(age), "weekly") for age in (0, 7, 8, 14, 15)]
        assert kept(decide(artifacts, Retention(weeks=1), TODAY, NOW)) == [0, 1]
        assert kept(decide(artifacts, Retention(weeks=2), TODAY, NOW)) == [0, 1, 2, 3]

    def test_hours_are_exact_minutes(self) -> None:
        ages = [timedelta(0), timedelta(minutes=60, seconds=59), timedelta(minutes=61), timedelta(hours=3)]
        artifacts = [made(age, "hourly") for age in ages]
        assert kept(decide(artifacts, Retention(hours=1), TODAY, NOW)) == [0, 1]

    def test_a_failed_upload_keeps_one_day_more(self) -> None:
        for type_, limit in (("daily", days(1)), ("weekly", days(7)), ("hourly", timedelta(hours=1))):
            artifacts = [made(days(0), type_), made(limit + days(1), type_), made(limit + days(2), type_)]
            assert kept(decide(artifacts, Retention(), TODAY, NOW)) == [0]
            assert kept(decide(artifacts, Retention(), TODAY, NOW, extra_days=1)) == [0, 1]

    def test_todays_table_of_dailies(self) -> None:
        """legacy-backups.md section 4: N = 1, runs from Monday to Saturday."""
        saturday, monday = date(2026, 11, 21), date(2026, 11, 23)
        for day, left in ((monday, [monday]), (monday + days(1), [monday, monday + days(1)])):
            now = datetime(day.year, day.month, day.day, 1, tzinfo=UTC)
            runs = [saturday, *(monday + days(n) for n in range((day - monday).days + 1))]
            artifacts = [made(days((day - run).days), now=now) for run in runs]
            decisions = decide(artifacts, Retention(days=1), day, now)
            assert [d.artifact.local_date for d in decisions if d.keep] == left

    def test_manual_ones_go_only_when_asked(self) -> None:
        artifacts = [made(days(age), "manual") for age in (1, 400, 500)]
        assert kept(decide(artifacts, Retention(), TODAY, NOW)) == [0, 1, 2]
        assert kept(decide(artifacts, Retention(), TODAY, NOW, manual_older_than=400)) == [0, 1]
        assert kept(decide(artifacts, Retention(), TODAY, NOW, manual_older_than=0)) == [0]

    def test_an_unknown_type_stays(self) -> None:
        assert kept(
            decide([made(days(900), "yearly"), made(days(800), "yearly")], Retention(), TODAY, NOW)
        ) == [0, 1]


class TestNewestGood:
    def test_it_stays_however_old(self) -> None:
        old, older = made(days(300)), made(days(301))
        decisions = decide([older, old], Retention(), TODAY, NOW)
        assert kept(decisions) == [1]
        assert decisions[1].reason == "It is the newest good daily backup, which is never removed."

    def test_a_failed_newer_one_does_not_replace_it(self) -> None:
        artifacts = [made(days(0), good=False), made(days(5), good=False), made(days(10)), made(days(11))]
        decisions = decide(artifacts, Retention(days=2), TODAY, NOW)
        assert kept(decisions) == [0, 2]
        assert decisions[1].reason.endswith("It was damaged anyway.")

    @pytest.mark.parametrize("other", [{"store": "couch"}, {"host": "pg1"}, {"env": "staging"}])
    def test_each_store_host_and_environment_has_its_own(self, other: dict[str, str]) -> None:
        artifacts = [made(days(0)), made(days(100)), made(days(100), **other), made(days(101), **other)]
        assert kept(decide(artifacts, Retention(), TODAY, NOW)) == [0, 2]

    def test_a_weekly_does_not_stand_in_for_a_daily(self) -> None:
        assert kept(decide([made(days(0), "weekly"), made(days(100))], Retention(), TODAY, NOW)) == [0, 1]

    def test_an_old_scripts_file_stays_until_there_is_a_good_one(self) -> None:
        unmanaged = [made(days(30), good=False, managed=False), made(days(31), good=False, managed=False)]
        assert kept(decide(unmanaged, Retention(), TODAY, NOW)) == [0]
        assert kept(decide([*unmanaged, made(days(0))], Retention(), TODAY, NOW)) == [2]
        assert kept(decide([*unmanaged, made(days(0), good=False)], Retention(), TODAY, NOW)) == [0, 2]


class TestClock:
    @pytest.mark.parametrize("ahead", [timedelta(minutes=6), timedelta(hours=23), days(400)])
    def test_an_artifact_from_the_future_stops_everything(self, ahead: timedelta) -> None:
        artifacts = [made(days(300)), made(days(200)), made(-ahead)]
        decisions = decide(artifacts, Retention(), TODAY, NOW)
        assert kept(decisions) == [0, 1, 2]
        assert all(
            d.reason.startswith(f"Nothing is removed: {artifacts[2].name} is newer") for d in decisions
        )

    def test_a_date_from_the_future_stops_everything(self) -> None:
        wrong = replace(made(days(0)), local_date=TODAY + days(2))
        assert kept(decide([wrong, made(days(300))], Retention(), TODAY, NOW)) == [0, 1]

    def test_a_little_skew_between_hosts_does_not(self) -> None:
        assert kept(decide([made(-timedelta(minutes=4)), made(days(300))], Retention(), TODAY, NOW)) == [0]


moments = st.datetimes(datetime(2015, 1, 1), datetime(2045, 1, 1), timezones=st.just(UTC))
retentions = st.builds(
    Retention, days=st.integers(0, 40), weeks=st.integers(0, 10), hours=st.integers(0, 100)
)


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[Artifact], datetime]:
    now = draw(moments)
    ages = st.integers(0, 3 * 365 * 1440).map(lambda m: timedelta(minutes=m))
    artifact = st.builds(
        lambda age, type_, good, managed, host: made(
            age, type_, good=good and managed, managed=managed, now=now, host=host
        ),
        ages, st.sampled_from(TYPES), st.booleans(), st.booleans(), st.sampled_from(["a", "b"]),
    )  # fmt: skip
    return draw(st.lists(artifact, max_size=30)), now


@given(histories(), retentions, st.integers(0, 1), st.none() | st.integers(0, 1000))
def test_every_group_keeps_its_newest_good_one(
    history: tuple[list[Artifact], datetime], retention: Retention, extra: int, manual: int | None
) -> None:
    artifacts, now = history
    decisions = decide(artifacts, retention, now.date(), now, extra_days=extra, manual_older_than=manual)
    assert [d.artifact for d in decisions] == artifacts
    for group in {a.group for a in artifacts if a.good}:
        newest = max(a.taken_at for a in artifacts if a.good and a.group == group)
        assert any(d.keep and d.artifact.taken_at == newest and d.artifact.good for d in decisions)
    assert all(d.reason.endswith(".") for d in decisions)


@given(histories(), retentions)
def test_failed_ones_change_nothing_for_the_others(
    history: tuple[list[Artifact], datetime], retention: Retention
) -> None:
    artifacts, now = history
    whole = [a for a in artifacts if a.good or not a.managed]
    with_failed = decide(artifacts, retention, now.date(), now)
    without = decide(whole, retention, now.date(), now)
    assert [d for d in with_failed if d.artifact.good or not d.artifact.managed] == without


@given(histories(), retentions)
def test_longer_retention_and_a_failed_upload_never_remove_more(
    history: tuple[list[Artifact], datetime], retention: Retention
) -> None:
    artifacts, now = history
    short = set(kept(decide(artifacts, retention, now.date(), now)))
    longer = Retention(retention.days + 1, retention.weeks + 1, retention.hours + 1)
    assert short <= set(kept(decide(artifacts, longer, now.date(), now)))
    assert short <= set(kept(decide(artifacts, retention, now.date(), now, extra_days=1)))


@given(histories(), retentions, st.integers(6, 10**6))
def test_a_clock_that_jumped_back_removes_nothing(
    history: tuple[list[Artifact], datetime], retention: Retention, minutes: int
) -> None:
    artifacts, now = history
    artifacts = [*artifacts, made(timedelta(0), now=now)]
    back = now - timedelta(minutes=minutes)
    assert all(d.keep for d in decide(artifacts, retention, back.date(), back, manual_older_than=0))


@given(moments, st.integers(0, 10), st.integers(1, 400))
def test_years_of_daily_runs_settle_at_n_plus_one(start: datetime, n: int, nights: int) -> None:
    alive: list[Artifact] = []
    for night in range(nights):
        now = start + days(night)
        alive = [*alive, made(timedelta(0), now=now)]
        alive = [d.artifact for d in decide(alive, Retention(days=n), now.date(), now) if d.keep]
        assert len(alive) == min(night, n) + 1


@given(histories(), retentions)
def test_pruning_twice_is_pruning_once(
    history: tuple[list[Artifact], datetime], retention: Retention
) -> None:
    artifacts, now = history
    left = [d.artifact for d in decide(artifacts, retention, now.date(), now, manual_older_than=9) if d.keep]
    assert all(d.keep for d in decide(left, retention, now.date(), now, manual_older_than=9))
