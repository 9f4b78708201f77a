"""Which channels tell when a part is dead: the table in docs/operations.rst, each cell tried."""

from __future__ import annotations

import contextlib
import http.server
import io
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.core.management import call_command
from django.db import connections
from django.test import override_settings

from hq_backups import alerts, conf, health, recorded
from hq_backups.engine.check import STATUS_FILE
from hq_backups.engine.config import Job
from hq_backups.engine.errors import Exit
from hq_backups.engine.events import utc_now
from hq_backups.management.commands import check_s3_backups
from hq_backups.models import DueRun
from hq_backups.supervision import supervise
from tests.testbed.process import LOOPBACK, free_port
from tests.testbed.s3 import S3Service, refused_endpoint
from tests.testbed.smtp import MailServer

# Telling has a thread of its own, and so a connection of its own: what the tests write must be there for it.
pytestmark = [pytest.mark.s3, pytest.mark.django_db(transaction=True)]
PAGE = Path(__file__).parents[2] / "docs" / "operations.rst"
CHANNELS = ("mail", "status file", "exit code", "health", "heartbeat")
DEAD = {
    "worker": "no worker on hq_backups.pg0",
    "beat": "the schedule has stood still for 1 hour",
    "broker": "the message broker does not answer: nothing is started by the schedule",
    "database": "the database with the history cannot be read",
    "bucket": "the backups could not be checked",
    "mail server": "alarm mails cannot be sent since",
}
"""What is told when that part is dead."""


class Pulse:
    """A service outside that takes heartbeats."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        pulse = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                pulse.paths.append(self.path)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer((LOOPBACK, 0), Handler)
        self.url = f"http://{LOOPBACK}:{self.server.server_port}/secret-uuid"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))

    def __enter__(self) -> Pulse:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@dataclass
class Watched:
    """A host with a real bucket, a mail server, and a service outside that takes heartbeats."""

    root: Path
    mails: MailServer
    pulse: Pulse
    settings: dict[str, Any]
    code: int = -1
    out: str = ""

    def check(self, *words: str) -> None:
        """Run check_s3_backups as cron does."""
        out, err = io.StringIO(), io.StringIO()
        with pytest.raises(SystemExit) as ended:
            call_command("check_s3_backups", *words, stdout=out, stderr=err)
        self.code, self.out = int(str(ended.value.code)), out.getvalue() + err.getvalue()

    def told(self) -> dict[str, bool]:
        """Return which channels say that something is wrong."""
        status = (self.root / "backups" / STATUS_FILE).read_text()
        looked = health.survey(conf.resolve())
        return {
            "mail": bool(self.mails.mails),
            "status file": any(mark in status for mark in ("[ALERT]", "[ERROR]")),
            "exit code": self.code != 0,
            "health": not looked.ok,
            "heartbeat": self.pulse.paths[-1:] == ["/secret-uuid/fail"],
        }


@pytest.fixture
def watched(tmp_path: Path, s3: S3Service, bucket: str, mail_server: MailServer) -> Iterator[Watched]:
    for name in ("data", "backups", "state"):
        (tmp_path / name).mkdir(mode=0o700)
    with Pulse() as pulse:
        settings = {
            "deploy_env": "icds",
            "backup_host_name": "pg0",
            "backup_state_dir": str(tmp_path / "state"),
            "postgresql_data_dir": str(tmp_path / "data"),
            "postgresql_backup_dir": str(tmp_path / "backups"),
            "postgres_s3": True,
            "postgres_snapshot_bucket": bucket,
            "aws_versioning_enabled": False,
            "aws_endpoint": s3.endpoint,
            "AMAZON_S3_ACCESS_KEY": s3.access_key,
            "AMAZON_S3_SECRET_KEY": s3.secret_key,
            "check_s3_backups_email": "ops@example.com",
            "backup_heartbeat_url": pulse.url,
            "nadir_hour": (utc_now() - timedelta(hours=2)).hour,
            "timezone": "UTC",
        }
        made = utc_now()
        for type_ in ("daily", "weekly"):
            key = f"postgres_icds_{type_}_{made:%Y_%m_%d}.tar.gz"
            s3.client().put_object(Bucket=bucket, Key=key, Body=b"x" * 4096)
        with override_settings(
            HQ_BACKUPS=settings,
            EMAIL_BACKEND="django.core.mail.backends.smtp.EmailBackend",
            EMAIL_HOST=LOOPBACK,
            EMAIL_PORT=mail_server.port,
        ):
            yield Watched(tmp_path, mail_server, pulse, settings)


@contextlib.contextmanager
def dead(part: str, watched: Watched) -> Iterator[None]:
    """Let a part be dead, as it is while somebody looks."""
    now = utc_now()
    recorded.tick("pg0", now)
    with contextlib.ExitStack() as stack:
        # For a mail server to be missed there must be something to mail.
        if part in ("worker", "mail server"):
            old = now - timedelta(hours=1)
            DueRun.objects.create(host="pg0", store="postgres", type="daily", due_at=old, queued_at=old)
        elif part == "beat":
            recorded.tick("pg0", now - timedelta(minutes=90))
        elif part == "broker":
            url = f"redis://{LOOPBACK}:{free_port()}/0"
            stack.enter_context(override_settings(CELERY_BROKER_URL=url))
        elif part == "database":
            stack.enter_context(lost_database())
        elif part == "bucket":
            watched.settings["aws_endpoint"] = refused_endpoint()
        if part == "mail server":
            watched.mails.stop()
        yield


class ToTheDead:
    """Sends our queries to a PostgreSQL that nobody runs."""

    def db_for_read(self, model: Any, **hints: Any) -> str:
        return "dead"

    db_for_write = db_for_read


@contextlib.contextmanager
def lost_database() -> Iterator[None]:
    """Let the database be a server that is down."""
    server = {"ENGINE": "django.db.backends.postgresql", "NAME": "hq", "HOST": LOOPBACK, "PORT": free_port()}
    kept = connections.settings
    connections.settings["dead"] = connections.configure_settings({"default": {}, "dead": server})["dead"]
    try:
        with override_settings(DATABASE_ROUTERS=[ToTheDead()]):
            yield
    finally:
        del kept["dead"]


def documented() -> dict[str, dict[str, bool]]:
    """Return the table of the page."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = next(
        n
        for n, line in enumerate(lines)
        if line.split() == ["dead", "mail", "status", "file", "exit", "code", "health", "heartbeat"]
    )
    ruler = lines[start - 1]
    ends = [(m, m + len(word)) for word, m in _columns(ruler)]
    table = {}
    for line in lines[start + 2 :]:
        if line.startswith("="):
            break
        name, *cells = [line[a:b].strip() for a, b in ends]
        table[name] = {channel: cell == "tells" for channel, cell in zip(CHANNELS, cells, strict=True)}
    return table


def _columns(ruler: str) -> Iterator[tuple[str, int]]:
    at = 0
    for word in ruler.split():
        at = ruler.index(word, at)
        yield word, at
        at += len(word)


def test_the_page_s_table_has_every_part_and_at_least_one_channel_for_each() -> None:
    table = documented()
    assert tuple(table) == tuple(DEAD)
    assert all(any(row.values()) for row in table.values())


def test_while_nothing_is_dead_nobody_is_told_anything(watched: Watched) -> None:
    with dead("nothing", watched):
        supervise(conf.resolve(), utc_now())
        watched.check()
        assert watched.told() == dict.fromkeys(CHANNELS, False), [m.text for m in watched.mails.mails]
    assert watched.pulse.paths == ["/secret-uuid"]


@pytest.mark.parametrize("part", DEAD)
def test_each_cell_of_the_table(watched: Watched, part: str) -> None:
    with dead(part, watched):
        if part not in ("beat", "broker"):
            supervise(conf.resolve(), utc_now())
        watched.check()
        assert watched.told() == documented()[part], watched.out
        problems = [problem.title for problem in health.survey(conf.resolve()).problems]
    # It is that part that is told, and nothing else that the test broke.
    assert any(title.startswith(DEAD[part]) for title in problems), problems
    assert len(problems) == (2 if part == "mail server" else 1), problems
    for mail in watched.mails.mails:
        assert DEAD[part] in mail.subject


def test_the_state_of_health_of_each_is_plain_data_without_secrets(watched: Watched) -> None:
    for part in DEAD:
        with dead(part, watched):
            text = json.dumps(health.survey(conf.resolve()).to_plain())
            assert "secret-uuid" not in text
            assert watched.settings["AMAZON_S3_SECRET_KEY"] not in text


def test_a_heartbeat_that_is_not_answered_is_a_warning_that_does_not_show_the_address(
    watched: Watched,
) -> None:
    watched.settings["backup_heartbeat_url"] = f"http://{LOOPBACK}:{free_port()}/secret-uuid"
    watched.check()
    assert watched.code == 0, watched.out
    assert "the heartbeat could not be sent: ConnectionError" in watched.out
    assert "secret-uuid" not in watched.out


def test_a_heartbeat_to_a_service_that_says_nothing_is_given_up(
    watched: Watched, silent_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hq_backups import heartbeat

    monkeypatch.setattr(heartbeat, "SECONDS", 0.5)
    watched.settings["backup_heartbeat_url"] = f"http://{LOOPBACK}:{silent_server.port}/secret-uuid"
    watched.check()
    assert watched.code == 0, watched.out
    assert "WARNING: the heartbeat" in watched.out
    assert "secret-uuid" not in watched.out


def test_settings_that_keep_a_check_from_beginning_are_mailed_by_it(watched: Watched) -> None:
    watched.settings["nadir_hour"] = 24
    watched.check()
    assert watched.code == 2, watched.out
    assert [mail.subject.partition(" must")[0] for mail in watched.mails.mails] == [
        "[icds] a setting is wrong: nadir_hour in settings.HQ_BACKUPS"
    ]
    watched.settings["nadir_hour"] = (utc_now() - timedelta(hours=2)).hour
    watched.check()
    assert watched.mails.subjects[1:] == [watched.mails.subjects[0].replace("[icds] ", "[icds] over: ")]


def test_a_host_without_a_bucket_still_tells_what_else_is_wrong(watched: Watched) -> None:
    watched.settings["postgres_s3"] = False
    recorded.tick("pg0", utc_now() - timedelta(minutes=90))
    watched.check()
    assert (watched.code, watched.mails.subjects) == (2, [f"[icds] {DEAD['beat']}"])


def test_elasticsearch_is_judged_by_its_own_hour(monkeypatch: pytest.MonkeyPatch, watched: Watched) -> None:
    asked: dict[str, int] = {}

    def run_check(self: Any, job: Job, findings: Any, user: str | None = None) -> Exit:
        asked[job.request["store"]] = job.request["nadir_hour"]
        return Exit.OK

    monkeypatch.setattr(check_s3_backups.Command, "run_check", run_check)
    watched.settings |= {"nadir_hour": 22, "es_local_repo": True}
    watched.check()
    assert asked == {"postgres": 22, "elasticsearch": 2}


def test_a_check_without_mail_begins_no_alarm_but_its_findings_are_seen(watched: Watched) -> None:
    with dead("bucket", watched):
        watched.check("--no-email")
        assert watched.told() == {
            "mail": False, "status file": True, "exit code": True, "health": True, "heartbeat": True,
        }  # fmt: skip
        # Nor does whatever is told next on this host repeat it.
        alerts.tell(conf.resolve(), [])
        assert watched.mails.mails == []
        watched.check()
        assert watched.mails.subjects == [f"[icds] postgres: {DEAD['bucket']}"]


def test_a_store_that_is_switched_off_has_no_problems_any_more(watched: Watched) -> None:
    with dead("bucket", watched):
        watched.check()
        assert len(watched.mails.mails) == 1
        watched.settings["backup_postgres"] = False
        watched.check()
    assert watched.mails.subjects[1:] == [f"[icds] over: postgres: {DEAD['bucket']}"]
    assert health.survey(conf.resolve()).problems == ()
    assert watched.pulse.paths[-1] == "/secret-uuid"
