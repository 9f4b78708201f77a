"""What is due is claimed once and handed over; what fails or dies is tried again; nothing else is."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from hq_backups import claims, conf, detached, dispatch, reaper, tasks
from hq_backups.claims import MAX_ATTEMPTS, Claim
from hq_backups.engine.errors import Exit
from hq_backups.models import Artifact, BackupRun, DueRun
from hq_backups.process_id import ProcessId
from tests import factories

pytestmark = pytest.mark.django_db
MONDAY = datetime(2026, 11, 23, 0, 0, 5, tzinfo=UTC)
TICK = timedelta(minutes=10)
HOUR = timedelta(hours=1)
State = DueRun.State


class Handed:
    """Takes what the dispatcher hands over, and is down when told so."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, str]] = []
        self.reaped: list[str] = []
        self.down = False

    def run(self, arguments: tuple[str], queue: str) -> None:
        if self.down:
            raise ConnectionError("no broker")
        self.sent.append((queue, arguments[0]))

    def reap(self, queue: str) -> None:
        self.reaped.append(queue)

    def start(self, resolved: Any, words: list[str]) -> None:
        self.sent.append(("detached", words[-1]))


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch, settings: Any, tmp_path: Path) -> Handed:
    taker = Handed()
    monkeypatch.setattr(tasks.run_due, "apply_async", taker.run)
    monkeypatch.setattr(tasks.reap_runs, "apply_async", taker.reap)
    monkeypatch.setattr(detached, "start", taker.start)
    settings.HQ_BACKUPS = factories.scheduled_blobs(tmp_path)
    return taker


def tick(now: datetime) -> list[Claim]:
    return dispatch.dispatch(conf.resolve(), now)


def weekly(started: datetime, **more: Any) -> BackupRun:
    """Record a backup that a cron job made, so that only what the test speaks of is due."""
    facts = {"verb": "backup", "store": "blobdb", "type": "weekly", "host": "here", "status": "ok", **more}
    return BackupRun.objects.create(run=f"{started:%Y%m%dT%H%M%SZ}-here-blobdb", started_at=started, **facts)


@pytest.fixture
def last_week() -> None:
    weekly(MONDAY - timedelta(days=1))


@pytest.mark.usefixtures("last_week")
class TestWhatIsDue:
    def test_is_claimed_once_however_often_the_clock_ticks(self, handed: Handed) -> None:
        (claim,) = tick(MONDAY)
        assert [tick(MONDAY + n * timedelta(minutes=1)) for n in range(25)] == [[]] * 25
        row = DueRun.objects.get()
        assert (row.host, row.store, row.type, row.due_at) == (
            "here",
            "blobdb",
            "daily",
            MONDAY.replace(second=0),
        )
        assert handed.sent == [("detached", str(claim))]

    def test_is_not_made_again_where_cron_made_it(self, handed: Handed) -> None:
        weekly(MONDAY, type="daily")
        assert tick(MONDAY + TICK) == []

    def test_is_not_made_again_where_a_file_shows_that_it_was(self, handed: Handed) -> None:
        Artifact.objects.create(store="blobdb", type="daily", host="here", taken_at=MONDAY, name="x")
        assert tick(MONDAY + TICK) == []

    @pytest.mark.parametrize(
        "other",
        [
            {"status": "failed", "exit_code": 1},
            {"type": "manual"},
            {"host": "there"},
            {"store": "couch"},
            {"verb": "verify"},
        ],
    )
    def test_is_made_where_only_another_run_was(self, handed: Handed, other: dict[str, Any]) -> None:
        weekly(MONDAY, **{"type": "daily", **other})
        assert len(tick(MONDAY + TICK)) == 1

    def test_counts_as_made_when_only_its_upload_failed(self, handed: Handed) -> None:
        weekly(MONDAY, type="daily", status="failed", exit_code=int(Exit.UPLOAD_FAILED))
        assert tick(MONDAY + TICK) == []

    def test_waits_while_a_run_of_the_store_goes_on_and_not_for_ever(self, handed: Handed) -> None:
        weekly(MONDAY, type="manual", status="running", process=str(ProcessId.mine()))
        assert tick(MONDAY + TICK) == []
        assert len(tick(MONDAY + timedelta(hours=25))) == 1

    @pytest.mark.parametrize(("verb", "begun"), [("restore", 0), ("verify", 1)])
    def test_waits_for_a_restore_and_not_for_a_verification(
        self, handed: Handed, verb: str, begun: int
    ) -> None:
        weekly(MONDAY, verb=verb, status="running", process=str(ProcessId.mine()))
        assert len(tick(MONDAY + TICK)) == begun

    def test_of_a_store_with_broken_settings_stops_no_other(self, handed: Handed, settings: Any) -> None:
        settings.HQ_BACKUPS |= {
            "backup_couch": True,
            "couchdb2_port": "x",
            "backup_hosts": {"here": ["couch", "blobdb"]},
        }
        assert len(tick(MONDAY)) == 1

    def test_goes_to_the_queue_of_the_host_that_is_named_for_it(self, handed: Handed, settings: Any) -> None:
        settings.HQ_BACKUPS |= {"backup_hosts": {"there": ["blobdb"], "elsewhere": ["couch"]}}
        weekly(MONDAY - timedelta(days=1, minutes=-1), host="there")
        (claim,) = tick(MONDAY)
        assert handed.sent == [("hq_backups.there", str(claim))]

    def test_may_be_told_where_to_run(self, handed: Handed, settings: Any) -> None:
        settings.HQ_BACKUPS |= {"backup_run_in": "queue"}
        tick(MONDAY)
        assert [where for where, _ in handed.sent] == ["hq_backups.here"]

    def test_is_nothing_on_a_host_that_has_no_data(self, handed: Handed, settings: Any) -> None:
        settings.HQ_BACKUPS |= {"blobdb_dir_path": "/nonexistent/blobs"}
        assert tick(MONDAY) == []

    def test_that_the_broker_refused_is_handed_over_by_the_next_tick(
        self, handed: Handed, settings: Any
    ) -> None:
        settings.HQ_BACKUPS |= {"backup_run_in": "queue"}
        handed.down = True
        assert tick(MONDAY) == []
        handed.down = False
        assert len(tick(MONDAY + TICK)) == 1
        assert DueRun.objects.get().attempts == 0


@pytest.mark.usefixtures("last_week")
class TestAnAttempt:
    def test_is_taken_by_one(self, handed: Handed) -> None:
        (claim,) = tick(MONDAY)
        assert [claim.take("here") for _ in range(3)] == [True, False, False]

    def test_is_not_taken_on_another_host(self, handed: Handed) -> None:
        (claim,) = tick(MONDAY)
        assert not claim.take("there")
        assert DueRun.objects.get().state == State.QUEUED

    def test_that_failed_is_followed_by_two_more_apart_from_each_other(self, handed: Handed) -> None:
        now, began = MONDAY, []
        while now < MONDAY + 20 * HOUR:
            for claim in tick(now):
                assert claim.take("here")
                DueRun.objects.update(started_at=now)
                claim.end(Exit.ERROR)
                began.append(now)
            now += TICK
        assert len(began) == MAX_ATTEMPTS
        assert min(b - a for a, b in pairwise(began)) >= claims.RETRY_AFTER
        row = DueRun.objects.get()
        assert (row.state, row.attempts) == (State.FAILED, MAX_ATTEMPTS)

    def test_of_a_weekly_one_that_failed_is_waited_for_by_the_daily_one_that_it_counts_for(
        self, handed: Handed
    ) -> None:
        tuesday = MONDAY + timedelta(days=1)
        BackupRun.objects.all().delete()
        weekly(MONDAY - timedelta(days=8))
        now, began = tuesday, []
        while now < tuesday + 4 * HOUR:
            for claim in tick(now):
                assert claim.take("here")
                DueRun.objects.filter(pk=claim.pk).update(started_at=now)
                began.append(DueRun.objects.get(pk=claim.pk).type)
                claim.end(Exit.OK if began[-1] == "daily" else Exit.ERROR)
            now += TICK
        # Only when the weekly one is given up is there a daily one.
        assert began == ["weekly", "weekly", "weekly", "daily"]

    def test_that_met_another_run_is_none(self, handed: Handed) -> None:
        (claim,) = tick(MONDAY)
        claim.take("here")
        claim.end(Exit.LOCKED)
        row = DueRun.objects.get()
        assert (row.state, row.attempts) == (State.FAILED, 0)

    @pytest.mark.parametrize("code", [Exit.OK, Exit.UPLOAD_FAILED])
    def test_that_made_a_backup_is_done(self, handed: Handed, code: Exit) -> None:
        (claim,) = tick(MONDAY)
        claim.take("here")
        claim.end(code)
        assert DueRun.objects.get().state == State.DONE
        assert tick(MONDAY + 5 * HOUR) == []

    def test_of_an_older_message_finds_nothing_to_take(self, handed: Handed) -> None:
        (first,) = tick(MONDAY)
        first.take("here")
        first.end(Exit.ERROR)
        DueRun.objects.update(started_at=MONDAY)
        (second,) = tick(MONDAY + HOUR)
        assert not first.take("here")
        assert second.take("here")
        first.end(Exit.OK)
        assert DueRun.objects.get().state == State.RUNNING

    def test_that_nobody_takes_is_seen_and_handed_over_again_each_hour(self, handed: Handed) -> None:
        (claim,) = tick(MONDAY)
        assert claims.not_picked_up(MONDAY + timedelta(minutes=29)) == []
        for n in range(1, 24):
            tick(MONDAY + n * TICK)
        assert handed.sent == [("detached", str(claim))] * 4
        (waiting,) = claims.not_picked_up(MONDAY + timedelta(minutes=31))
        assert (waiting.queued_at, waiting.started_at) == (MONDAY, None)

    def test_that_waits_for_a_busy_host_is_no_sign_of_a_missing_worker(self, handed: Handed) -> None:
        tick(MONDAY)
        times = dict.fromkeys(("due_at", "queued_at", "started_at"), MONDAY)
        DueRun.objects.create(host="here", store="couch", type="daily", state=State.RUNNING, **times)
        assert claims.not_picked_up(MONDAY + HOUR) == []

    def test_of_yesterday_is_not_taken_once_todays_was_claimed(self, handed: Handed) -> None:
        (old,) = tick(MONDAY)
        (new,) = tick(MONDAY + timedelta(days=1))
        assert not old.take("here")
        assert len(claims.not_picked_up(MONDAY + timedelta(days=2))) == 2
        assert new.take("here")
        tick(MONDAY + timedelta(days=1, minutes=40))
        assert sorted(DueRun.objects.values_list("state", flat=True)) == [State.FAILED, State.RUNNING]

    def test_travels_as_text(self, handed: Handed) -> None:
        (claim,) = tick(MONDAY)
        assert Claim.parse(str(claim)) == claim
        with pytest.raises(ValueError, match="invalid"):
            Claim.parse("x")


@pytest.mark.usefixtures("last_week")
class TestARunThatDied:
    def dead(self) -> str:
        mine = ProcessId.mine()
        assert mine is not None
        return str(dataclasses.replace(mine, started="1"))

    def test_is_marked_as_killed_and_made_again(self, handed: Handed) -> None:
        (claim,) = tick(MONDAY)
        claim.take("here")
        run = weekly(MONDAY, type="daily", status="running", process=self.dead())
        claim.name_run(run.run)
        DueRun.objects.update(started_at=MONDAY)
        assert tick(MONDAY + TICK) == []
        run.refresh_from_db()
        assert (run.status, run.error, run.exit_code) == ("failed", "the run was killed", 1)
        assert "run_backup blobdb --type daily" in run.hint
        assert DueRun.objects.get().state == State.FAILED
        assert len(tick(MONDAY + HOUR)) == 1

    def test_is_left_to_its_own_host_which_is_asked(self, handed: Handed) -> None:
        run = weekly(MONDAY, host="there", status="running", process=self.dead())
        tick(MONDAY + TICK)
        run.refresh_from_db()
        assert run.status == "running"
        assert handed.reaped == ["hq_backups.there"]

    def test_before_it_could_write_anything_is_tried_again_too(self, handed: Handed) -> None:
        (claim,) = tick(MONDAY)
        claim.take("here")
        DueRun.objects.update(started_at=MONDAY)
        assert tick(MONDAY + timedelta(minutes=20)) == []
        assert len(tick(MONDAY + timedelta(minutes=40))) == 1

    def test_in_a_container_that_cannot_be_seen_counts_as_dead_after_two_days(self, handed: Handed) -> None:
        mine = ProcessId.mine()
        assert mine is not None
        run = weekly(MONDAY, status="running", process=str(dataclasses.replace(mine, namespace="1")))
        assert reaper.reap("here", MONDAY + timedelta(hours=47)) == []
        assert reaper.reap("here", MONDAY + timedelta(hours=49)) == [run.run]

    def test_and_wrote_its_end_before_is_left_as_it_ended(self, handed: Handed) -> None:
        (claim,) = tick(MONDAY)
        claim.take("here")
        run = weekly(MONDAY, type="daily", status="warning", exit_code=0, process=self.dead())
        claim.name_run(run.run)
        assert reaper.reap("here", MONDAY + TICK) == []
        assert DueRun.objects.get().state == State.DONE

    def test_while_it_restored_says_how_to_finish(self, handed: Handed) -> None:
        run = weekly(MONDAY, verb="restore", status="running", process=self.dead())
        reaper.reap("here", MONDAY)
        run.refresh_from_db()
        assert run.hint == "Finish or undo it: restore_backup blobdb --undo"

    def test_goes_on_is_left_alone(self, handed: Handed) -> None:
        weekly(MONDAY, status="running", process=str(ProcessId.mine()))
        assert reaper.reap("here", MONDAY + timedelta(days=9)) == []
