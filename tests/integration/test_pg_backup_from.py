"""Backups taken from another host over the network, by users of few rights, and from standbys."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hq_backups.engine.errors import Exit
from hq_backups.engine.events import Event
from hq_backups.engine.requests import BackupRequest
from tests.conftest import require_service
from tests.integration import roundtrip
from tests.integration.pg_helpers import Host, Outcome, fill, remove, script
from tests.testbed.pgbouncer import PgBouncer
from tests.testbed.postgres import PostgresServer
from tests.testbed.process import LOOPBACK, as_user, give, short_directory, wait_until

Fresh = Callable[..., PostgresServer]

REPLICATION = {"replication_user": "hq repl", "replication_password": r"re:pl\i'ca"}
BACKUP = {"user": "hqbackup", "password": "back'up"}
SECRETS = (REPLICATION["replication_password"], BACKUP["password"])
VERSIONS = [
    pytest.param(14, marks=[pytest.mark.postgres14, pytest.mark.slow, pytest.mark.faults]),
    pytest.param(15, marks=pytest.mark.postgres15),
    pytest.param(18, marks=[pytest.mark.postgres18, pytest.mark.slow, pytest.mark.faults]),
]
HBA = f"""\
local all postgres trust
host replication "hq repl" {LOOPBACK}/32 scram-sha-256
host all,replication hqbackup {LOOPBACK}/32 scram-sha-256
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out sync(2): it waits for whatever else this machine writes."""
    monkeypatch.setattr("os.sync", lambda: None)


def make_users(server: PostgresServer) -> None:
    """Make a user who can only replicate, and a superuser, both with passwords."""
    script(
        server,
        r"""
        CREATE ROLE "hq repl" LOGIN REPLICATION PASSWORD E're:pl\\i''ca';
        CREATE ROLE hqbackup LOGIN SUPERUSER PASSWORD 'back''up';
        """,
    )
    server.hba_file.write_text(HBA)
    server.psql("SELECT pg_reload_conf()")


@pytest.fixture(scope="module")
def remote(services_dir: Path, pg_template: Callable[[int], Path]) -> Iterator[PostgresServer]:
    """Run the other host's server."""
    reason = PostgresServer.unavailable(15)
    require_service("PostgreSQL 15", not reason, reason)
    with PostgresServer(15, services_dir / "remote", template=pg_template(15)) as server:
        fill(server)
        make_users(server)
        yield server


@pytest.fixture
def host(remote: PostgresServer) -> Iterator[Host]:
    host = backup_host(remote)
    yield host
    shutil.rmtree(host.backups)


def backup_host(server: PostgresServer, **options: Any) -> Host:
    """Return a host that has no server of its own, and backs up the one at an address."""
    return Host(
        server, options={"backup_from": LOOPBACK, **options}, store={"data_dir": Path("/nowhere/main")}
    )


def with_(host: Host, **options: Any) -> Host:
    return host.but(options={**host.options, **options})


def assert_silent(done: Outcome) -> None:
    for secret in SECRETS:
        assert secret not in str(done)


@pytest.mark.postgres15
def test_a_user_who_can_only_replicate(host: Host) -> None:
    done = with_(host, **REPLICATION).good_backup()
    assert_silent(done)
    source = done.manifest["source"]
    server = host.server
    assert source["address"] == f"{LOOPBACK}:{server.port}"
    assert source["system_identifier"] == host.system_identifier
    assert source["version_num"] // 10000 == 15
    assert source["in_recovery"] is False
    assert source["data_checksums"] is True
    assert source["contents"] == {}
    assert "postgres_users.backup is not set" in source["unread"]["*"]
    assert "contents-unread" in done.warnings
    assert server.psql("SELECT count(*) FROM pg_replication_slots") == "0"
    assert host.verify().code is Exit.OK
    deep = host.verify(deep=True)
    assert deep.code is Exit.OK, deep
    # A second one is not taken for a server that lost what it held.
    again = with_(host, **REPLICATION).backup("manual")
    assert again.code is Exit.OK, again
    plan = host.but(store={**host.store, "data_dir": server.workdir / "new" / "main"}).restore(plan_only=True)
    assert plan.of("plan")[0]["facts"]["taken_from"] == source["address"]


@pytest.mark.postgres15
@pytest.mark.parametrize(
    "users",
    [
        pytest.param(BACKUP, id="backup", marks=[pytest.mark.slow, pytest.mark.faults]),
        pytest.param({**BACKUP, **REPLICATION}, id="both"),
    ],
)
def test_a_superuser_tells_what_the_server_holds(users: dict[str, str], host: Host) -> None:
    done = with_(host, **users).good_backup()
    assert_silent(done)
    source = done.manifest["source"]
    assert source["address"] == f"{LOOPBACK}:{host.server.port}"
    assert source["contents"]["hq"]["large_objects"] == 2
    assert source["unread"] == {}
    assert "contents-unread" not in done.warnings
    assert host.verify(deep=True).code is Exit.OK


@pytest.mark.postgres15
def test_a_dump_takes_a_user_who_may_log_in(host: Host) -> None:
    dump = host.but(store={**host.store, "mode": "dump"})
    refused = with_(dump, **REPLICATION).backup()
    assert refused.code is Exit.PREFLIGHT, refused
    assert "postgres_users.backup" in refused.of("error")[0]["hint"]
    assert list(host.backups.iterdir()) == []
    done = with_(dump, **BACKUP, **REPLICATION).good_backup()
    assert_silent(done)
    assert done.manifest["source"]["address"] == f"{LOOPBACK}:{host.server.port}"
    assert done.manifest["source"]["rows"]["hq"]
    assert dump.verify().code is Exit.OK


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("version", VERSIONS)
def test_a_lost_server_is_back_from_the_other_hosts_backup(version: int, fresh_pg: Fresh) -> None:
    server = fresh_pg(version)
    fill(server)
    make_users(server)
    before = roundtrip.snapshot(server)
    host = with_(backup_host(server), **REPLICATION)
    host.good_backup()
    server.kill()
    shutil.rmtree(server.data_dir)
    # The backup host's directory, mounted or carried to the machine that was built anew.
    restored = Host(server).restore()
    assert restored.code is Exit.OK, restored
    roundtrip.assert_same(before, roundtrip.snapshot(server))


# What can be wrong


def assert_refused(host: Host, *words: str) -> None:
    done = host.backup()
    assert done.code is Exit.PREFLIGHT, done
    for word in words:
        assert word in done.error, done.error
    assert list(host.backups.iterdir()) == []
    assert_silent(done)


@pytest.mark.postgres15
@pytest.mark.parametrize("password", ["wrong", None])
def test_a_wrong_password(password: str | None, host: Host) -> None:
    wrong = with_(host, **{**REPLICATION, "replication_password": password})
    assert_refused(wrong, "does not let user hq repl in", "postgres_users")


@pytest.mark.postgres15
def test_a_backup_user_who_is_no_superuser(host: Host) -> None:
    """The rights for the copy are there, those for looking are not: the copy is made, and that is said."""
    server = host.server
    server.psql("ALTER ROLE hqbackup NOSUPERUSER REPLICATION")
    try:
        done = with_(host, **BACKUP).good_backup()
        assert "contents-unread" in done.warnings
        assert "user hqbackup is not a superuser" in str(done.of("warning"))
        server.psql("ALTER ROLE hqbackup NOREPLICATION")
        remove(host.backups)
        host.backups.mkdir(mode=0o700)
        give(host.backups, server.os_user)
        assert_refused(with_(host, **BACKUP), "does not allow user hqbackup a replication connection")
    finally:
        server.psql("ALTER ROLE hqbackup SUPERUSER")


@pytest.mark.postgres15
def test_a_server_that_does_not_know_this_host(host: Host) -> None:
    server = host.server
    try:
        server.hba_file.write_text("local all postgres trust\n")
        server.psql("SELECT pg_reload_conf()")
        assert_refused(with_(host, **BACKUP), "user hqbackup", "pg_hba.conf")
        assert_refused(with_(host, **REPLICATION), "host replication hq repl <this host's address>/32")
    finally:
        server.hba_file.write_text(HBA)
        server.psql("SELECT pg_reload_conf()")


@pytest.mark.postgres15
def test_nobody_is_named(host: Host) -> None:
    assert_refused(host, f"the server at {LOOPBACK}", "user postgres", "pg_hba.conf")


@pytest.mark.postgres15
def test_the_poolers_address(host: Host, pgbouncer: Callable[[PostgresServer], PgBouncer]) -> None:
    server = host.server
    try:
        server.hba_file.write_text(f"{HBA}host all postgres {LOOPBACK}/32 trust\n")
        server.psql("SELECT pg_reload_conf()")
        pooler = pgbouncer(server)
        for users in (REPLICATION, BACKUP):
            wrong = with_(host, **users, port=pooler.port)
            assert_refused(wrong, "is a pgbouncer, not the PostgreSQL server itself")
    finally:
        server.hba_file.write_text(HBA)
        server.psql("SELECT pg_reload_conf()")


@pytest.mark.postgres15
@pytest.mark.root
def test_tablespaces_that_nobody_told_of(host: Host) -> None:
    with short_directory(host.server.os_user) as place:
        host.server.psql(f"CREATE TABLESPACE fast LOCATION '{place}'")
        try:
            done = with_(host, **REPLICATION).backup()
            assert done.code is not Exit.OK
            assert "has tablespaces, and user hq repl may not ask it which" in done.error
            assert "postgres_users.backup" in done.error
            assert list(host.backups.iterdir()) == []
        finally:
            host.server.psql("DROP TABLESPACE fast")


# Standbys


def make_standby(primary: PostgresServer, workdir: Path, **settings: str) -> PostgresServer:
    """Start a standby that follows ``primary``."""
    standby = PostgresServer(primary.version, workdir, extra_conf=settings)
    program = primary.client_bin_dir / "pg_basebackup"
    subprocess.run(
        [program, "-D", standby.data_dir, "-R", "-X", "stream", "-c", "fast", "-d",
         f"host='{primary.socket_dir}' port={primary.port} user=postgres"],
        check=True, capture_output=True, cwd="/", env={"PATH": os.defpath}, **as_user(primary.os_user),
    )  # fmt: skip
    standby.configure()
    standby.start()
    catch_up(primary, standby)
    return standby


def catch_up(primary: PostgresServer, standby: PostgresServer) -> None:
    there = primary.psql("SELECT pg_current_wal_lsn()")
    wait_until(
        lambda: standby.psql(f"SELECT pg_last_wal_replay_lsn() >= '{there}'") == "t", what="the standby"
    )


@pytest.fixture
def standby(
    fresh_pg: Fresh, short_tmp: Path
) -> Iterator[Callable[..., tuple[PostgresServer, PostgresServer]]]:
    """Return a function that runs a primary and its standby."""
    made: list[PostgresServer] = []

    def make(version: int, **settings: str) -> tuple[PostgresServer, PostgresServer]:
        primary = fresh_pg(version)
        fill(primary)
        made.append(make_standby(primary, short_tmp / "standby", **settings))
        return primary, made[-1]

    yield make
    for each in made:
        each.remove()


@pytest.mark.parametrize("version", VERSIONS)
def test_a_standby_is_backed_up_and_comes_back_as_a_primary(
    version: int, standby: Callable[..., tuple[PostgresServer, PostgresServer]]
) -> None:
    primary, follower = standby(version)
    before = roundtrip.snapshot(primary)
    host = Host(follower)
    done = host.good_backup()
    source = done.manifest["source"]
    assert source["in_recovery"] is True
    assert source["backup_from"] == "standby"
    assert follower.psql("SELECT count(*) FROM pg_replication_slots") == "0"
    assert host.verify(deep=True).code is Exit.OK
    follower.stop()
    restored = host.restore()
    assert restored.code is Exit.OK, restored
    assert follower.psql("SELECT pg_is_in_recovery(), current_setting('primary_conninfo')") == "f|"
    assert primary.psql("SELECT count(*) FROM pg_stat_replication") == "0"
    roundtrip.assert_same(before, roundtrip.snapshot(follower))


@pytest.mark.parametrize(
    "version",
    [
        pytest.param(14, marks=[pytest.mark.postgres14, pytest.mark.slow, pytest.mark.faults]),
        pytest.param(15, marks=[pytest.mark.postgres15, pytest.mark.slow, pytest.mark.faults]),
        pytest.param(18, marks=[pytest.mark.postgres18, pytest.mark.slow, pytest.mark.faults]),
    ],
)
def test_a_standby_is_dumped(
    version: int, standby: Callable[..., tuple[PostgresServer, PostgresServer]]
) -> None:
    primary, follower = standby(version)
    skip = (*roundtrip.BUSY, "no_connections")
    before = roundtrip.snapshot(primary, skip)
    host = Host(follower, store={"mode": "dump"})
    done = host.good_backup()
    assert done.manifest["source"]["in_recovery"] is True
    follower.stop()
    restored = host.restore()
    assert restored.code is Exit.OK, restored
    assert follower.psql("SELECT pg_is_in_recovery()") == "f"
    roundtrip.assert_same(before, roundtrip.snapshot(follower, skip))


@pytest.mark.postgres15
def test_a_standby_that_is_promoted_under_the_backup(
    standby: Callable[..., tuple[PostgresServer, PostgresServer]],
) -> None:
    primary, follower = standby(15)
    # More than pipes and sockets hold, so that the server is still sending when the backup is watched.
    script(
        primary, "CREATE TABLE big AS SELECT repeat(md5(n::text), 30) AS x FROM generate_series(1, 40000) n;"
    )
    catch_up(primary, follower)
    host = Host(follower)
    promoted = []

    def watch(event: Event) -> None:
        if event.kind == "progress" and event.data.get("phase") == "backup" and not promoted:
            promoted.append(follower.psql("SELECT pg_promote()"))

    done = host.run("backup", BackupRequest("postgres", "daily", upload=False), watch=watch)
    assert promoted == ["t"]
    assert done.code is Exit.ERROR, done
    assert "promoted" in done.error
    assert "it is the primary now" in done.error
    assert host.leftovers() == []
    assert host.good_backup().manifest["source"]["in_recovery"] is False
