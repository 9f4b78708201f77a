"""Servers that are not well: each is told in words, with the next command, or backed up all the same."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hq_backups.engine.errors import Exit
from hq_backups.engine.events import Event
from hq_backups.engine.requests import BackupRequest
from tests.integration.pg_helpers import Host, Outcome, script
from tests.testbed.places import client_bin_dir
from tests.testbed.postgres import PostgresServer, write_settings
from tests.testbed.process import as_user, give, wait_until

pytestmark = pytest.mark.postgres15

Fresh = Callable[..., PostgresServer]
PAGE = 8192
# More than pipes and sockets hold, so that the server is still sending while the backup is watched.
BIG = "CREATE TABLE big AS SELECT repeat(md5(n::text), 30) AS x FROM generate_series(1, 40000) n;"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out sync(2): it waits for whatever else this machine writes."""
    monkeypatch.setattr("os.sync", lambda: None)


def assert_failed(host: Host, *words: str, code: Exit = Exit.PREFLIGHT) -> Outcome:
    """Leave nothing behind, and say these words."""
    done = host.backup()
    assert done.code is code, done
    for word in words:
        assert word in done.error, done.error
    assert not re.search(r">> $", done.error, re.MULTILINE), f"no hint: {done.error}"
    assert list(host.backups.iterdir()) == []
    return done


def backup_while(host: Host, act: Callable[[], object]) -> Outcome:
    """Back up, and do something once bytes flow."""
    acted: list[object] = []

    def watch(event: Event) -> None:
        if event.kind == "progress" and event.data.get("phase") == "backup" and not acted:
            acted.append(True)
            act()

    done = host.run("backup", BackupRequest("postgres", "daily", upload=False), watch=watch)
    assert acted
    return done


# A damaged page


@pytest.fixture(scope="module")
def damaged(services_dir: Path, pg_template: Callable[[int], Path]) -> Iterator[PostgresServer]:
    """Run a server with one damaged page in one of its tables."""
    from tests.conftest import require_service

    reason = PostgresServer.unavailable(15)
    require_service("PostgreSQL 15", not reason, reason)
    with PostgresServer(15, services_dir / "damaged", template=pg_template(15)) as server:
        for name in ("hurt", "whole"):
            script(server, f"CREATE TABLE {name} AS SELECT generate_series(1, 2000) AS n; ANALYZE {name};")
        path = server.data_dir / server.psql("SELECT pg_relation_filepath('hurt')")
        server.stop()
        with path.open("r+b") as file:
            file.seek(3 * PAGE + 5000)
            file.write(b"\xff" * 64)
        server.start()
        yield server


@pytest.fixture
def damaged_host(damaged: PostgresServer) -> Iterator[Host]:
    host = Host(damaged)
    yield host
    shutil.rmtree(host.backups)


def test_a_damaged_page_is_named(damaged_host: Host) -> None:
    path = damaged_host.server.psql("SELECT pg_relation_filepath('hurt')")
    done = assert_failed(
        damaged_host, "damaged pages", path, "block 3", "--accept-bad-pages", code=Exit.ERROR
    )
    assert done.of("error")[0]["code"] == "BadPages"


def test_a_damaged_server_is_backed_up_when_that_is_accepted(damaged_host: Host) -> None:
    host = damaged_host
    done = host.good_backup(accept_bad_pages=True)
    assert done.manifest["source"]["bad_pages"] is True
    assert "bad-pages" in done.warnings
    assert any("checksum" in text for text in done.manifest["warnings"])
    (entry,) = host.catalog()
    assert entry["problem"] is None
    assert host.verify().code is Exit.OK
    # Every file is as the server sent it, so only a server finds the damage.
    deep = host.verify(deep=True)
    assert deep.code is Exit.BAD_BACKUP, deep
    assert "pg_verifybackup" in {c["name"] for c in deep.of("check")}
    for words in ("database 'postgres'", "public.hurt", "invalid page", "--accept-bad-pages", "older backup"):
        assert words in deep.error, deep.error
    assert "public.whole" not in deep.error
    target = host.server.workdir / "restored"
    beside = host.restore(target_dir=target)
    assert beside.code is Exit.OK, beside
    assert (target / "PG_VERSION").read_text() == "15\n"
    shutil.rmtree(target)


@pytest.mark.slow
@pytest.mark.faults
def test_a_damaged_server_is_restored_in_place(fresh_pg: Fresh) -> None:
    server = fresh_pg(15)
    script(
        server, "CREATE TABLE whole AS SELECT 7 AS n; CREATE TABLE hurt AS SELECT generate_series(1, 2000) n;"
    )
    path = server.data_dir / server.psql("SELECT pg_relation_filepath('hurt')")
    server.stop()
    with path.open("r+b") as file:
        file.seek(PAGE + 5000)
        file.write(b"\xff" * 64)
    server.start()
    host = Host(server)
    host.good_backup(accept_bad_pages=True)
    server.stop()
    restored = host.restore()
    assert restored.code is Exit.OK, restored
    assert server.psql("SELECT n FROM whole") == "7"


# Settings of the server


def test_a_superuser_of_another_name(fresh_pg: Fresh) -> None:
    server = fresh_pg(15)
    script(server, "CREATE ROLE helper LOGIN SUPERUSER;")
    subprocess.run(
        [client_bin_dir(15) / "psql", "-q", "-d", server.conninfo.replace("user=postgres", "user=helper"), "-c",
         'ALTER ROLE postgres RENAME TO "the boss"'],
        check=True, cwd="/", **as_user(server.os_user),
    )  # fmt: skip
    try:
        done = Host(server, options={"user": "helper"}).good_backup()
        assert done.manifest["source"]["bootstrap_role"] == "the boss"
        deep = Host(server).verify(deep=True)
        assert deep.code is Exit.OK, deep
    finally:
        server.stop()


@pytest.mark.parametrize(
    "command",
    [
        pytest.param("false", id="fails", marks=[pytest.mark.slow, pytest.mark.faults]),
        pytest.param("exec sleep 120", id="hangs"),
    ],
)
def test_an_archive_that_is_not_served_stops_no_backup(command: str, fresh_pg: Fresh) -> None:
    server = fresh_pg(15, extra_conf={"archive_mode": "on", "archive_command": command})
    script(server, "CREATE TABLE t AS SELECT 1 AS n; SELECT pg_switch_wal();")
    host = Host(server)
    done = host.good_backup()
    assert done.manifest["source"]["archive_mode"] == "on"
    for child in Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split():
        # The archiver waits for its command, and with it the server's end.
        with contextlib.suppress(OSError):
            for grandchild in Path(f"/proc/{child}/task/{child}/children").read_text().split():
                os.kill(int(grandchild), signal.SIGKILL)
    server.stop("immediate")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"wal_level": "minimal", "max_wal_senders": "0"}, ("wal_level is minimal", "wal_level = replica")),
        ({"max_wal_senders": "1"}, ("allows 1 replication connections", "max_wal_senders = 10")),
        ({"max_replication_slots": "0"}, ("has no free slot", "max_replication_slots")),
    ],
    ids=["wal_level", "max_wal_senders", "max_replication_slots"],
)
def test_a_server_that_gives_no_base_backup(
    settings: dict[str, str], words: tuple[str, ...], fresh_pg: Fresh
) -> None:
    assert_failed(Host(fresh_pg(15, extra_conf=settings)), *words)


def test_no_connection_is_free(fresh_pg: Fresh) -> None:
    limits = {"max_connections": "4", "superuser_reserved_connections": "1", "max_wal_senders": "3"}
    server = fresh_pg(15, extra_conf=limits)
    argv = [client_bin_dir(15) / "psql", "-X", "-At", "-d", server.conninfo]
    started = []
    try:
        for _ in range(4):
            each = subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/", **as_user(server.os_user)
            )
            started.append(each)
            assert each.stdin is not None
            assert each.stdout is not None
            each.stdin.write(b"SELECT 1;\n")
            each.stdin.flush()
            assert each.stdout.readline()
        assert_failed(Host(server), "takes no more connections", "too many clients", "max_connections")
    finally:
        for each in started:
            each.communicate()
    Host(server).good_backup()


@pytest.mark.parametrize("version", [
    pytest.param(15),
    pytest.param(18, marks=[pytest.mark.postgres18, pytest.mark.slow, pytest.mark.faults]),
])  # fmt: skip
def test_limits_of_the_role_and_the_database_cut_nothing_short(version: int, fresh_pg: Fresh) -> None:
    server = fresh_pg(version)
    script(server, "CREATE DATABASE tight;")
    script(server, BIG + "ANALYZE;", "tight")
    limits = ["statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"]
    newer = ["idle_session_timeout", *(["transaction_timeout"] if version >= 17 else [])]
    settings = [
        "default_transaction_read_only = on",
        *(f"{name} = '1ms'" for name in limits),
        # Who a server is must be asked before it is known which limits it has.
        *(f"{name} = '1s'" for name in newer),
    ]
    lines = [f"ALTER ROLE postgres SET {each};" for each in settings]
    lines += [f"ALTER DATABASE tight SET {each};" for each in settings]
    lines += [f"ALTER ROLE postgres IN DATABASE tight SET {name} = '1ms';" for name in newer]
    # As one transaction: the first of them would cut the next one short.
    script(server, "\n".join(["BEGIN;", *lines, "COMMIT;"]))
    host = Host(server)
    done = backup_while(host, lambda: time.sleep(2))
    assert done.code is Exit.OK, done
    assert "database-unread" not in done.warnings
    assert done.manifest["source"]["contents"]["tight"]["tables"] == {"public.big": 40000}
    deep = host.verify(deep=True)
    assert deep.code is Exit.OK, deep


# Write-ahead log


TIGHT = {"max_wal_size": "2MB", "min_wal_size": "2MB", "wal_keep_size": "0", "checkpoint_timeout": "1h"}
SMALL_SEGMENTS = ("--wal-segsize=1",)
WAL = "CREATE TABLE w{0} AS SELECT repeat('x', 900) AS x FROM generate_series(1, 20000); CHECKPOINT;"


def test_a_slot_that_fills_the_disk_is_named(fresh_pg: Fresh) -> None:
    server = fresh_pg(15, initdb_args=SMALL_SEGMENTS, extra_conf=TIGHT)
    script(
        server,
        "SELECT pg_create_physical_replication_slot('left behind'::name, true);".replace(
            " behind", "_behind"
        ),
    )
    done = Host(server).good_backup()
    assert "slot-holds-wal" not in done.warnings
    script(server, WAL.format(1))
    done = Host(server).good_backup("manual")
    (warning,) = [w for w in done.of("warning") if w["code"] == "slot-holds-wal"]
    assert "'left_behind'" in warning["message"]
    assert re.search(r"keeps \d+(\.\d)? MiB of WAL", warning["message"]), warning
    assert "nobody reads it" in warning["message"]
    assert "pg_drop_replication_slot" in warning["message"]


def test_a_server_that_lets_go_of_the_wal_that_we_hold(fresh_pg: Fresh) -> None:
    tight = {**TIGHT, "max_slot_wal_keep_size": "1MB"}
    server = fresh_pg(15, initdb_args=SMALL_SEGMENTS, extra_conf=tight)
    script(server, BIG)
    host = Host(server)
    done = backup_while(host, lambda: [script(server, WAL.format(n)) for n in range(2)])
    assert done.code is Exit.ERROR, done
    assert "max_slot_wal_keep_size" in done.error, done.error
    assert host.leftovers() == []
    script(server, "ALTER SYSTEM RESET max_slot_wal_keep_size; SELECT pg_reload_conf();")


# A server in trouble


def test_a_server_that_is_still_recovering(fresh_pg: Fresh) -> None:
    server = fresh_pg(15)
    script(server, BIG)
    server.stop()
    # It waits for a primary's log, and lets nobody in meanwhile.
    (server.data_dir / "standby.signal").touch()
    write_settings(server.data_dir / "postgresql.conf", {"hot_standby": "off", "restore_command": "false"})
    pg_ctl = [server.bin_dir / "pg_ctl", "-s", "-W", "-D", server.data_dir, "-l", server.log, "start"]
    subprocess.run(
        pg_ctl, check=True, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **as_user(server.os_user)
    )  # fmt: skip
    wait_until(lambda: server.running and "not accepting" in ask(server), what="the server to say so")
    assert_failed(Host(server), "is up, but lets nobody in yet", "hot_standby")


def ask(server: PostgresServer) -> str:
    done = subprocess.run(
        [client_bin_dir(15) / "psql", "-X", "-d", f"{server.conninfo}", "-c", "SELECT 1"],
        capture_output=True, cwd="/", check=False, **as_user(server.os_user),
    )  # fmt: skip
    return done.stderr.decode()


@pytest.mark.root
def test_a_server_whose_disk_is_full(small_disk: Callable[[str], Path], fresh_pg: Fresh) -> None:
    # The server is stopped before its disk is taken away: fixtures end in the opposite order.
    disk = small_disk("160m")
    server = fresh_pg(15, start=False)
    give(disk, server.os_user)
    subprocess.run(["mv", server.data_dir, disk / "data"], check=True)
    server.data_dir.symlink_to(disk / "data")
    server.start()
    script(server, "CREATE TABLE t AS SELECT generate_series(1, 1000) AS n;")
    filler = disk / "filler"
    with filler.open("wb") as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 20))
    with filler.open("ab") as file, contextlib.suppress(OSError):
        while True:
            os.write(file.fileno(), bytes(512))
    host = Host(server)
    done = host.backup()
    assert done.code is not Exit.OK, done
    assert "cannot write to its own disk" in done.error
    assert "df -h" in done.error
    filler.unlink()
    assert host.leftovers() == []
    host.good_backup("manual")
