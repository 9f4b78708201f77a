"""Victims for the attacks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import require_service
from tests.faults.tablespaces import TablespacesVictim
from tests.faults.victim import VICTIMS, HostVictim, Victim
from tests.faults.victim_blobdb import BlobVictim
from tests.faults.victim_couch import CouchVictim
from tests.testbed.places import server_user
from tests.testbed.postgres import PostgresServer
from tests.testbed.process import short_directory
from tests.testbed.s3 import S3Service

VICTIMS["tablespaces"] = TablespacesVictim
VICTIMS["blobdb"] = BlobVictim
VICTIMS["couch"] = CouchVictim


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run the attacks of a module that says so (MODES) on each mode, some (ONLY) on a few of them.

    Of all modes but plain, blobdb and couch, only those of IN_SHORT are quick; those of LONG are not.
    """
    modes = getattr(metafunc.module, "MODES", None)
    if modes is None or "mode" not in metafunc.fixturenames:
        return
    name = metafunc.function.__name__
    modes = getattr(metafunc.module, "ONLY", {}).get(name, modes)
    quick = ("plain", "blobdb", "couch", *(modes if name in getattr(metafunc.module, "IN_SHORT", ()) else ()))
    long = getattr(metafunc.module, "LONG", ())
    marked = [pytest.param(m, marks=() if m in quick and m not in long else pytest.mark.slow) for m in modes]
    metafunc.parametrize("mode", marked, scope="module")


@pytest.fixture(scope="module")
def mode() -> str:
    """Return the mode of the victims, where the module attacks one only."""
    return "plain"


@pytest.fixture(scope="session")
def servers(pg_template: Callable[[int], Path]) -> Iterator[Callable[[str], Any]]:
    """Return a function that runs a server of these tests' own for each mode."""
    reason = PostgresServer.unavailable(15)
    require_service("PostgreSQL 15", not reason, reason)
    made: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:

        def serve(mode: str) -> Any:
            if mode not in made:
                workdir = stack.enter_context(short_directory(server_user()))
                server = stack.enter_context(VICTIMS[mode].serve(workdir, pg_template))
                VICTIMS[mode](workdir, server).make_data(VICTIMS[mode].megabytes)
                made[mode] = server
            return made[mode]

        yield serve


@pytest.fixture(scope="module")
def server(servers: Callable[[str], Any], mode: str) -> Any:
    """Run a server with data that make an artifact of about 45 MB, three parts."""
    return servers(mode)


@pytest.fixture
def victim(server: Any, mode: str) -> Iterator[Victim]:
    """Return a server that is backed up and not touched otherwise."""
    with short_directory(server_user()) as home:
        yield VICTIMS[mode](home, server)


@pytest.fixture
def own_victim(pg_template: Callable[[int], Path], mode: str) -> Iterator[Callable[..., HostVictim]]:
    """Return a factory of victims that may be stopped, changed and restored."""
    with contextlib.ExitStack() as stack:

        def make(**settings: Any) -> HostVictim:
            workdir = stack.enter_context(short_directory(server_user()))
            made = stack.enter_context(VICTIMS[mode].serve(workdir, pg_template))
            found = VICTIMS[mode](made.workdir, made, **settings)
            found.make_data(2)
            return found

        yield make


@pytest.fixture
def in_bucket(victim: Victim, s3: S3Service, versioned_bucket: str) -> Victim:
    """Give the victim a bucket that keeps versions."""
    victim.use_bucket(s3, versioned_bucket)
    return victim
