"""Alarms through a real mail server: what arrives, when, and what it says."""

from __future__ import annotations

import json
import re
import threading
import time
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from django.test import override_settings

from hq_backups import alarm_state, alerts, conf, mailing, signals, watching
from hq_backups.alerts import Report
from hq_backups.engine.config import Config, Job, S3Config, StoreConfig
from hq_backups.engine.errors import ConfigurationError, Exit
from hq_backups.engine.events import Event
from hq_backups.problems import Problem
from tests.testbed.s3 import refused_endpoint
from tests.testbed.smtp import MailServer, SilentServer

NOW = datetime(2026, 11, 24, 3, 0, tzinfo=UTC)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
TO = "ops@example.com,boss@example.com"
SECRET = "s3cret-of-the-bucket"


class Host:
    """A host whose alarms go to a mail server, at a time that the test says."""

    def __init__(self, directory: Path, port: int, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
        self.directory, self.now = directory, NOW
        self.settings = {
            "deploy_env": "icds",
            "backup_host_name": "pg0",
            "backup_state_dir": str(directory),
            "check_s3_backups_email": TO,
            "backup_couch": True,
            "AMAZON_S3_ACCESS_KEY": "key-of-the-bucket",
            "AMAZON_S3_SECRET_KEY": SECRET,
            **settings,
        }
        self.said: list[str] = []
        self.override = override_settings(
            HQ_BACKUPS=self.settings,
            EMAIL_BACKEND="django.core.mail.backends.smtp.EmailBackend",
            EMAIL_HOST="127.0.0.1",
            EMAIL_PORT=port,
            DEFAULT_FROM_EMAIL="hq@example.com",
        )
        monkeypatch.setattr(watching, "utc_now", lambda: self.now)

    @property
    def resolved(self) -> conf.Resolved:
        return conf.resolve()

    def say(self, event: Event) -> None:
        self.said.append(str(event.data["message"]))

    def run(
        self,
        code: Exit = Exit.OK,
        *,
        store: str = "postgres",
        type_: str = "daily",
        verb: str = "backup",
        error: str = "the disk is full",
        hint: str = "Free space there.",
        name: str = "",
    ) -> None:
        """Let a run end so, as the engine tells it."""
        config = Config(
            "icds",
            "pg0",
            s3=S3Config("k", SECRET, refused_endpoint()),
            stores={store: StoreConfig(store, "plain", self.directory, s3=True, bucket="b")},
        )
        request = {"store": store, "type": type_, "upload": True} if verb == "backup" else {"store": store}
        watcher = watching.Watcher(self.resolved, Job(verb, config, request, run="r"), self.say)
        if code is Exit.OK or code is Exit.UPLOAD_FAILED:
            name = name or f"{store}_icds_{type_}_{self.now:%Y_%m_%d}.tar.gz"
            started = f"{self.now:%Y-%m-%dT%H:%M:%SZ}"
            manifest = {"name": name, "size": 5, "started_at": started}
            watcher(Event("artifact", {"manifest": manifest}))
        if code is not Exit.OK:
            watcher(Event("error", {"code": "X", "message": error, "hint": hint, "exit": int(code)}))
        watcher.ended(code)

    def state(self) -> alarm_state.State:
        return alarm_state.load(self.directory)


@pytest.fixture
def host(tmp_path: Path, mail_server: MailServer, monkeypatch: pytest.MonkeyPatch) -> Any:
    made = Host(tmp_path / "state", mail_server.port, monkeypatch)
    with made.override:
        yield made


def visible(html: str) -> str:
    """Return the text that a reader of the HTML sees."""
    parts: list[str] = []

    class Reader(HTMLParser):
        def handle_data(self, data: str) -> None:
            parts.append(data)

    Reader(convert_charrefs=True).feed(html)
    return " ".join(" ".join(parts).split())


def test_a_week_of_a_store_that_fails_each_night_and_each_hour_gives_exactly_these_mails(
    host: Host, mail_server: MailServer
) -> None:
    host.run(Exit.OK)
    assert mail_server.mails == []
    host.now += HOUR
    begin = host.now
    while host.now < begin + 7 * DAY:
        host.run(Exit.ERROR, type_="daily" if host.now.hour == 0 else "hourly")
        host.now += HOUR
    host.run(Exit.OK, type_="daily")
    host.now += HOUR
    host.run(Exit.OK, type_="hourly")
    subjects = [re.sub(r"the (daily|hourly) backup", "the backup", s) for s in mail_server.subjects]
    assert subjects == [
        "[icds] postgres: the backup failed",
        *["[icds] still: postgres: the backup failed"] * 6,
        "[icds] over: postgres: the backup failed",
    ]
    assert {mail.to for mail in mail_server.mails} == {("ops@example.com", "boss@example.com")}
    assert host.said == []


def test_a_mail_says_host_last_good_backup_cause_and_the_next_command_as_text_and_html(
    host: Host, mail_server: MailServer
) -> None:
    host.run(Exit.OK)
    host.now += 31 * HOUR
    host.run(Exit.ERROR)
    (mail,) = mail_server.mails
    assert mail.sender == "hq@example.com"
    assert mail.message["Auto-Submitted"] == "auto-generated"
    for body in (" ".join(mail.text.split()), visible(mail.html)):
        for words in (
            "postgres: the daily backup failed",
            "pg0",
            "postgres_icds_daily_2026_11_24.tar.gz, 31 hours old",
            "the disk is full. Free space there",
            "commcare-cloud icds django-manage run_backup postgres --type daily",
        ):
            assert words in body
    assert not re.search(r"src=|href=|url\(|<script|<link|<img", mail.html)


def test_several_problems_are_one_mail(host: Host, mail_server: MailServer) -> None:
    problems = [Problem(f"a/{n}", "alert", "couch", f"problem {n}") for n in range(3)]
    alerts.tell(host.resolved, [Report("a/", tuple(problems))], now=NOW)
    (mail,) = mail_server.mails
    assert mail.subject == "[icds] couch: problem 0 (and 2 more)"
    assert all(f"couch: problem {n}" in mail.text for n in range(3))


def test_a_mail_of_a_new_problem_mentions_those_that_are_known(host: Host, mail_server: MailServer) -> None:
    host.run(Exit.ERROR)
    host.run(Exit.ERROR, store="couch")
    assert mail_server.mails[1].text.count("the daily backup failed") == 2
    assert "Told before, and still so:\n  postgres: the daily backup failed" in mail_server.mails[1].text


def test_a_failed_upload_is_one_problem_and_the_backup_itself_is_good(
    host: Host, mail_server: MailServer
) -> None:
    host.run(Exit.ERROR)
    host.run(Exit.UPLOAD_FAILED, error="the local backup is good, but its upload failed: no route")
    host.run(Exit.OK, verb="upload")
    assert mail_server.subjects == [
        "[icds] postgres: the daily backup failed",
        "[icds] postgres: the backup is not in the bucket: its upload failed (and 1 more)",
        "[icds] over: postgres: the backup is not in the bucket: its upload failed",
    ]
    assert "upload_backups postgres" in mail_server.mails[1].text
    assert "Over: postgres: the daily backup failed" in mail_server.mails[1].text


def test_a_run_that_another_one_holds_up_is_no_news_unless_it_is_the_night_s(
    host: Host, mail_server: MailServer
) -> None:
    host.run(Exit.LOCKED, type_="hourly")
    host.run(Exit.LOCKED, verb="verify")
    assert mail_server.mails == []
    host.run(Exit.LOCKED, type_="daily", error="another run holds it")
    assert mail_server.subjects == ["[icds] postgres: the daily backup failed"]


def test_a_failed_verification_is_told_and_taken_back(host: Host, mail_server: MailServer) -> None:
    host.run(Exit.BAD_BACKUP, verb="verify")
    host.run(Exit.OK, verb="verify")
    assert mail_server.subjects == [
        "[icds] postgres: a backup did not pass its verification",
        "[icds] over: postgres: a backup did not pass its verification",
    ]


def test_a_restore_that_fails_is_seen_by_its_operator(host: Host, mail_server: MailServer) -> None:
    host.run(Exit.RESTORE_ROLLED_BACK, verb="restore")
    assert mail_server.mails == []


def test_a_backup_that_could_not_begin_is_told_and_taken_back_by_one_that_did(
    host: Host, mail_server: MailServer
) -> None:
    error = ConfigurationError("the S3 key is set by half", hint="Set it.")
    watching.refused(host.resolved, None, error, "auto", host.say)
    host.run(Exit.OK)
    assert mail_server.subjects == ["[icds] no backup could begin", "[icds] over: no backup could begin"]


def test_a_mail_server_that_is_down_loses_no_alarm(host: Host, mail_server: MailServer) -> None:
    mail_server.stop()
    host.run(Exit.ERROR)
    assert "an alarm mail could not be sent, it stays pending: 127.0.0.1" in host.said[0]
    assert "refused" in host.said[0].lower()
    host.run(Exit.ERROR, store="couch")
    host.now += HOUR
    host.run(Exit.OK, store="couch")
    undelivered = host.state().undelivered
    assert undelivered is not None
    assert undelivered.since == NOW
    mail_server.start()
    host.now += HOUR
    host.run(Exit.ERROR)
    (mail,) = mail_server.mails
    assert "New: postgres: the daily backup failed" in mail.text
    assert "Over: couch: the daily backup failed" in mail.text
    assert "no mail could be sent while it lasted" in mail.text
    assert "Mails could not be sent since 2026-11-24 03:00 UTC" in mail.text
    assert host.state().undelivered is None


def test_a_recipient_that_the_server_refuses_is_said_with_its_answer(
    host: Host, mail_server: MailServer
) -> None:
    mail_server.refuse = "550 5.1.1 no such user here"
    host.run(Exit.ERROR)
    assert "550 5.1.1 no such user here" in host.said[0]
    mail_server.refuse = ""
    host.run(Exit.ERROR)
    assert len(mail_server.mails) == 1


def test_a_mail_server_that_says_nothing_holds_a_run_up_for_a_bounded_time(
    tmp_path: Path, silent_server: SilentServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Host(tmp_path, silent_server.port, monkeypatch)
    monkeypatch.setattr(mailing, "TIMEOUT", 0.5)
    began = time.monotonic()
    with host.override:
        host.run(Exit.ERROR)
        assert host.state().undelivered is not None
    assert time.monotonic() - began < 10
    assert "timed out" in host.said[0]


def test_whatever_hangs_while_telling_is_left_behind(
    tmp_path: Path, silent_server: SilentServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Host(tmp_path, silent_server.port, monkeypatch)
    monkeypatch.setattr(watching, "SECONDS", 0.5)
    began = time.monotonic()
    with host.override:
        host.run(Exit.ERROR)
        assert time.monotonic() - began < 10
        assert host.said == [
            "not everybody could be told of this run: telling of the run took more than 0.5 s"
        ]
        # What was on its way is pending: it goes when the claim of the one that hung has ended.
        (alarm,) = host.state().alarms.values()
        assert alarm.told_at is None


def test_without_a_state_directory_mails_go_all_the_same_and_it_is_said(
    tmp_path: Path, mail_server: MailServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    host = Host(tmp_path / "file" / "state", mail_server.port, monkeypatch)
    with host.override:
        host.run(Exit.ERROR)
    assert len(mail_server.mails) == 1
    assert any("cannot be written" in note for note in host.said)


def test_a_damaged_state_file_costs_one_mail_more_and_no_alarm(host: Host, mail_server: MailServer) -> None:
    host.run(Exit.ERROR)
    (host.directory / alarm_state.NAME).write_text("{")
    host.run(Exit.ERROR)
    assert len(mail_server.mails) == 2
    assert any("alarms begin anew" in note for note in host.said)
    host.run(Exit.ERROR)
    assert len(mail_server.mails) == 2


HOSTILE = (
    "x\r\nBcc: victim@example.com\r\n\r\nbody",
    "<script>alert(1)</script>\"'&",
    "n" * 3000,
    "Ünïcödé ‮gnp ☃",
    "\x1b[31mred\x00",
)


@pytest.mark.parametrize("hostile", HOSTILE, ids=["newline", "script", "long", "unicode", "escape"])
def test_hostile_names_are_shown_as_text_and_go_nowhere_else(
    host: Host, mail_server: MailServer, hostile: str
) -> None:
    problem = Problem("a/b", "error", hostile[:32], hostile, hostile, f"run {hostile}", hostile, hostile)
    alerts.tell(host.resolved, [Report("a/", (problem,))], now=NOW)
    (mail,) = mail_server.mails
    assert mail.to == ("ops@example.com", "boss@example.com")
    assert mail.message["Bcc"] is None
    assert len(mail.subject) <= mailing.LONGEST_SUBJECT
    assert "\n" not in mail.subject
    assert "<script" not in mail.html
    assert len(mail.text) < 20_000
    for text in (mail.subject, mail.text, mail.html):
        assert not re.search("[\x00\x1b‮]", text)
    if "script" in hostile:
        assert "<script>alert(1)</script>\"'&" in mail.text
        assert "<script>alert(1)</script>\"'&" in visible(mail.html)


def test_no_secret_is_ever_mailed(host: Host, mail_server: MailServer) -> None:
    with override_settings(EMAIL_HOST_PASSWORD="", SECRET_KEY="django-key-1234"):
        host.run(Exit.ERROR, error=f"the service said {SECRET} is wrong", hint="key django-key-1234")
    (mail,) = mail_server.mails
    wire = mail.message.as_string() + mail.text + mail.html + mail.subject
    assert SECRET not in wire
    assert "django-key-1234" not in wire
    assert "the service said ******** is wrong" in mail.text


def test_admins_are_told_where_no_address_is_set_and_nobody_where_there_are_none(
    tmp_path: Path, mail_server: MailServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Host(tmp_path, mail_server.port, monkeypatch, check_s3_backups_email=None)
    with host.override:
        host.run(Exit.ERROR)
        assert mail_server.mails == []
        assert host.said == []
        with override_settings(ADMINS=[("Ops", "admin@example.com")]):
            host.run(Exit.ERROR)
    (mail,) = mail_server.mails
    assert mail.to == ("admin@example.com",)
    assert mail.subject.startswith("[icds] postgres:")


def test_the_host_s_own_prefix_is_respected_and_django_s_default_is_not(
    host: Host, mail_server: MailServer
) -> None:
    with override_settings(EMAIL_SUBJECT_PREFIX="[commcarehq] "):
        host.run(Exit.ERROR)
    assert mail_server.subjects == ["[commcarehq] [icds] postgres: the daily backup failed"]


def test_signals_tell_hosts_that_want_more_and_a_receiver_that_raises_stops_nothing(
    host: Host, mail_server: MailServer
) -> None:
    heard: list[tuple[str, Any]] = []

    def bad(**kwargs: Any) -> None:
        raise RuntimeError("no")

    def good(signal: Any, **kwargs: Any) -> None:
        name = next(n for n in dir(signals) if getattr(signals, n) is signal)
        heard.append((name, kwargs.get("store") or kwargs["problem"].key))

    every = (signals.backup_failed, signals.backup_succeeded, signals.problem_started, signals.problem_ended)
    for each in every:
        each.connect(bad)
        each.connect(good)
    try:
        host.run(Exit.ERROR)
        host.run(Exit.ERROR)
        host.run(Exit.OK)
    finally:
        for each in every:
            each.disconnect(bad)
            each.disconnect(good)
    key = "run/postgres/backup@pg0"
    assert heard == [
        ("problem_started", key),
        ("backup_failed", "postgres"),
        ("backup_failed", "postgres"),
        ("problem_ended", key),
        ("backup_succeeded", "postgres"),
    ]
    assert len(mail_server.mails) == 2


def test_a_receiver_that_hangs_keeps_no_mail_back(
    host: Host, mail_server: MailServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "SECONDS", 1.0)
    free = threading.Event()

    def hang(**kwargs: Any) -> None:
        free.wait(20)

    signals.problem_started.connect(hang)
    try:
        host.run(Exit.ERROR)
        assert mail_server.subjects == ["[icds] postgres: the daily backup failed"]
        assert host.said == ["not everybody could be told of this run: telling of the run took more than 1 s"]
    finally:
        signals.problem_started.disconnect(hang)
        free.set()


def test_the_file_holds_no_secret_and_is_the_owner_s(host: Host) -> None:
    host.run(Exit.ERROR)
    path = host.directory / alarm_state.NAME
    assert path.stat().st_mode & 0o777 == 0o600
    assert json.loads(path.read_text())["version"] == alarm_state.VERSION


def test_what_began_and_ended_while_nobody_was_named_concerns_nobody_later(
    tmp_path: Path, mail_server: MailServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Host(tmp_path, mail_server.port, monkeypatch, check_s3_backups_email=None)
    with host.override:
        host.run(Exit.ERROR)
        host.run(Exit.OK)
        host.run(Exit.ERROR, store="couch")
        host.settings["check_s3_backups_email"] = TO
        host.run(Exit.OK)
    assert mail_server.subjects == ["[icds] couch: the daily backup failed"]
