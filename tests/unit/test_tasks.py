"""Tasks do nothing by themselves but pass on, at the right hour, and log what commands say."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import time_machine
from django.core.management import CommandError

from hq_backups import beat, tasks
from hq_backups.tasks import check_backups, check_here, dispatch_due, reap_runs, run_due

ALL = (check_backups, check_here, dispatch_due, reap_runs, run_due)


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    called: list[tuple[str, ...]] = []
    monkeypatch.setattr(tasks, "call_command", lambda *words, **_: called.append(words))
    return called


def test_every_task_is_acknowledged_first_keeps_nothing_expires_and_is_never_repeated() -> None:
    for task in ALL:
        assert (task.acks_late, task.ignore_result, task.max_retries) == (False, True, 0)
        assert task.expires > 0
        assert task.name.startswith("hq_backups.")


def test_the_entries_of_beat_are_tasks_that_there_are() -> None:
    names = {task.name for task in ALL}
    assert {entry["task"] for entry in beat.beat_schedule().values()} <= names
    assert not any("restore" in name for name in names)


@pytest.mark.parametrize(
    ("zone", "hours"), [("UTC", {3, 7, 11, 15, 19, 23}), ("America/New_York", {8, 12, 16, 20, 0, 4})]
)
def test_the_bucket_is_checked_six_times_a_day_by_the_hosts_own_clock(
    commands: list[tuple[str, ...]], settings: Any, zone: str, hours: set[int]
) -> None:
    settings.HQ_BACKUPS = {"timezone": zone, "postgres_s3": True}
    seen = set()
    for hour in range(24):
        commands.clear()
        with time_machine.travel(f"2026-11-24T{hour:02}:00:01Z", tick=False):
            check_backups()
        if commands:
            assert commands == [("check_s3_backups",)]
            seen.add(hour)
    assert seen == hours


@time_machine.travel("2026-11-24T03:00:01Z", tick=False)
def test_other_hosts_check_too_write_their_files_and_mail_nobody(
    commands: list[tuple[str, ...]], settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.HQ_BACKUPS = {
        "timezone": "UTC",
        "postgres_s3": True,
        "backup_host_name": "here",
        "backup_hosts": {"here": ["blobdb"], "pg0": ["postgres"], "couch0": ["couch"]},
    }
    sent = []

    def send(queue: str) -> None:
        sent.append(queue)
        raise ConnectionError("no broker")

    monkeypatch.setattr(check_here, "apply_async", send)
    check_backups()
    assert sent == ["hq_backups.pg0", "hq_backups.couch0"]
    check_here()
    assert commands == [("check_s3_backups",), ("check_s3_backups", "--no-email")]


@time_machine.travel("2026-11-24T03:00:01Z", tick=False)
def test_a_host_that_uploads_nothing_is_not_checked(commands: list[tuple[str, ...]], settings: Any) -> None:
    settings.HQ_BACKUPS = {"timezone": "UTC"}
    check_backups()
    assert commands == []


def test_what_a_command_says_is_logged_and_its_exit_code_returned(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        with pytest.raises(CommandError):
            tasks.run_command(["run_backup", "nonsense-store"])
        code = tasks.run_command(["run_backup", "couch"])
    assert code == 2
    said = [(record.levelname, record.message) for record in caplog.records if record.name == tasks.__name__]
    assert any(message.startswith("RESULT failed") for _, message in said)
