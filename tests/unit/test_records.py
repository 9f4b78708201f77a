"""The history is written from events, rebuilt from the catalog, and never in a run's way."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from django.core.management import call_command
from django.db import DatabaseError, connection

from hq_backups import artifacts, records
from hq_backups.engine.config import Config, Job, StoreConfig
from hq_backups.engine.events import Event
from hq_backups.models import Artifact, BackupRun
from hq_backups.process_id import ProcessId

RUN = "20261122T000002Z-pg0-postgres"
AT = datetime(2026, 11, 22, 0, 0, 2, tzinfo=UTC)
LATER = datetime(2026, 11, 22, 0, 10, 2, tzinfo=UTC)
MANIFEST = {
    "run": RUN,
    "name": "postgres_demo_daily_2026_11_22.tar.gz",
    "store": "postgres",
    "mode": "plain",
    "type": "daily",
    "env": "demo",
    "host": "pg0",
    "started_at": "2026-11-22T00:00:02Z",
    "size": 123,
    "sha256": "a" * 64,
}


def job(verb: str = "backup", **request: Any) -> Job:
    store = StoreConfig("postgres", "plain", Path("/b"))
    request = request or {"store": "postgres", "type": "daily"}
    return Job(verb, Config("demo", "pg0", stores={"postgres": store}), request, run=RUN)


def tell(recorder: records.Recorder, kind: str, at: datetime = AT, **data: Any) -> None:
    recorder(Event(kind, data, RUN, at))


def entry(**changes: Any) -> dict[str, Any]:
    public = {k: v for k, v in MANIFEST.items() if k != "started_at"}
    places = [{"kind": "local", "path": "/b/x"}]
    return {**public, "taken_at": MANIFEST["started_at"], "managed": True, "locations": places, **changes}


@pytest.fixture
def said() -> list[Event]:
    return []


@pytest.mark.django_db
class TestARun:
    def test_is_written_when_it_begins_and_when_it_ends(self, said: list[Event]) -> None:
        recorder = records.Recorder(job(), said.append)
        tell(recorder, "started", verb="backup", store="postgres", env="demo", host="pg0")
        row = BackupRun.objects.get()
        assert (row.run, row.status, row.verb, row.type, row.mode) == (
            RUN,
            "running",
            "backup",
            "daily",
            "plain",
        )
        tell(recorder, "artifact", manifest=MANIFEST, location={"kind": "local", "path": "/b/x"})
        brief = {"name": MANIFEST["name"], "run": RUN}
        tell(recorder, "artifact", manifest=brief, location={"kind": "s3", "bucket": "b", "key": "k"})
        tell(recorder, "result", LATER, ok=True, exit=0, seconds=600.0)
        row.refresh_from_db()
        assert (row.status, row.exit_code, row.finished_at, row.seconds) == ("ok", 0, LATER, 600.0)
        assert (row.artifact, row.size) == (MANIFEST["name"], 123)
        made = Artifact.objects.get()
        assert [place["kind"] for place in made.locations] == ["local", "s3"]
        assert (made.taken_at, made.manifest["sha256"]) == (AT, "a" * 64)
        assert said == []

    def test_keeps_its_last_steps_and_the_process_that_does_it(self, said: list[Event]) -> None:
        recorder = records.Recorder(job(), said.append)
        tell(recorder, "started", verb="backup", store="postgres")
        assert BackupRun.objects.get().process == str(ProcessId.mine())
        for n in range(records.MOST_STEPS + 1):
            tell(recorder, "step", name="copy", message=f"step {n}\x00")
        tell(recorder, "result", LATER, ok=True, exit=0)
        steps = BackupRun.objects.get().steps
        assert len(steps) == records.MOST_STEPS
        assert steps[0] == {"at": "2026-11-22T00:00:02Z", "name": "copy", "message": "step 1?"}

    def test_that_begins_a_part_as_another_user_is_still_one(self, said: list[Event]) -> None:
        recorder = records.Recorder(job(), said.append)
        tell(recorder, "started", verb="restore", store="postgres")
        tell(recorder, "started", LATER, verb="unpack", store="all")
        tell(recorder, "result", LATER, ok=True, exit=0)
        row = BackupRun.objects.get()
        assert (row.store, row.started_at) == ("postgres", AT)

    def test_keeps_error_hint_warnings_and_facts(self, said: list[Event]) -> None:
        recorder = records.Recorder(job("restore", selection={"store": "postgres"}), said.append)
        tell(recorder, "started", store="postgres")
        tell(recorder, "warning", code="w", message="careful\x00")
        tell(recorder, "data", downtime_seconds=12.5, bad=float("nan"))
        tell(recorder, "error", code="X", message="broke \udcff", hint="type this", exit=8)
        tell(recorder, "result", LATER, ok=False, exit=8)
        row = BackupRun.objects.get()
        assert (row.status, row.exit_code, row.hint, row.warnings) == ("failed", 8, "type this", ["careful?"])
        assert row.error == "broke ?"
        assert row.facts == {"downtime_seconds": 12.5, "bad": None}
        assert row.store == "postgres"

    def test_with_warnings_is_a_warning(self, said: list[Event]) -> None:
        recorder = records.Recorder(job(), said.append)
        tell(recorder, "warning", code="w", message="careful")
        tell(recorder, "result", ok=True, exit=0)
        assert BackupRun.objects.get().status == "warning"

    def test_that_never_said_it_began_is_written_at_its_end(self, said: list[Event]) -> None:
        recorder = records.Recorder(job(), said.append)
        tell(recorder, "result", ok=False, exit=5)
        row = BackupRun.objects.get()
        assert (row.run, row.exit_code) == (RUN, 5)

    def test_of_the_same_second_gets_a_row_of_its_own(self, said: list[Event]) -> None:
        first, second = (records.Recorder(job(), said.append) for _ in range(2))
        tell(first, "started", store="postgres")
        tell(second, "started", store="postgres")
        tell(second, "result", ok=False, exit=6)
        tell(first, "result", ok=True, exit=0)
        assert BackupRun.objects.get(run=RUN).exit_code == 0
        assert BackupRun.objects.exclude(run=RUN).get().exit_code == 6

    def test_whose_row_a_restore_rolled_away_is_written_again(self, said: list[Event]) -> None:
        recorder = records.Recorder(job(), said.append)
        tell(recorder, "started", store="postgres")
        BackupRun.objects.all().delete()
        tell(recorder, "result", LATER, ok=True, exit=0)
        assert BackupRun.objects.get().started_at == AT

    def test_of_verify_marks_its_artifact(self, said: list[Event]) -> None:
        records.sync([entry()], ["postgres"])
        recorder = records.Recorder(job("verify", selection={"store": "postgres"}), said.append)
        tell(
            recorder, "verified", LATER, store="postgres", verified_run=RUN, name=MANIFEST["name"], deep=True
        )
        tell(recorder, "result", LATER, ok=True, exit=0)
        assert Artifact.objects.get().verified_at == LATER
        assert BackupRun.objects.get(verb="verify").facts == {"deep": True}

    def test_without_an_id_is_not_recorded(self, said: list[Event]) -> None:
        the_job = job()
        recorder = records.Recorder(Job("catalog", the_job.config, {}), said.append)
        tell(recorder, "result", ok=True, exit=0)
        assert not BackupRun.objects.exists()


class Broken:
    """A database that fails like one that is down, and counts how often it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked = 0
        monkeypatch.setattr(connection, "ensure_connection", self)
        monkeypatch.setattr(connection, "cursor", self)

    def __call__(self) -> None:
        self.asked += 1
        raise DatabaseError("could not connect to server\nIs it running?")


def test_a_database_that_is_down_is_said_once_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, said: list[Event]
) -> None:
    broken = Broken(monkeypatch)
    recorder = records.Recorder(job(), said.append)
    tell(recorder, "started", store="postgres")
    tell(recorder, "step", message="x")
    tell(recorder, "artifact", manifest=MANIFEST)
    tell(recorder, "result", ok=True, exit=0)
    assert [event.kind for event in said] == ["warning"]
    assert "could not connect to server" in said[0].data["message"]
    assert "Is it running" not in said[0].data["message"]
    assert broken.asked >= 2


@pytest.mark.django_db(transaction=True)
def test_a_database_that_comes_back_gets_the_whole_run(
    monkeypatch: pytest.MonkeyPatch, said: list[Event]
) -> None:
    recorder = records.Recorder(job(), said.append)
    with monkeypatch.context() as patch:
        Broken(patch)
        tell(recorder, "started", store="postgres")
    tell(recorder, "result", LATER, ok=True, exit=0)
    row = BackupRun.objects.get()
    assert (row.started_at, row.status) == (AT, "ok")


@pytest.mark.django_db(transaction=True)
def test_no_transaction_and_no_connection_stays_open_during_a_run(
    monkeypatch: pytest.MonkeyPatch, said: list[Event]
) -> None:
    closed = []
    monkeypatch.setattr(connection, "close", lambda: closed.append(connection.in_atomic_block))
    recorder = records.Recorder(job(), said.append)
    tell(recorder, "started", store="postgres")
    assert closed == [False, False]
    assert not connection.in_atomic_block


@pytest.mark.django_db
class TestSync:
    def test_rebuilds_everything_and_changes_nothing_when_repeated(self) -> None:
        entries = [entry(), entry(name="old.tar.gz", run=None, managed=False, sha256=None, host=None)]
        assert records.sync(entries, ["postgres"]) == (2, 0)
        before = list(Artifact.objects.order_by("pk").values())
        assert records.sync(entries, ["postgres"]) == (2, 0)
        assert list(Artifact.objects.order_by("pk").values()) == before
        assert before[0]["sha256"] == "a" * 64
        assert before[1]["run"] == ""

    def test_rebuilds_the_runs_and_ends_what_a_restore_left_running(self) -> None:
        other = "20261121T000002Z-pg0-postgres"
        BackupRun.objects.create(run=RUN, verb="backup", store="postgres", started_at=AT)
        BackupRun.objects.create(
            run="failed", verb="backup", store="postgres", started_at=AT, status="failed", exit_code=1
        )
        entries = [entry(), entry(name="b", run=other), entry(name="bad", run="x", problem="short")]
        for _ in "twice":
            records.sync(entries, ["postgres"])
            rows = {row.run: (row.status, row.exit_code) for row in BackupRun.objects.all()}
            assert rows == {RUN: ("ok", 0), other: ("ok", 0), "failed": ("failed", 1)}

    def test_marks_what_is_gone_and_finds_it_again(self) -> None:
        records.sync([entry(), entry(name="b")], ["postgres"])
        assert records.sync([entry()], ["postgres"]) == (1, 1)
        assert Artifact.objects.get(name="b").gone_at is not None
        assert records.sync([entry()], ["postgres"]) == (1, 0)
        records.sync([entry(), entry(name="b")], ["postgres"])
        assert Artifact.objects.get(name="b").gone_at is None

    def test_marks_nothing_of_another_store_nor_after_an_incomplete_listing(self) -> None:
        records.sync([entry(), entry(store="couch", name="c")], ["postgres", "couch"])
        assert records.sync([], ["postgres"], complete=False) == (0, 0)
        assert records.sync([], ["postgres"]) == (0, 1)
        assert Artifact.objects.filter(gone_at=None).get().store == "couch"

    def test_keeps_what_a_list_does_not_tell(self) -> None:
        records.sync([entry(verified_at="2026-11-22T00:10:02Z", manifest=MANIFEST)], ["postgres"])
        records.sync([entry(size=124)], ["postgres"])
        row = Artifact.objects.get()
        assert (row.size, row.verified_at, row.manifest["size"]) == (124, LATER, 123)

    def test_joins_the_good_and_the_bad_copy_of_one_artifact(self) -> None:
        bad = entry(problem="its object is not in the bucket", locations=[{"kind": "s3"}])
        assert records.sync([entry(), bad], ["postgres"]) == (1, 0)
        row = Artifact.objects.get()
        assert [place["kind"] for place in row.locations] == ["local", "s3"]
        assert "bucket" in row.problem

    @pytest.mark.parametrize(
        "hostile",
        [
            {"name": "n\x00ul"},
            {"name": "x" * 5000},
            {"size": 2**80},
            {"size": "many"},
            {"size": True},
            {"host": "\udcff"},
            {"env": {"a": 1}},
            {"locations": [{"kind": "\x00", "n": float("inf")}]},
            {"manifest": {"deep": ["\x00"] * 3}},
            {"verified_at": "yesterday"},
            {"taken_at": "never"},
            {"name": None},
        ],
        ids=str,
    )
    def test_takes_hostile_entries_without_an_error(self, hostile: dict[str, Any]) -> None:
        records.sync([entry(**hostile), entry(name="good")], ["postgres"])
        assert Artifact.objects.filter(name="good").exists()

    def test_takes_few_queries_for_many_entries(self, django_assert_max_num_queries: Any) -> None:
        with django_assert_max_num_queries(12):
            records.sync(
                [entry(name=f"n{n}", verified_at="2026-11-22T00:10:02Z") for n in range(150)], ["postgres"]
            )


def test_integers_are_what_a_column_can_hold() -> None:
    assert [artifacts.integer(v) for v in (5, 2**63 - 1, 2**63, "5", None, True)] == [
        5,
        2**63 - 1,
        None,
        None,
        None,
        None,
    ]


@pytest.mark.django_db
def test_migrations_say_what_the_models_say() -> None:
    call_command("makemigrations", "hq_backups", check=True, dry_run=True, verbosity=0)
