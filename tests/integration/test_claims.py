"""Claims on HQ's own kind of database, by several at the same moment."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import pytest
from django.core.management import call_command
from django.db import connections

from hq_backups import conf, detached, dispatch
from hq_backups.claims import Claim, claim
from hq_backups.engine.errors import Exit
from hq_backups.models import BackupRun, DueRun
from hq_backups.schedule import Slot
from tests import factories
from tests.integration.test_records import connect
from tests.testbed.postgres import PostgresServer

pytest.importorskip("psycopg2", reason="the tests' driver of PostgreSQL is not installed")

MANY = 6
NOW = datetime(2026, 11, 23, 0, 0, 5, 123456, tzinfo=UTC)
SLOT = Slot("postgres", "daily", datetime(2026, 11, 23, tzinfo=UTC))
T = TypeVar("T")


@pytest.fixture(params=[True, False], ids=["USE_TZ", "not USE_TZ"])
def history(
    request: pytest.FixtureRequest, pg15: PostgresServer, database: str, settings: Any, django_db_blocker: Any
) -> Iterator[None]:
    settings.USE_TZ, settings.TIME_ZONE = request.param, "America/New_York"
    connect(pg15, database, settings)
    with django_db_blocker.unblock():
        call_command("migrate", "hq_backups", database="pg", verbosity=0)
        yield
        connections["pg"].close()
    del connections["pg"]
    del connections.databases["pg"]


def at_once(do: Callable[[], T]) -> list[T]:
    """Return what several threads get who do something at the same moment, each on its own connection."""
    barrier = threading.Barrier(MANY)

    def one(_: int) -> T:
        connections["pg"].ensure_connection()
        barrier.wait()
        try:
            return do()
        finally:
            connections["pg"].close()

    with ThreadPoolExecutor(MANY) as pool:
        return list(pool.map(one, range(MANY)))


@pytest.mark.usefixtures("history")
def test_of_many_dispatchers_and_workers_one_claims_one_takes_and_one_tries_again() -> None:
    for round_ in range(8):
        slot = Slot("postgres", "daily", SLOT.due + timedelta(days=round_))
        now = NOW + timedelta(days=round_)
        (mine,) = filter(None, at_once(lambda slot=slot, now=now: claim(slot, "pg0", now)))
        # An older message finds nothing, and of many of this one, one is taken.
        assert not Claim(mine.pk, NOW - timedelta(days=1)).take("pg0")
        assert sorted(at_once(lambda mine=mine: mine.take("pg0"))) == [False] * (MANY - 1) + [True]
        mine.end(Exit.ERROR)
        DueRun.objects.filter(pk=mine.pk).update(started_at=now)
        later = now + timedelta(hours=1)
        (again,) = filter(None, at_once(lambda slot=slot, later=later: claim(slot, "pg0", later)))
        assert sorted(at_once(lambda again=again: again.take("pg0"))) == [False] * (MANY - 1) + [True]
        again.end(Exit.OK)
    assert set(DueRun.objects.values_list("attempts", "state")) == {(2, "done")}


@pytest.mark.usefixtures("history")
def test_what_is_due_is_dispatched_taken_reaped_and_tried_again(
    settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed: list[Claim] = []
    monkeypatch.setattr(detached, "start", lambda _, words: handed.append(Claim.parse(words[-1])))
    settings.HQ_BACKUPS = factories.scheduled_blobs(tmp_path)
    resolved, began = conf.resolve(), NOW
    assert dispatch.dispatch(resolved, NOW) == handed
    assert not any(dispatch.dispatch(resolved, NOW + timedelta(minutes=n)) for n in range(1, 60, 7))
    for attempt in range(3):
        assert handed[-1].take("here")
        DueRun.objects.update(started_at=began)
        run = {"verb": "backup", "store": "blobdb", "type": "weekly", "host": "here", "status": "running"}
        BackupRun.objects.create(run=f"run {attempt}", started_at=began, **run)
        handed[-1].name_run(f"run {attempt}")
        # Nothing tells of its process: it counts as dead after two days.
        began += timedelta(days=2, hours=1)
        dispatch.dispatch(resolved, began)
    assert BackupRun.objects.filter(status="failed").count() == 3
    (state, attempts) = DueRun.objects.values_list("state", "attempts").get(pk=handed[0].pk)
    assert (state, attempts) == ("failed", 3)
