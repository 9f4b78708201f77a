"""The survey: each source that is dead becomes a problem, and ends no alarm that only it could see."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from django.test import override_settings

from hq_backups import alarm_state, alerts, conf, health, reaper, recorded
from hq_backups.alarm_state import Checked, Good, Outcome, State, Undelivered
from hq_backups.health import survey
from hq_backups.last_good import good_words
from hq_backups.models import BackupRun, DueRun
from hq_backups.problems import Problem
from hq_backups.supervision import supervise
from tests.testbed.smtp import MailServer, SilentServer

# The dispatcher tells in a thread of its own, which has a connection of its own.
pytestmark = pytest.mark.django_db(transaction=True)
NOW = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)  # a Tuesday
MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def configured(directory: Path, mail_server: MailServer) -> Iterator[dict[str, Any]]:
    settings = {
        "deploy_env": "icds",
        "backup_host_name": "pg0",
        "backup_hosts": {"pg0": ["postgres"]},
        "backup_state_dir": str(directory),
        "timezone": "UTC",
        "check_s3_backups_email": "ops@example.com",
    }
    with override_settings(
        HQ_BACKUPS=settings,
        EMAIL_BACKEND="django.core.mail.backends.smtp.EmailBackend",
        EMAIL_HOST="127.0.0.1",
        EMAIL_PORT=mail_server.port,
    ):
        yield settings


def ran(
    at: datetime, *, type_: str = "daily", host: str = "pg0", store: str = "postgres", **changes: Any
) -> None:
    fields = {"status": "ok", "exit_code": 0, "finished_at": at + HOUR, **changes}
    BackupRun.objects.create(
        run=f"{at:%Y%m%dT%H%M%SZ}-{host}-{store}-{type_}", verb="backup", store=store, type=type_, env="icds",
        host=host, started_at=at, **fields,
    )  # fmt: skip


def week(until: datetime, **about: Any) -> None:
    """Record a good backup for each night."""
    for number in range(8, -1, -1):
        at = until.replace(hour=0) - number * DAY
        if at <= until:
            ran(at, type_="weekly" if at.isoweekday() == 7 else "daily", **about)


def keys(problems: tuple[Problem, ...]) -> list[str]:
    return [problem.key for problem in problems]


def remember(directory: Path, state: State) -> None:
    with alarm_state.opened(directory, NOW) as held:
        held.state = state


def test_nothing_is_wrong_while_everything_runs(configured: Any) -> None:
    week(NOW)
    looked = survey(conf.resolve(), NOW)
    assert (looked.problems, looked.unanswered, looked.ok) == ((), {}, True)


def test_a_night_without_a_backup_is_missed_once_its_grace_is_over(configured: Any) -> None:
    week(NOW - DAY)
    due = NOW.replace(hour=0)
    assert survey(conf.resolve(), due + 4 * HOUR - MINUTE).problems == ()
    (problem,) = survey(conf.resolve(), due + 4 * HOUR).problems
    assert problem.key == "missed/postgres@pg0/daily"
    assert problem.title == "no daily backup for 28 hours"
    assert problem.command.endswith("django-manage --server pg0 run_backup postgres --type daily")
    assert "2026-11-24 00:00 UTC" in problem.cause


def test_a_backup_that_is_still_being_made_is_not_missed(configured: Any) -> None:
    week(NOW - DAY)
    ran(NOW.replace(hour=0), status="running", finished_at=None, exit_code=None)
    assert survey(conf.resolve(), NOW).problems == ()


def test_one_whose_upload_failed_was_made(configured: Any) -> None:
    week(NOW - DAY)
    ran(NOW.replace(hour=0), status="failed", exit_code=7)
    assert keys(survey(conf.resolve(), NOW).problems) == ["run/postgres/upload@pg0"]


def test_a_host_that_is_new_has_missed_nothing(configured: Any, directory: Path) -> None:
    assert survey(conf.resolve(), NOW).problems == ()
    remember(directory, State(since=NOW - HOUR))
    assert survey(conf.resolve(), NOW).problems == ()
    remember(directory, State(since=NOW - 2 * DAY))
    assert "missed/postgres@pg0/daily" in keys(survey(conf.resolve(), NOW).problems)


def test_a_run_that_was_killed_is_told_by_the_dispatcher_wherever_it_ran(
    configured: dict[str, Any], mail_server: MailServer
) -> None:
    configured["backup_hosts"] = {"pg0": ["postgres"], "pg1": ["postgres"]}
    configured["backup_host_name"] = "web0"
    for host in ("pg0", "pg1"):
        week(NOW, host=host)
    failed = {"status": "failed", "exit_code": 1}
    ran(NOW - HOUR, host="pg0", type_="hourly", error=reaper.KILLED, hint="Look.", **failed)
    ran(NOW - HOUR, host="pg1", type_="hourly", error="the disk is full", **failed)
    looked = survey(conf.resolve(), NOW)
    assert keys(looked.problems) == ["run/postgres/backup@pg0", "run/postgres/backup@pg1"]
    supervise(conf.resolve(), NOW)
    # pg1 was there to tell it itself.
    assert mail_server.subjects == ["[icds] postgres: the hourly backup was killed"]
    ran(NOW, host="pg0", type_="hourly")
    supervise(conf.resolve(), NOW + 10 * MINUTE)
    assert mail_server.subjects[1:] == ["[icds] over: postgres: the hourly backup was killed"]


def test_what_this_host_remembers_of_its_runs_outweighs_older_records(
    configured: Any, directory: Path
) -> None:
    week(NOW)
    ran(NOW - HOUR, type_="hourly", status="failed", exit_code=1, error="x", finished_at=NOW - HOUR)
    assert keys(survey(conf.resolve(), NOW).problems) == ["run/postgres/backup@pg0"]
    # The database was down when the next one was good.
    remember(directory, State(since=NOW - DAY, runs={"postgres/backup": Outcome(NOW)}))
    assert survey(conf.resolve(), NOW).problems == ()


def test_a_queue_that_nobody_serves_is_told_after_half_an_hour(
    configured: Any, mail_server: MailServer
) -> None:
    week(NOW)
    row = DueRun.objects.create(
        host="pg0", store="postgres", type="daily", due_at=NOW - HOUR, queued_at=NOW - HOUR / 2
    )
    assert survey(conf.resolve(), NOW).problems == ()
    (problem,) = survey(conf.resolve(), NOW + MINUTE).problems
    assert problem.title == "no worker on hq_backups.pg0"
    supervise(conf.resolve(), NOW + MINUTE)
    supervise(conf.resolve(), NOW + 11 * MINUTE)
    row.state = DueRun.State.RUNNING
    row.save()
    supervise(conf.resolve(), NOW + 21 * MINUTE)
    assert mail_server.subjects == [
        "[icds] no worker on hq_backups.pg0",
        "[icds] over: no worker on hq_backups.pg0",
    ]


def test_a_worker_that_is_busy_is_not_missing(configured: Any) -> None:
    week(NOW)
    old = {"due_at": NOW - HOUR, "queued_at": NOW - HOUR, "store": "postgres", "host": "pg0"}
    DueRun.objects.create(type="daily", state=DueRun.State.RUNNING, **old)
    DueRun.objects.create(type="hourly", **old)
    assert survey(conf.resolve(), NOW).problems == ()


def test_a_dispatcher_that_comes_no_more_is_told_wherever_somebody_still_looks(configured: Any) -> None:
    week(NOW)
    supervise(conf.resolve(), NOW - 31 * MINUTE)
    assert survey(conf.resolve(), NOW - MINUTE).problems == ()
    (problem,) = survey(conf.resolve(), NOW).problems
    assert (problem.key, problem.title) == ("beat", "the schedule has stood still for 31 minutes")
    assert survey(conf.resolve(), NOW + 31 * DAY).problems[0].key != "beat"


def test_while_the_dispatcher_lives_a_check_leaves_missed_runs_to_it(configured: Any) -> None:
    week(NOW - 2 * DAY)
    key = "missed/postgres@pg0/daily"

    def told(*, dispatching: bool = False) -> list[str]:
        looked = survey(conf.resolve(), NOW, dispatching=dispatching)
        assert key in keys(looked.problems)
        return [p.key for report in looked.reports for p in report.problems]

    assert key in told()
    recorded.tick("web0", NOW - 5 * MINUTE)
    assert key not in told()
    assert key in told(dispatching=True)
    recorded.tick("web0", NOW - HOUR)
    assert {key, "beat"} <= set(told())


def test_the_last_check_s_findings_are_seen_and_a_check_that_comes_no_more_is_told(
    configured: Any, directory: Path
) -> None:
    week(NOW)
    found = Problem("check/postgres@pg0/shrunk", "alert", "postgres", "the newest backup shrank")
    remember(directory, State(since=NOW - 9 * DAY, checks={"postgres": Checked(NOW - 12 * HOUR, (found,))}))
    assert survey(conf.resolve(), NOW).problems == (found,)
    looked = survey(conf.resolve(), NOW + MINUTE)
    assert keys(looked.problems) == ["unchecked/postgres@pg0", found.key]
    assert looked.problems[0].title == "not checked for 12 hours"


def test_mails_that_cannot_be_sent_are_a_problem(configured: Any, directory: Path) -> None:
    week(NOW)
    remember(directory, State(since=NOW, undelivered=Undelivered(NOW, NOW, "refused")))
    (problem,) = survey(conf.resolve(), NOW).problems
    assert (problem.key, problem.cause) == ("mail/undelivered", "refused")
    assert problem.title == "alarm mails cannot be sent since 2026-11-24 12:00 UTC"


@pytest.mark.parametrize(
    ("changes", "key"),
    [({"check_s3_backups_email": None}, "mail/nobody"), ({}, "mail/nowhere")],
    ids=["nobody", "nowhere"],
)
def test_mails_that_nobody_gets_are_a_warning(configured: dict[str, Any], changes: Any, key: str) -> None:
    week(NOW)
    configured.update(changes)
    with override_settings(EMAIL_BACKEND="django.core.mail.backends.console.EmailBackend"):
        looked = survey(conf.resolve(), NOW)
    assert (keys(looked.problems), looked.ok) == ([key], True)


def test_a_broker_that_is_gone_or_silent_is_a_problem_and_bounded(
    configured: Any, silent_server: SilentServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    week(NOW)
    monkeypatch.setattr(health, "SECONDS", 1.0)
    for port in (1, silent_server.port):
        began = time.monotonic()
        with override_settings(CELERY_BROKER_URL=f"redis://:top-secret@127.0.0.1:{port}/0"):
            looked = survey(conf.resolve(), NOW)
        assert keys(looked.problems) == ["broker"]
        assert "top-secret" not in str(looked)
        assert time.monotonic() - began < 10


@pytest.mark.django_db(databases=[])
def test_without_the_database_the_file_still_tells_and_no_alarm_ends(
    configured: Any, directory: Path, mail_server: MailServer
) -> None:
    failed = Problem("run/postgres/backup@pg0", "error", "postgres", "the daily backup failed", host="pg0")
    state = State(
        since=NOW - 9 * DAY,
        runs={"postgres/backup": Outcome(NOW - HOUR, failed)},
        good={"postgres/daily": Good(NOW - 31 * HOUR, "x.tar.gz")},
    )
    remember(directory, state)
    alerts.tell(conf.resolve(), [alerts.Report(failed.key, (failed,))], now=NOW)
    looked = survey(conf.resolve(), NOW)
    assert "database" in looked.unanswered
    titles = [problem.title for problem in looked.problems]
    assert "the database with the history cannot be read" in titles
    assert "no daily backup for 31 hours" in titles
    assert "the daily backup failed" in titles
    alerts.tell(conf.resolve(), looked.reports, now=NOW + MINUTE)
    assert not any(mail.subject.startswith("[icds] over") for mail in mail_server.mails)
    assert failed.key in alarm_state.load(directory).alarms


def test_a_setting_that_stops_backups_is_a_problem(configured: dict[str, Any]) -> None:
    week(NOW)
    configured["nadir_hour"] = 24
    assert "settings/E003/nadir_hour" in keys(survey(conf.resolve(), NOW).problems)


def test_the_survey_is_plain_data(configured: Any) -> None:
    import json

    plain = json.loads(json.dumps(survey(conf.resolve(), NOW).to_plain()))
    assert plain["ok"] in (True, False)
    assert {"ok", "at", "host", "problems", "unanswered"} == set(plain)


def test_the_last_good_backup_is_looked_up_in_the_records_where_the_file_knows_none(directory: Path) -> None:
    ran(NOW - 31 * HOUR, artifact="x.tar.gz")
    ran(NOW - HOUR, status="failed", exit_code=1)
    assert good_words(State(), "postgres", NOW) == "x.tar.gz, 31 hours old"
    known = State(good={"postgres/daily": Good(NOW - HOUR, "y.tar.gz")})
    assert good_words(known, "postgres", NOW) == "y.tar.gz, 1 hour old"
    assert good_words(State(), "couch", NOW) == ""


def test_a_host_that_switched_time_zones_off_is_read_right(configured: Any, mail_server: MailServer) -> None:
    with override_settings(USE_TZ=False, TIME_ZONE="Africa/Nairobi"):
        local = (NOW + 3 * HOUR).replace(tzinfo=None)
        for number in range(1, 9):
            at = local.replace(hour=3) - number * DAY
            ran(at, type_="weekly" if at.isoweekday() == 7 else "daily")
        DueRun.objects.create(
            host="pg0", store="postgres", type="daily", due_at=local, queued_at=local - HOUR
        )
        looked = survey(conf.resolve(), NOW)
        assert looked.unanswered == {}
        assert keys(looked.problems) == ["worker/pg0", "missed/postgres@pg0/daily"]
        assert looked.problems[1].title == "no daily backup for 36 hours"
        supervise(conf.resolve(), NOW)
        assert recorded.last_tick() == NOW
        assert survey(conf.resolve(), NOW + HOUR).problems[0].key == "beat"
    assert len(mail_server.mails) == 1
