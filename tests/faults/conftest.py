"""Victims for the attacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import require_service
from tests.faults.victim import PostgresVictim, Victim
from tests.testbed.places import server_user
from tests.testbed.postgres import PostgresServer
from tests.testbed.process import short_directory
from tests.testbed.s3 import S3Service


@pytest.fixture(scope="session")
def server(pg_template: Callable[[int], Path]) -> Iterator[PostgresServer]:
    """Run a server of these tests' own: 4 MB of data make an artifact of about 45 MB, three parts."""
    reason = PostgresServer.unavailable(15)
    require_service("PostgreSQL 15", not reason, reason)
    with short_directory(server_user()) as workdir:
        made = PostgresServer(15, workdir, template=pg_template(15))
        with made:
            PostgresVictim(workdir, made).make_data(4)
            yield made


@pytest.fixture
def victim(server: PostgresServer) -> Iterator[Victim]:
    """Return a server that is backed up and not touched otherwise."""
    with short_directory(server_user()) as home:
        yield PostgresVictim(home, server)


@pytest.fixture
def own_victim(fresh_pg: Callable[..., PostgresServer]) -> Callable[..., Victim]:
    """Return a factory of victims that may be stopped, changed and restored."""

    def make(**settings: Any) -> Victim:
        made = fresh_pg(15)
        found = PostgresVictim(made.workdir, made, **settings)
        found.make_data(2)
        return found

    return make


@pytest.fixture
def in_bucket(victim: Victim, s3: S3Service, versioned_bucket: str) -> Victim:
    """Give the victim a bucket that keeps versions."""
    victim.use_bucket(s3, versioned_bucket)
    return victim
