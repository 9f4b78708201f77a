"""The history on HQ's own database server."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from django.core.management import call_command
from django.db import connections

from hq_backups import records
from hq_backups.engine.config import Config, Job, StoreConfig
from hq_backups.engine.events import Event
from hq_backups.models import Artifact, BackupRun
from tests.testbed.postgres import PostgresServer
from tests.testbed.process import wait_until

pytest.importorskip("psycopg2", reason="the tests' driver of PostgreSQL is not installed")

RUN = "20261122T000002Z-pg0-postgres"
ENTRY = {
    "store": "postgres",
    "mode": "plain",
    "type": "daily",
    "env": "demo",
    "host": "pg0",
    "name": "n",
    "run": RUN,
    "taken_at": "2026-11-22T00:00:02Z",
    "size": 1,
    "sha256": "a" * 64,
    "managed": True,
    "locations": [],
}


class Router:
    def db_for_read(self, model: Any, **_: Any) -> str | None:
        return "pg" if model._meta.app_label == "hq_backups" else None

    db_for_write = db_for_read


def connect(server: PostgresServer, database: str, settings: Any) -> None:
    settings.DATABASE_ROUTERS = [Router()]
    template = connections["default"].settings_dict
    connections.databases["pg"] = {
        **template,
        "ENGINE": "django.db.backends.postgresql",
        "NAME": database,
        "USER": "postgres",
        "HOST": server.host,
        "PORT": server.port,
        "OPTIONS": {"connect_timeout": 5},
        "TEST": {},
    }


@pytest.fixture
def history(fresh_pg: Any, settings: Any, django_db_blocker: Any) -> Iterator[PostgresServer]:
    """Put the history on a PostgreSQL server of its own, which a test may stop."""
    server: PostgresServer = fresh_pg(15)
    database = server.create_database("history")
    connect(server, database, settings)
    with django_db_blocker.unblock():
        call_command("migrate", "hq_backups", database="pg", verbosity=0)
        yield server
        connections["pg"].close()
    del connections["pg"]
    del connections.databases["pg"]


def recorder(said: list[Event]) -> records.Recorder:
    config = Config("demo", "pg0", stores={"postgres": StoreConfig("postgres", "plain", Path("/b"))})
    return records.Recorder(
        Job("restore", config, {"selection": {"store": "postgres"}}, run=RUN), said.append
    )


def tell(to: records.Recorder, kind: str, **data: Any) -> None:
    to(Event(kind, data, RUN, datetime(2026, 11, 22, tzinfo=UTC)))


def test_a_run_in_which_the_database_is_restored_is_still_recorded(history: PostgresServer) -> None:
    said: list[Event] = []
    recording = recorder(said)
    tell(recording, "started", store="postgres")
    # The restored database does not know of the run that restored it.
    BackupRun.objects.all().delete()
    history.stop("fast")
    history.start()
    tell(recording, "result", ok=True, exit=0)
    assert BackupRun.objects.get().status == "ok"
    assert said == []


def test_between_its_writes_a_run_holds_no_connection(history: PostgresServer) -> None:
    tell(recorder([]), "started", store="postgres")
    name = connections.databases["pg"]["NAME"]
    connected = f"select count(*) from pg_stat_activity where datname = '{name}'"
    wait_until(lambda: history.psql(connected).strip() == "0", what="the history to disconnect")


def test_a_server_that_is_down_costs_one_warning(history: PostgresServer) -> None:
    said: list[Event] = []
    recording = recorder(said)
    history.stop("immediate")
    tell(recording, "started", store="postgres")
    tell(recording, "result", ok=True, exit=0)
    assert [event.kind for event in said] == ["warning"]


def test_sync_takes_what_postgresql_refuses_and_changes_nothing_when_repeated(
    history: PostgresServer,
) -> None:
    hostile = [
        ENTRY,
        {**ENTRY, "name": "n\x00ul\udcff", "manifest": {"a\x00": ["\x00", float("nan")]}},
        {**ENTRY, "name": "x" * 5000, "size": 2**80, "host": "h" * 5000, "locations": [{"kind": "\x00"}]},
    ]
    assert records.sync(hostile, ["postgres"]) == (3, 0)
    before = list(Artifact.objects.order_by("pk").values())
    assert records.sync(hostile, ["postgres"]) == (3, 0)
    assert list(Artifact.objects.order_by("pk").values()) == before
    assert records.sync(hostile[:1], ["postgres"]) == (1, 2)
