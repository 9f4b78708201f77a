"""Fifty thousand runs: the page asks as many questions as for five hundred, and is about as quick."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.core.management import call_command
from django.db import connections
from django.db.models import Model
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from pytest_django import DjangoDbBlocker

from hq_backups import conf, health, history
from hq_backups.engine.events import utc_now
from hq_backups.models import Artifact, BackupRun
from tests.testbed.postgres import PostgresServer

FEW, MANY = 500, 50_000
STORES = ("postgres", "couch", "blobdb", "elasticsearch")
HOSTS = {store: f"{store}0" for store in STORES}
SETTINGS = {
    "deploy_env": "demo",
    "backup_postgres": "plain",
    "backup_couch": True,
    "backup_blobdb": True,
    "es_local_repo": True,
    "backup_hosts": {host: [store] for store, host in HOSTS.items()},
}
QUERIES = {
    # session, user, hosts of the filter, the count, the rows, first and last date by two ways, four curves,
    # and what stands: hosts of artifacts, hosts of runs, artifacts, runs, how long they took.
    "backuprun": 17,
    # session, user, hosts of the filter, the count, the rows, first and last date by two ways.
    "artifact": 8,
}
ALIAS = "default"


def fill() -> None:
    """Add a month of backups, one each six hours per store; most artifacts are gone."""
    now = utc_now()
    runs, artifacts = [], []
    for number in range(FEW):
        store = STORES[number % 4]
        at = now - timedelta(hours=1 + 6 * (number // 4), seconds=number % 4)
        type = "weekly" if at.isoweekday() == 7 else "daily"
        name, host = f"{store}_{number}", HOSTS[store]
        runs.append(
            BackupRun(
                run=name,
                verb="verify" if number % 10 == 9 else "backup",
                store=store,
                type=type,
                host=host,
                started_at=at,
                status="failed" if number % 50 == 49 else "ok",
                seconds=60.0,
                size=number,
                artifact=name,
                facts={"deep": False},
                warnings=[],
                steps=[{"at": "", "name": "copy", "message": "x" * 100}] * 3,
            )
        )
        artifacts.append(
            Artifact(
                run=name,
                name=name,
                store=store,
                type=type,
                host=host,
                taken_at=at,
                size=number,
                gone_at=now if number > 100 else None,
                manifest={"schema": 1, "x": "y" * 200},
                locations=[{"kind": "local", "path": "/b"}],
            )
        )
    BackupRun.objects.bulk_create(runs)
    Artifact.objects.bulk_create(artifacts)


def repeat(model: type[Model], names: set[str], at: str) -> None:
    """Add each row again for every month before, as rows of its own."""
    connection = connections[ALIAS]
    earlier = (
        f"{at} - number * interval '32 days'"
        if connection.vendor == "postgresql"
        else f"strftime('%Y-%m-%d %H:%M:%f', {at}, '-' || (number * 32) || ' days')"
    )
    columns = {field.column: field.column for field in model._meta.concrete_fields if not field.primary_key}
    columns |= {name: f"{name} || '-' || number" for name in names} | {at: earlier}
    if "gone_at" in columns:
        columns["gone_at"] = f"coalesce(gone_at, {at})"
    table = model._meta.db_table
    with connection.cursor() as cursor:
        cursor.execute(
            f"INSERT INTO {table} ({', '.join(columns)}) WITH RECURSIVE numbers(number) AS "
            f"(SELECT 1 UNION ALL SELECT number + 1 FROM numbers WHERE number < {MANY // FEW - 1}) "
            f"SELECT {', '.join(columns.values())} FROM {table}, numbers"
        )
        cursor.execute("ANALYZE")


@pytest.fixture(params=[pytest.param("sqlite", marks=pytest.mark.slow), "postgresql"], scope="module")
def database(request: Any, django_db_setup: None, django_db_blocker: DjangoDbBlocker) -> Iterator[str]:
    """Point Django at a database of its own, with the tables made."""
    settings = dict(connections[ALIAS].settings_dict)
    server, name = None, ":memory:"
    if request.param == "postgresql":
        server = request.getfixturevalue("pg15")
        assert isinstance(server, PostgresServer)
        name = server.create_database("history")
        engine = {"ENGINE": "django.db.backends.postgresql", "HOST": server.host, "PORT": str(server.port)}
        settings |= engine | {"USER": "postgres", "PASSWORD": ""}
    settings["NAME"] = name
    old = connections[ALIAS]
    with django_db_blocker.unblock():
        connections.settings[ALIAS] = settings
        connections[ALIAS] = connections.create_connection(ALIAS)
        try:
            call_command("migrate", verbosity=0, interactive=False)
            User.objects.create_superuser("someone", password="x")
            yield request.param
        finally:
            connections[ALIAS].close()
            connections.settings[ALIAS] = old.settings_dict
            connections[ALIAS] = old
            if server is not None:
                server.drop_database(name)


@pytest.mark.parametrize("use_tz", [True, False])
def test_the_page_tells_the_same_times_where_the_host_switched_use_tz_off(
    database: str, settings: Any, use_tz: bool
) -> None:
    settings.HQ_BACKUPS = SETTINGS
    settings.USE_TZ, settings.TIME_ZONE = use_tz, "America/New_York"
    at = datetime(2020, 3, 1, 2, 30, tzinfo=UTC)
    stored = at if use_tz else datetime(2020, 2, 29, 21, 30)
    BackupRun.objects.create(
        run=f"r{use_tz}", verb="backup", store="postgres", host="postgres0", started_at=stored, size=1, seconds=2.0,
        status="ok",
    )  # fmt: skip
    artifact = Artifact.objects.create(
        run=f"r{use_tz}", name="a", store="postgres", type="daily", host="postgres0", taken_at=stored
    )
    standing = next(
        s for s in history.standings(conf.resolve(), at + timedelta(hours=1)) if s.store == "postgres"
    )
    assert (standing.last_good["daily"].taken_at, standing.state) == (at, "ok")
    assert history.points([("postgres", "postgres0")])["postgres", "postgres0"][-1].at == at
    client = Client()
    client.force_login(User.objects.get())
    for query in ("", "?started_at__year=2020", "?started_at__year=2020&started_at__month=2"):
        text = client.get(reverse("admin:hq_backups_backuprun_changelist") + query).content.decode()
        assert "2020-03-01 02:30" in text
    text = client.get(reverse("admin:hq_backups_artifact_change", args=[artifact.pk])).content.decode()
    assert "2020-03-01 02:30:00 UTC" in text
    BackupRun.objects.all().delete()
    Artifact.objects.all().delete()


def measure(look: Callable[[], Any]) -> tuple[int, float]:
    """Return the queries of one look, and the seconds of the quickest of three."""
    look()
    times = []
    for _ in range(3):
        began = time.perf_counter()
        look()
        times.append(time.perf_counter() - began)
    with CaptureQueriesContext(connections[ALIAS]) as asked:
        look()
    return len(asked), min(times)


def test_fifty_thousand_runs_take_the_same_queries_and_about_the_same_time(
    database: str, settings: Any
) -> None:
    settings.HQ_BACKUPS = SETTINGS
    client = Client()
    client.force_login(User.objects.get())
    looks: dict[str, Callable[[], Any]] = {}
    for page in QUERIES:
        address = reverse(f"admin:hq_backups_{page}_changelist")
        looks[page] = lambda address=address: client.get(address)

    fill()
    few = {page: measure(look) for page, look in looks.items()}
    repeat(BackupRun, {"run", "artifact"}, "started_at")
    repeat(Artifact, {"run", "name"}, "taken_at")
    # What the survey of problems asks is its own affair, as long as it does not grow.
    surveyed, _ = measure(lambda: health.survey(conf.resolve()))
    own = {"backuprun": surveyed, "artifact": 0}
    many = {page: measure(look) for page, look in looks.items()}
    for page, asked in QUERIES.items():
        number = asked + own[page]
        assert looks[page]().context["cl"].result_count == MANY
        assert (few[page][0], many[page][0]) == (number, number), page
        print(f"{database} {page}: {few[page][1]:.3f} s, {many[page][1]:.3f} s")
        assert many[page][1] < 3 * few[page][1] + 0.1, page
