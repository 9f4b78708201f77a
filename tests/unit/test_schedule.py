from __future__ import annotations

from collections import Counter
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from types import SimpleNamespace
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hq_backups import conf
from hq_backups.schedule import COUNTS, Slot, Timetable, due, is_covered, timetable

ZONES = ("UTC", "Europe/London", "America/New_York", "Asia/Kolkata", "Australia/Lord_Howe")
DAY = timedelta(days=1)
HOUR = timedelta(hours=1)
TICK = timedelta(minutes=10)
REGULAR = ("daily", "weekly")

zones = st.sampled_from(ZONES).map(ZoneInfo)
hours = st.integers(0, 23)
moments = st.datetimes(datetime(2019, 1, 1), datetime(2031, 1, 1)).map(
    lambda naive: naive.replace(tzinfo=UTC)
)


def table(zone: str = "UTC", nadir_hour: int = 0, hourly_every: int | None = None) -> Timetable:
    return Timetable("postgres", ZoneInfo(zone), nadir_hour, hourly_every)


def utc(*parts: int) -> datetime:
    return datetime(*parts, tzinfo=UTC)  # type: ignore[misc,arg-type]


def slot(type_: str, moment: datetime) -> Slot:
    return Slot("postgres", type_, moment)


def types(found: list[Slot]) -> list[str]:
    return [each.type for each in found]


@given(zone=zones, hour=hours, start=st.dates(date(2015, 1, 1), date(2032, 1, 1)))
@settings(max_examples=60)
def test_every_local_date_of_a_year_has_exactly_one_regular_backup_in_due_order(
    zone: ZoneInfo, hour: int, start: date
) -> None:
    each = Timetable("postgres", zone, hour)
    found = [(day, list(each.of_date(day))) for day in (start + n * DAY for n in range(366))]
    moments_due = [slots[0].due for _, slots in found]
    assert all(len(slots) == 1 for _, slots in found)
    assert all(slots[0].type == ("weekly" if day.isoweekday() == 7 else "daily") for day, slots in found)
    assert [s[0].due.astimezone(zone).date() for _, s in found] == [day for day, _ in found]
    assert moments_due == sorted(set(moments_due))
    assert all(22 * HOUR <= b - a <= 26 * HOUR for a, b in pairwise(moments_due))


@given(zone=zones, hour=hours, every=st.sampled_from([None, 1, 3, 5, 24]), start=moments, data=st.data())
@settings(max_examples=60, deadline=None)
def test_nothing_is_missed_or_made_twice_however_the_ticks_fall(
    zone: ZoneInfo, hour: int, every: int | None, start: datetime, data: st.DataObject
) -> None:
    each = Timetable("postgres", zone, hour, every)
    gaps = st.one_of(st.just(TICK), st.timedeltas(timedelta(seconds=1), timedelta(days=9)))
    now, made, done = start, Counter[Slot](), list[Slot]()
    for gap in data.draw(st.lists(gaps, min_size=1, max_size=12)):
        now += gap
        begun = due(each, done, now)
        # One that counts for another is never begun beside it.
        assert types(begun) in (
            [],
            ["daily"],
            ["weekly"],
            ["hourly"],
            ["daily", "hourly"],
            ["weekly", "hourly"],
        )
        for one in begun:
            assert one.due <= now
            made[one] += 1
            done.append(slot(one.type, now))
        for type_ in COUNTS:
            newest = each.last(now, type_)
            assert newest is None or is_covered(newest, done)
        assert due(each, done, now) == []
    assert set(made.values()) <= {1}


@given(zone=zones, hour=hours, start=moments)
@settings(max_examples=8, deadline=None)
def test_a_dispatcher_that_never_sleeps_makes_each_dates_backup_within_one_tick(
    zone: ZoneInfo, hour: int, start: datetime
) -> None:
    each = Timetable("postgres", zone, hour)
    done, late, now = [slot("weekly", start)], list[timedelta](), start
    begun = Counter[date]()
    while now < start + 9 * DAY:
        now += TICK
        for one in due(each, done, now):
            done.append(slot(one.type, now))
            late.append(now - one.due)
            begun[one.due.astimezone(zone).date()] += 1
    assert max(late) < TICK
    assert set(begun.values()) == {1}
    assert len(begun) == 9


@given(zone=zones, hour=hours, every=st.sampled_from([1, 2, 3, 7]), now=moments)
@settings(max_examples=80, deadline=None)
def test_next_and_last_leave_no_slot_between_them(
    zone: ZoneInfo, hour: int, every: int, now: datetime
) -> None:
    each = Timetable("postgres", zone, hour, every)
    later = each.next(now)
    assert now < later.due
    assert each.last(later.due - timedelta(microseconds=1), later.type) == each.last(now, later.type)
    assert later in [each.last(later.due, type_) for type_ in COUNTS]


def test_sunday_has_a_weekly_one_and_neither_a_daily_nor_hourly_ones() -> None:
    sunday = utc(2026, 11, 22, 12)
    each = table(hourly_every=3)
    assert each.last(sunday, "weekly") == slot("weekly", utc(2026, 11, 22))
    assert each.last(sunday, "daily") is None
    assert each.last(sunday, "hourly") == slot("hourly", utc(2026, 11, 21, 21, 15))
    assert each.next(sunday, "hourly") == slot("hourly", utc(2026, 11, 23, 0, 15))
    assert each.next(sunday) == slot("daily", utc(2026, 11, 23))


def test_hourly_ones_that_are_off_are_never_due() -> None:
    assert table().last(utc(2026, 11, 25), "hourly") is None


@pytest.mark.parametrize(
    ("zone", "hour", "day", "moment"),
    [
        ("America/New_York", 2, date(2026, 3, 8), utc(2026, 3, 8, 7)),  # 02:00 is skipped: 03:00 summer time
        ("America/New_York", 1, date(2026, 11, 1), utc(2026, 11, 1, 5)),  # 01:00 comes twice: the first
        ("Australia/Lord_Howe", 2, date(2026, 10, 4), utc(2026, 10, 3, 15, 30)),  # half an hour is skipped
        ("Europe/London", 1, date(2026, 3, 29), utc(2026, 3, 29, 1)),
        ("Africa/Cairo", 0, date(2026, 4, 24), utc(2026, 4, 23, 22)),  # midnight itself is skipped
    ],
)
def test_a_local_time_that_is_skipped_or_repeated_is_one_moment(
    zone: str, hour: int, day: date, moment: datetime
) -> None:
    assert [each.due for each in table(zone, hour).of_date(day)] == [moment]


def test_a_date_that_a_zone_left_out_has_no_backup_of_its_own() -> None:
    samoa = table("Pacific/Apia")
    assert list(samoa.of_date(date(2011, 12, 30))) == []
    assert len(list(samoa.of_date(date(2011, 12, 31)))) == 1


def test_a_missed_weekly_one_is_caught_up_and_counts_for_the_daily_one_that_is_due_too() -> None:
    tuesday = utc(2026, 11, 24, 9)
    done = [slot("weekly", utc(2026, 11, 15)), slot("daily", utc(2026, 11, 21))]
    assert due(table(), done, tuesday) == [slot("weekly", utc(2026, 11, 22))]
    assert due(table(), [*done, slot("weekly", tuesday)], tuesday + TICK) == []


def test_a_daily_one_does_not_stand_for_the_weekly_one() -> None:
    sunday = utc(2026, 11, 22, 0, 10)
    assert types(due(table(), [slot("daily", utc(2026, 11, 22, 0, 1))], sunday)) == ["weekly"]


def test_a_run_by_cron_counts_and_one_of_another_store_or_by_hand_does_not() -> None:
    monday = utc(2026, 11, 23, 0, 10)
    done = [slot("weekly", utc(2026, 11, 22, 0, 0, 2))]
    assert due(table(), [*done, slot("daily", utc(2026, 11, 23, 0, 0, 2))], monday) == []
    for other in (slot("manual", monday), Slot("couch", "daily", monday), slot("hourly", monday)):
        assert types(due(table(), [*done, other], monday)) == ["daily"]


def test_a_run_from_the_future_of_a_wrong_clock_stops_no_backup() -> None:
    monday = utc(2026, 11, 23, 0, 10)
    done = [slot("weekly", utc(2026, 11, 22)), slot("daily", utc(2031, 1, 1))]
    assert types(due(table(), done, monday)) == ["daily"]


def test_only_the_newest_missed_hourly_one_is_caught_up() -> None:
    done = [slot("weekly", utc(2026, 11, 22)), slot("daily", utc(2026, 11, 23))]
    now = utc(2026, 11, 23, 14)
    assert due(table(hourly_every=3), done, now) == [slot("hourly", utc(2026, 11, 23, 12, 15))]


def test_the_settings_make_the_timetable_and_elasticsearch_is_four_hours_later() -> None:
    given_settings = {
        "deploy_env": "icds",
        "nadir_hour": 22,
        "nadir_hour_frequency": 6,
        "timezone": "Asia/Kolkata",
        "postgres_backup_hourly": True,
        "es_local_repo": True,
    }
    resolved = conf.resolve(SimpleNamespace(HQ_BACKUPS=given_settings), {})
    assert timetable(resolved, "postgres") == Timetable("postgres", ZoneInfo("Asia/Kolkata"), 22, 6)
    assert timetable(resolved, "elasticsearch") == Timetable("elasticsearch", ZoneInfo("Asia/Kolkata"), 2)
