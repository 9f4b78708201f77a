"""How a store stands is told from records alone, in a number of queries that does not grow."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext

from hq_backups import conf, history
from hq_backups.models import Artifact, BackupRun

pytestmark = pytest.mark.django_db

# A Wednesday.
NOW = datetime(2026, 11, 25, 12, 0, tzinfo=UTC)
SETTINGS = {
    "deploy_env": "demo",
    "timezone": "UTC",
    "backup_postgres": "plain",
    "backup_host_name": "pg0",
    "backup_hosts": {"pg0": ["postgres"]},
}


def resolved(**changes: Any) -> conf.Resolved:
    return conf.resolve(SimpleNamespace(HQ_BACKUPS=SETTINGS | changes), {})


def ago(**span: float) -> datetime:
    return NOW - timedelta(**span)


def backed_up(at: datetime, type: str = "daily", **changes: Any) -> Artifact:
    store, host = changes.get("store", "postgres"), changes.get("host", "pg0")
    run = f"{at:%Y%m%dT%H%M%SZ}-{host}-{store}"
    BackupRun.objects.create(
        run=run, verb="backup", store=store, type=type, host=host, started_at=at, status="ok", seconds=61.5
    )
    fields = {"store": store, "host": host, "size": 5 << 30, "locations": [{"kind": "local"}, {"kind": "s3"}]}
    return Artifact.objects.create(run=run, name=f"{store}_{run}", type=type, taken_at=at, **fields | changes)


def tried(at: datetime, verb: str = "backup", status: str = "failed", **changes: Any) -> BackupRun:
    fields = {"store": "postgres", "host": "pg0", "type": "daily"} | changes
    return BackupRun.objects.create(
        run=f"{at:%H%M%S}{verb}{status}", verb=verb, started_at=at, status=status, **fields
    )


def standing(**changes: Any) -> history.Standing:
    (found,) = history.standings(resolved(**changes), NOW)
    return found


def test_the_newest_good_backup_of_each_type_is_told_with_size_time_and_places() -> None:
    backed_up(ago(days=2))
    newest = backed_up(ago(hours=12))
    backed_up(ago(days=3.5), "weekly", verified_at=ago(days=1))
    found = standing()
    daily = found.last_good["daily"]
    assert (daily.name, daily.run, daily.taken_at) == (newest.name, newest.run, ago(hours=12))
    assert (daily.size, daily.seconds, daily.places) == (5 << 30, 61.5, ("local", "s3"))
    assert found.last_good["weekly"].verified_at == found.verified_at == ago(days=1)
    assert (found.state, found.late, found.last_failed, found.running) == ("ok", (), None, None)
    assert found.next_due is not None
    assert found.next_due.due == datetime(2026, 11, 26, tzinfo=UTC)


def test_what_was_pruned_or_is_damaged_or_not_ours_is_no_last_good() -> None:
    good = backed_up(ago(days=3.5), "weekly")
    backed_up(ago(hours=1), gone_at=NOW)
    backed_up(ago(hours=2), problem="shorter than its manifest says")
    backed_up(ago(hours=3), managed=False)
    assert {each.name for each in standing().last_good.values()} == {good.name}


def test_a_failed_run_counts_until_a_good_one_comes_after_it() -> None:
    backed_up(ago(hours=36))
    failed = tried(ago(hours=12))
    assert (standing().state, standing().last_failed) == ("failed", failed)
    backed_up(ago(hours=11))
    assert (standing().state, standing().last_failed) == ("ok", None)


def test_one_that_was_due_is_late_only_after_its_grace_and_when_none_runs() -> None:
    backed_up(datetime(2026, 11, 24, tzinfo=UTC))
    backed_up(datetime(2026, 11, 22, tzinfo=UTC), "weekly")
    settings = resolved()

    def at(hour: int) -> history.Standing:
        return history.standings(settings, datetime(2026, 11, 25, hour, tzinfo=UTC))[0]

    assert at(3).late == ()
    assert (at(5).state, at(5).late) == ("late", ("daily",))
    run = tried(datetime(2026, 11, 25, 0, 1, tzinfo=UTC), status="running")
    assert (at(5).state, at(5).running) == ("ok", run)


def test_the_weekly_backup_is_that_days_daily() -> None:
    backed_up(datetime(2026, 11, 22, tzinfo=UTC), "weekly")
    (sunday,) = history.standings(resolved(), datetime(2026, 11, 22, 23, tzinfo=UTC))
    assert sunday.late == ()
    assert standing().late == ("daily",)


def test_a_store_younger_than_its_first_sunday_lacks_no_weekly() -> None:
    tried(datetime(2026, 11, 23, 9, tzinfo=UTC), status="ok")
    backed_up(ago(hours=12))
    assert standing().state == "ok"


def test_a_store_that_never_had_a_weekly_is_late_once_a_sunday_passed() -> None:
    tried(datetime(2026, 11, 20, 9, tzinfo=UTC), status="ok")
    backed_up(ago(hours=12))
    assert standing().late == ("weekly",)


def test_no_backup_at_all_and_a_store_switched_off_are_said() -> None:
    assert standing().state == "none"
    backed_up(ago(hours=12), store="blobdb", host="blob0")
    off, on = sorted(history.standings(resolved(), NOW), key=lambda s: s.store)
    assert (off.store, off.state, off.next_due) == ("blobdb", "off", None)
    assert (on.store, on.state) == ("postgres", "none")


def test_each_host_that_the_records_know_stands_for_itself() -> None:
    backed_up(ago(hours=12))
    backed_up(ago(hours=36), host="pg1")
    backed_up(ago(days=200), host="pg-renamed")
    found = history.standings(resolved(backup_hosts=None, postgresql_data_dir="/nowhere"), NOW)
    assert [(each.host, each.state) for each in found] == [("pg0", "ok"), ("pg1", "late")]


def test_the_last_restore_or_deep_verify_tells_how_long_a_restore_takes() -> None:
    assert standing().restored_in is None
    tried(ago(days=5), "restore", "ok", seconds=300.0, host="pg-new")
    tried(ago(days=4), "restore", "failed", seconds=1.0)
    tried(ago(days=3), "verify", "ok", seconds=2.0, facts={"deep": False})
    assert standing().restored_in == 300.0
    deep = tried(ago(days=2), "verify", "warning", seconds=200.0, facts={"deep": True})
    assert (standing().restored_in, standing().restored_by) == (200.0, deep)


def test_the_curve_has_the_last_good_runs_oldest_first() -> None:
    for day in range(5, 0, -1):
        backed_up(ago(days=day))
    tried(ago(hours=1))
    backed_up(ago(hours=2), host="pg1")
    found = history.points([("postgres", "pg0"), ("couch", "couch0")], 3)
    assert [point.at for point in found["postgres", "pg0"]] == [ago(days=3), ago(days=2), ago(days=1)]
    assert found["couch", "couch0"] == []


def test_many_rows_take_no_more_queries_than_few() -> None:
    backed_up(ago(hours=12))
    settings = resolved()
    with CaptureQueriesContext(connection) as few:
        history.standings(settings, NOW)
    for hour in range(60):
        backed_up(ago(hours=20 + hour))
        tried(ago(days=2, minutes=hour))
    with CaptureQueriesContext(connection) as many:
        history.standings(settings, NOW)
    assert len(many) == len(few) == 5
