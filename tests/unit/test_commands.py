"""What each command asks of the engine, and how it ends."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from django.core.management import call_command

from hq_backups import bridge, identity, restoring
from hq_backups.engine.config import Job
from hq_backups.engine.errors import Exit, WrongUser
from hq_backups.engine.events import Event, Events, Sink
from hq_backups.settings_table import BUILT_MODES

SHA = "f" * 64
PLAN = {
    "store": "postgres",
    "env": "demo",
    "name": "b.tar.gz",
    "sha256": SHA,
    "size": 5,
    "target": "/opt/pg",
    "next_steps": ["commcare-cloud demo downtime end"],
}
ENTRY = {
    "store": "postgres",
    "mode": "plain",
    "type": "daily",
    "env": "demo",
    "host": "pg0",
    "name": "b.tar.gz",
    "taken_at": "2026-11-22T00:00:02Z",
    "size": 5,
    "sha256": SHA,
    "managed": True,
    "verified_at": None,
    "run": "r1",
    "locations": [{"kind": "local", "path": "/b/b.tar.gz"}],
    "problem": None,
}


class Engine:
    """Stands for the bridge: keeps the jobs, answers as it is told."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.users: list[str | None] = []
        self.answer: Callable[[Job, Events], Exit | None] = lambda job, events: None

    def __call__(self, job: Job, sink: Sink, *, user: str | None = None, python: Path | None = None) -> Exit:
        self.jobs.append(job)
        self.users.append(user)
        events = Events(sink, job.run)
        code = self.answer(job, events) or Exit.OK
        events.emit("result", ok=not code, exit=int(code), store=bridge.store_of(job), seconds=0.1)
        return code


class Ended:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def last(self) -> str:
        return self.out.splitlines()[-1]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, settings: Any, tmp_path: Path) -> Engine:
    settings.HQ_BACKUPS = {
        "deploy_env": "demo",
        "backup_postgres": "plain",
        "backup_host_name": "pg0",
        "postgresql_backup_dir": str(tmp_path / "backups"),
        "postgresql_data_dir": str(tmp_path / "data"),
    }
    (tmp_path / "data").mkdir()
    fake = Engine()
    monkeypatch.setattr(bridge, "run", fake)
    return fake


def run(*words: str) -> Ended:
    out, err = io.StringIO(), io.StringIO()
    with pytest.raises(SystemExit) as ended:
        call_command(*words, stdout=out, stderr=err)
    assert isinstance(ended.value.code, int)
    return Ended(ended.value.code, out.getvalue(), err.getvalue())


def typing(monkeypatch: pytest.MonkeyPatch, text: str | None) -> None:
    """Put an operator at a terminal."""

    def answer(prompt: str) -> str:
        if text is None:
            raise EOFError
        return text

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr(restoring.sys.stdin, "isatty", lambda: True, raising=False)


pytestmark = pytest.mark.django_db


class TestRunBackup:
    def test_hands_over_a_job_with_its_run_and_tells_the_result(self, engine: Engine) -> None:
        ended = run(
            "run_backup",
            "postgres",
            "--type=daily",
            "--no-upload",
            "--no-prune",
            "--accept-shrink",
            "--accept-bad-pages",
        )
        (job,) = engine.jobs
        assert job.verb == "backup"
        request = {
            "store": "postgres",
            "type": "daily",
            "upload": False,
            "prune": False,
            "accept_shrink": True,
            "accept_bad_pages": True,
        }
        assert {key: job.request[key] for key in request} == request
        assert job.run is not None
        assert job.run.endswith("-pg0-postgres")
        assert job.config.timezone
        assert (ended.code, ended.last) == (0, f"RESULT ok run={job.run} exit=0")

    @pytest.mark.parametrize("code", list(Exit))
    def test_ends_with_the_engines_code(self, engine: Engine, code: Exit) -> None:
        engine.answer = lambda job, events: code
        ended = run("run_backup", "postgres")
        assert ended.code == code
        assert ended.last.endswith(f"exit={int(code)}")
        assert ended.last.startswith("RESULT ok" if code is Exit.OK else "RESULT failed")

    def test_is_manual_unless_told(self, engine: Engine) -> None:
        run("run_backup", "postgres")
        assert engine.jobs[0].request["type"] == "manual"

    def test_a_store_that_is_not_built_is_a_usage_error(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delitem(BUILT_MODES, "elasticsearch")
        ended = run("run_backup", "elasticsearch")
        assert (ended.code, ended.last) == (2, "RESULT failed run=- exit=2")
        assert "not built yet" in ended.err
        assert engine.jobs == []

    def test_a_store_that_is_switched_off_is_a_usage_error(self, engine: Engine, settings: Any) -> None:
        settings.HQ_BACKUPS = {**settings.HQ_BACKUPS, "backup_postgres": False}
        assert run("run_backup", "postgres").code == 2
        ended = run("run_backup", "all")
        assert ended.code == 2
        assert "switched on" in ended.err
        assert engine.jobs == []

    def test_wrong_settings_are_said_before_anything_starts(self, engine: Engine, settings: Any) -> None:
        settings.HQ_BACKUPS = {**settings.HQ_BACKUPS, "postgresql_bakcup_days": 3}
        ended = run("run_backup", "postgres")
        assert ended.code == 2
        assert "postgresql_backup_days" in ended.err
        assert engine.jobs == []

    def test_all_fails_when_a_store_of_this_host_is_switched_on_but_not_built(
        self, engine: Engine, settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delitem(BUILT_MODES, "couch")
        settings.HQ_BACKUPS = {
            **settings.HQ_BACKUPS,
            "backup_couch": True,
            "couch_data_dir": str(tmp_path / "couch"),
        }
        assert run("run_backup", "all").code == 0
        (tmp_path / "couch").mkdir()
        ended = run("run_backup", "all")
        assert ended.code == 1
        assert "ERROR: store couch is not built yet" in ended.err
        assert [job.request["store"] for job in engine.jobs] == ["postgres", "postgres"]

    def test_json_is_lines_of_events_and_the_result_is_on_standard_error(self, engine: Engine) -> None:
        engine.answer = lambda job, events: events.step("backup", "reading")
        ended = run("run_backup", "postgres", "--json")
        assert [json.loads(line)["kind"] for line in ended.out.splitlines()] == ["step", "result"]
        assert ended.err.splitlines()[-1].startswith("RESULT ok run=2")

    def test_an_unforeseen_failure_is_an_error_with_a_result(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(*_: Any) -> None:
            raise RuntimeError("unforeseen")

        engine.answer = broken
        ended = run("run_backup", "postgres")
        assert (ended.code, "unforeseen" in ended.err) == (1, True)
        assert ended.last.startswith("RESULT failed")


class TestOtherVerbs:
    def test_prune_names_every_enabled_store(self, engine: Engine) -> None:
        assert run("prune_backups", "--manual-older-than=90", "--dry-run").code == 0
        expected = {"store": "postgres", "manual_older_than": 90, "dry_run": True}
        assert [(job.verb, dict(job.request)) for job in engine.jobs] == [("prune", expected)]

    def test_upload_needs_a_store_that_uploads(self, engine: Engine, settings: Any) -> None:
        assert run("upload_backups").code == 2
        settings.HQ_BACKUPS = {
            **settings.HQ_BACKUPS,
            "postgres_s3": True,
            "AMAZON_S3_ACCESS_KEY": "a",
            "AMAZON_S3_SECRET_KEY": "b",
            "aws_endpoint": "http://127.0.0.1:1",
        }
        assert run("upload_backups", "postgres").code == 0
        assert [job.verb for job in engine.jobs] == ["upload"]

    def test_verify_finds_the_store_in_the_name(self, engine: Engine) -> None:
        assert run("verify_backup", "postgres_demo_daily_2026_11_22.tar.gz", "--deep").code == 0
        assert run("verify_backup", "latest", "--source=s3", "--host=pg1", "--version-id=v").code == 0
        first, second = (job.request for job in engine.jobs)
        assert (first["deep"], first["selection"]["name"]) == (True, "postgres_demo_daily_2026_11_22.tar.gz")
        assert (second["selection"]["source"], second["selection"]["host"]) == ("s3", "pg1")
        assert second["selection"]["version_id"] == "v"
        assert run("verify_backup", "couchdb_daily_2026_11_22.tar.gz").code == 2

    def test_verify_asks_for_the_store_when_nothing_says_it(self, engine: Engine, settings: Any) -> None:
        settings.HQ_BACKUPS = {**settings.HQ_BACKUPS, "backup_postgres": False}
        ended = run("verify_backup", "latest")
        assert ended.code == 2
        assert "--store" in ended.err


class TestList:
    def test_json_is_one_list_of_exactly_the_public_keys(self, engine: Engine) -> None:
        engine.answer = lambda job, events: events.emit("entry", **ENTRY)
        ended = run("list_backups", "--json")
        (listed,) = json.loads(ended.out)
        assert listed == {k: v for k, v in ENTRY.items() if k != "problem"}
        assert ended.code == 0
        assert "RESULT" not in ended.out + ended.err

    def test_errors_leave_json_alone(self, engine: Engine) -> None:
        def answer(job: Job, events: Events) -> Exit:
            events.warning("bucket-unread", "the bucket is not listed")
            return events.error(RuntimeError("broken"))

        engine.answer = answer
        ended = run("list_backups", "--json")
        assert (json.loads(ended.out), ended.code) == ([], 1)
        assert "WARNING: the bucket" in ended.err
        assert "ERROR: broken" in ended.err

    def test_when_the_user_cannot_be_become_s3_is_listed_from_here(
        self, engine: Engine, settings: Any
    ) -> None:
        settings.HQ_BACKUPS = {
            **settings.HQ_BACKUPS,
            "postgres_s3": True,
            "AMAZON_S3_ACCESS_KEY": "a",
            "AMAZON_S3_SECRET_KEY": "b",
            "aws_endpoint": "http://127.0.0.1:1",
        }

        def answer(job: Job, events: Events) -> Exit | None:
            if job.request["source"] != "s3":
                return events.error(WrongUser("this must run as postgres"))
            events.emit("entry", **ENTRY)
            return None

        engine.answer = answer
        ended = run("list_backups", "--sync")
        assert ended.code == 0
        assert "b.tar.gz" in ended.out
        assert "WARNING: local backups of postgres are not listed: this must run as postgres" in ended.err
        assert "nothing was marked as gone" in ended.err
        assert engine.users == [None, identity.me()]
        assert run("list_backups", "--source=local").code == 5

    def test_sync_writes_the_records(self, engine: Engine) -> None:
        from hq_backups.models import Artifact

        engine.answer = lambda job, events: events.emit("entry", **ENTRY)
        assert "records: 1 artifacts, 0 gone" in run("list_backups", "--sync").err
        engine.answer = lambda job, events: None
        run("list_backups", "--sync", "--since=2026-11-01")
        assert Artifact.objects.get().gone_at is None
        run("list_backups", "--sync")
        assert Artifact.objects.get().gone_at is not None

    def test_config_shows_values_and_sources_but_no_secret(self, engine: Engine, settings: Any) -> None:
        settings.HQ_BACKUPS = {
            **settings.HQ_BACKUPS,
            "AMAZON_S3_SECRET_KEY": "t0ps3cret",
            "AMAZON_S3_ACCESS_KEY": "k",
        }
        ended = run("list_backups", "--config")
        assert "deploy_env: demo  (settings.HQ_BACKUPS)" in ended.out
        shown = json.loads(run("list_backups", "--config", "--json").out)
        assert {"name", "value", "source"} <= set(shown[0])
        assert "t0ps3cret" not in ended.out + json.dumps(shown)
        assert ended.code == 0
        assert engine.jobs == []


def planning(job: Job, events: Events) -> None:
    events.emit("plan", **PLAN)


class TestRestore:
    @pytest.fixture(autouse=True)
    def planned(self, engine: Engine) -> None:
        engine.answer = planning

    def only_planned(self, engine: Engine) -> bool:
        return all(job.request["plan_only"] for job in engine.jobs)

    def test_what_the_plan_read_of_an_old_archive_is_handed_back_and_not_shown(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        typing(monkeypatch, "demo")
        surveyed = {"run": "unmanaged-0123", "source": {"root": "opt/data"}}
        engine.answer = lambda job, events: events.emit("plan", **PLAN, surveyed=surveyed)
        ended = run("restore_backup", "postgres", "postgres_daily_2017_07_01.tar.gz", "--from-env=unknown")
        assert ended.code == 0
        assert [job.request["surveyed"] for job in engine.jobs] == [None, surveyed]
        assert "unmanaged" not in ended.out

    def test_shows_the_plan_asks_and_restores_what_was_confirmed(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        typing(monkeypatch, "demo")
        ended = run(
            "restore_backup",
            "postgres",
            "latest",
            "--source=s3",
            "--host=pg0",
            "--version-id=v",
            "--disconnect",
            "--from-env=prod",
            "--staging-dir=/mnt/s",
        )
        assert ended.code == 0
        plan, real = (job.request for job in engine.jobs)
        assert (plan["plan_only"], plan["expected_sha256"]) == (True, None)
        assert (real["plan_only"], real["expected_sha256"]) == (False, SHA)
        assert {**plan, "plan_only": False, "expected_sha256": SHA} == dict(real)
        assert real["selection"] == {
            "store": "postgres",
            "name": "latest",
            "source": "s3",
            "host": "pg0",
            "version_id": "v",
        }
        assert (real["disconnect"], real["from_env"], real["staging_dir"]) == (True, "prod", "/mnt/s")
        assert (plan["surveyed"], real["surveyed"]) == (None, None)
        order = [
            ended.out.index(text) for text in ("Plan", "downtime start", "Next:", "downtime end", "RESULT ok")
        ]
        assert order == sorted(order)
        assert ended.last.count("pg0-postgres") == 1

    @pytest.mark.parametrize("typed", ["", "prod", "DEMO", "yes", None])
    def test_another_answer_changes_nothing(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch, typed: str | None
    ) -> None:
        typing(monkeypatch, typed)
        assert run("restore_backup", "postgres", "latest").code == 4
        assert self.only_planned(engine)

    def test_without_a_terminal_it_is_not_confirmed(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(restoring.sys, "stdin", io.StringIO("demo\n"))
        ended = run("restore_backup", "postgres", "latest")
        assert ended.code == 4
        assert "--noinput --confirm-env demo" in ended.err
        assert engine.jobs == []

    @pytest.mark.parametrize(
        "words", [["--noinput"], ["--noinput", "--confirm-env=prod"], ["--noinput", "--confirm-env="]]
    )
    def test_noinput_needs_the_environments_name(self, engine: Engine, words: list[str]) -> None:
        assert run("restore_backup", "postgres", "latest", *words).code == 4
        assert engine.jobs == []

    def test_noinput_with_the_name_restores(self, engine: Engine) -> None:
        assert run("restore_backup", "postgres", "latest", "--noinput", "--confirm-env=demo").code == 0
        assert [job.request["plan_only"] for job in engine.jobs] == [False]

    def test_confirm_env_alone_is_no_confirmation(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        typing(monkeypatch, "no")
        assert run("restore_backup", "postgres", "latest", "--confirm-env=demo").code == 4

    def test_dry_run_only_plans_and_records_no_restore(self, engine: Engine) -> None:
        from hq_backups.models import BackupRun

        ended = run("restore_backup", "postgres", "latest", "--dry-run")
        assert ended.code == 0
        assert "b.tar.gz" in ended.out
        assert self.only_planned(engine)
        assert not BackupRun.objects.exists()

    def test_a_plan_that_fails_ends_with_its_code(self, engine: Engine) -> None:
        engine.answer = lambda job, events: Exit.BAD_BACKUP
        ended = run("restore_backup", "postgres", "latest", "--noinput", "--confirm-env=demo")
        assert (ended.code, len(engine.jobs)) == (3, 1)

    @pytest.mark.parametrize("code", [Exit.RESTORE_ROLLED_BACK, Exit.RESTORE_NEEDS_HANDS])
    def test_a_restore_that_fails_tells_no_next_steps(self, engine: Engine, code: Exit) -> None:
        def answer(job: Job, events: Events) -> Exit | None:
            planning(job, events)
            return None if job.request["plan_only"] else code

        engine.answer = answer
        ended = run("restore_backup", "postgres", "latest", "--noinput", "--confirm-env=demo")
        assert ended.code == code
        assert "Next:" not in ended.out

    def test_an_engine_without_a_plan_restores_nothing(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        typing(monkeypatch, "demo")
        engine.answer = lambda job, events: None
        assert run("restore_backup", "postgres", "latest").code == 1
        assert self.only_planned(engine)

    def test_undo_is_planned_and_confirmed_too(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        typing(monkeypatch, "demo")
        assert run("restore_backup", "postgres", "--undo").code == 0
        assert [(job.verb, job.request["plan_only"]) for job in engine.jobs] == [
            ("undo", True),
            ("undo", False),
        ]

    @pytest.mark.parametrize(
        "words",
        [
            ["postgres"],
            ["postgres", "latest", "--undo"],
            ["postgres", "latest", "--target-dir=here"],
            ["postgres", "latest", "--recreate"],
            ["postgres", "latest", "--in-place", "--target-dir=/mnt/x"],
            ["postgres", "--undo", "--in-place"],
        ],
    )
    def test_what_does_not_fit_together_is_a_usage_error(self, engine: Engine, words: list[str]) -> None:
        assert run("restore_backup", *words).code == 2
        assert engine.jobs == []

    def test_beside_needs_no_downtime(self, engine: Engine) -> None:
        ended = run(
            "restore_backup", "postgres", "latest", "--target-dir=/mnt/x", "--noinput", "--confirm-env=demo"
        )
        assert (ended.code, "downtime start" in ended.out) == (0, False)
        assert engine.jobs[0].request["target_dir"] == "/mnt/x"


def test_a_job_carries_no_other_stores_settings(engine: Engine, settings: Any) -> None:
    settings.HQ_BACKUPS = {**settings.HQ_BACKUPS, "backup_couch": True, "COUCH_PASSWORD": "t0ps3cret"}
    run("run_backup", "postgres")
    assert set(engine.jobs[0].config.stores) == {"postgres"}
    assert "t0ps3cret" not in engine.jobs[0].to_json()


def test_events_of_a_run_reach_the_history(engine: Engine) -> None:
    from hq_backups.models import BackupRun

    engine.answer = lambda job, events: events.error(WrongUser("no", hint="sudo"))
    run("run_backup", "postgres")
    row = BackupRun.objects.get()
    assert (row.status, row.exit_code, row.hint) == ("failed", 5, "sudo")


def test_a_history_that_is_down_is_a_warning(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise OSError("database is away")

    monkeypatch.setattr("hq_backups.models.BackupRun.objects.get_or_create", broken)
    ended = run("run_backup", "postgres")
    assert (ended.code, ended.err.count("database is away")) == (0, 1)


def test_unseen_event_kinds_are_passed_over(engine: Engine) -> None:
    engine.answer = lambda job, events: events.sink(Event("brand-new", {}))
    assert run("run_backup", "postgres").code == 0
