"""Alarms on a host with a real broker, workers and beat: what each of them, dead, is told by."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hq_backups.engine.accounts import me
from tests.testbed.celery_host import CeleryHost
from tests.testbed.process import short_directory, wait_until
from tests.testbed.redis import RedisServer
from tests.testbed.smtp import MailServer

PERIODIC = "celery_periodic"
LONG = 8 << 30
"""Bytes of nothing, which take no room: minutes of reading."""


class MailedHost(CeleryHost):
    """A host whose alarms go to a mail server."""

    def __init__(self, place: Path, redis: RedisServer, mails: MailServer) -> None:
        self.mails = mails
        named = {"here": ["blobdb"]}
        super().__init__(
            place, "here", redis, me(), backup_hosts=named, check_s3_backups_email="ops@example.com"
        )

    def environment(self) -> dict[str, str]:
        return {
            **super().environment(),
            "DJANGO_SETTINGS_MODULE": "tests.testbed.celery_mail_settings",
            "TESTBED_MAIL_PORT": str(self.mails.port),
        }

    def check(self) -> None:
        """Check as cron does; no store of this host goes to a bucket, which is exit 2, but the rest is told."""
        argv = [sys.executable, "-m", "django", "check_s3_backups"]
        done = subprocess.run(
            argv, env=self.environment(), cwd=self.home, capture_output=True, text=True, check=False
        )
        assert done.returncode == 2, done


@pytest.fixture
def host(redis: RedisServer, mail_server: MailServer) -> Iterator[MailedHost]:
    with short_directory() as place:
        yield MailedHost(place, redis, mail_server)


def mailed(host: MailedHost, *subjects: str) -> None:
    """Wait for mails, these and no other ones."""
    wait_until(lambda: len(host.mails.mails) >= len(subjects), what=f"{subjects}", timeout=60)
    assert host.mails.subjects == [f"[testing] {subject}" for subject in subjects]


def test_a_run_that_was_killed_with_its_worker_is_mailed_and_taken_back_by_the_next_good_one(
    host: MailedHost,
) -> None:
    path = host.blobs / "video"
    path.touch()
    os.truncate(path, LONG)
    with host.beat(), host.worker(PERIODIC, "hq_backups.here") as worker:
        wait_until(host.runs, what="a run that is due to begin", timeout=60)
        worker.kill_all()
        os.truncate(path, 100)
        worker.start()
        mailed(host, "blobdb: the weekly backup was killed")
        assert "journalctl -k" in host.mails.mails[0].text
        host.rows("UPDATE hq_backups_duerun SET started_at = datetime(started_at, '-1 hour')")
        mailed(host, "blobdb: the weekly backup was killed", "over: blobdb: the weekly backup was killed")
    assert [row[2] for row in host.runs()] == ["failed", "ok"]


def test_a_queue_without_a_worker_a_dead_beat_and_a_dead_broker_are_each_mailed(
    host: MailedHost, redis: RedisServer
) -> None:
    idle = "no worker on hq_backups.here"
    stood = "the schedule has stood still for 1 hour"
    with host.worker(PERIODIC), host.beat():
        wait_until(host.due, what="something to be due", timeout=60)
        host.rows("UPDATE hq_backups_duerun SET queued_at = datetime(queued_at, '-1 hour')")
        mailed(host, idle)
    host.rows("UPDATE hq_backups_dispatcher SET seen_at = datetime(seen_at, '-1 hour')")
    host.check()
    mailed(host, idle, stood)
    redis.kill()
    host.check()
    broker = "the message broker does not answer: nothing is started by the schedule"
    mailed(host, idle, stood, broker)
