"""What is wrong with a server, its surroundings or the bucket: each said as what it is, with the next command."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hq_backups.engine.errors import Exit
from hq_backups.engine.postgres import basebackup
from hq_backups.engine.requests import BackupRequest
from hq_backups.engine.stores.postgres_plain import PostgresPlain
from tests.integration.pg_helpers import Host, script
from tests.testbed.pgbouncer import PgBouncer
from tests.testbed.places import IS_ROOT
from tests.testbed.postgres import PostgresServer
from tests.testbed.process import as_user, free_port, give, short_directory
from tests.testbed.s3 import S3Service, refused_endpoint

pytestmark = pytest.mark.postgres15

REQUEST = BackupRequest("postgres", "daily")


@pytest.fixture(scope="module")
def home(services_dir: Path, pg_template: Callable[[int], Path]) -> Iterator[PostgresServer]:
    from tests.conftest import require_service

    reason = PostgresServer.unavailable(15)
    require_service("PostgreSQL 15", not reason, reason)
    scarce = {"max_wal_senders": "2", "max_replication_slots": "3"}
    with PostgresServer(15, services_dir / "faults", template=pg_template(15), extra_conf=scarce) as server:
        script(server, "CREATE TABLE t AS SELECT generate_series(1, 10) AS n; CREATE ROLE limited LOGIN;")
        yield server


@pytest.fixture
def host(home: PostgresServer) -> Iterator[Host]:
    host = Host(home)
    yield host
    shutil.rmtree(host.backups)


def assert_refused(host: Host, *words: str, code: Exit = Exit.PREFLIGHT, dry_run: bool = True) -> None:
    """Fail before anything is written, for the reason that is named; a dry run knows it too."""
    for dry in (True, False) if dry_run else (False,):
        done = host.backup(dry_run=dry)
        assert done.code is code, done
        for word in words:
            assert word in done.error, done.error
        assert not re.search(r"^\w+: .*>> $", done.error, re.MULTILINE), f"no hint: {done.error}"
        assert list(host.backups.iterdir()) == []


# The server


def test_a_server_that_is_down(host: Host, fresh_pg: Callable[..., PostgresServer]) -> None:
    down = Host(fresh_pg(15, start=False))
    assert_refused(down, "no PostgreSQL server answers at", f":{down.server.port}", "pg_lsclusters")


def test_a_wrong_port(host: Host) -> None:
    port = free_port()
    assert_refused(
        host.but(options={"port": port, "host": "127.0.0.1"}),
        f"no PostgreSQL server answers at 127.0.0.1:{port}", "postgresql_port",
    )  # fmt: skip


def test_a_wrong_host_name(host: Host) -> None:
    wrong = host.but(options={"host": "no-such-host.invalid"})
    assert_refused(wrong, "the host name in no-such-host.invalid", "unknown", "postgresql_host")


def test_the_poolers_address(host: Host, pgbouncer: Callable[[PostgresServer], PgBouncer]) -> None:
    pooler = pgbouncer(host.server)
    wrong = host.but(options={"host": pooler.host, "port": pooler.port})
    assert_refused(wrong, "is a pgbouncer, not the PostgreSQL server itself", "postgresql_port")


def test_no_superuser(host: Host) -> None:
    assert_refused(host.but(options={"user": "limited"}), "user limited is not a superuser")
    assert_refused(host.but(options={"user": "nobody"}), "does not let user nobody in", "pg_hba.conf")


@pytest.mark.slow
def test_a_wrong_password(fresh_pg: Callable[..., PostgresServer]) -> None:
    server = fresh_pg(15, auth="scram-sha-256")
    host = Host(server, options={"user": "postgres", "password": server.password})
    for password in ("wrong", None):
        wrong = host.but(options={"user": "postgres", "password": password})
        assert_refused(wrong, "does not let user postgres in", "postgres_users")
        assert server.password not in str(wrong.backup())
    done = host.good_backup()
    assert server.password not in str(done)
    # A password that libpq's file format would take apart.
    server.psql(r"ALTER ROLE postgres PASSWORD E'a:b\\c''d'")
    assert host.but(options={"user": "postgres", "password": r"a:b\c'd"}).backup(dry_run=True).code is Exit.OK


def test_no_replication_in_the_hba_file(host: Host) -> None:
    hba = host.server.hba_file
    before = hba.read_text()
    try:
        hba.write_text("local all all trust\n")
        host.server.psql("SELECT pg_reload_conf()")
        assert_refused(
            host, "does not allow user postgres a replication connection", "local replication postgres",
            dry_run=False,
        )  # fmt: skip
    finally:
        hba.write_text(before)
        host.server.psql("SELECT pg_reload_conf()")


@pytest.fixture
def senders(host: Host) -> Iterator[Callable[[int], None]]:
    """Return a function that occupies WAL senders."""
    psql = [
        host.server.client_bin_dir / "psql",
        "-X",
        "-At",
        "-d",
        f"{host.server.conninfo} replication=true",
    ]
    started: list[subprocess.Popen[bytes]] = []

    def occupy(count: int) -> None:
        for _ in range(count):
            each = subprocess.Popen(
                psql, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/", **as_user(host.server.os_user)
            )
            started.append(each)
            assert each.stdin is not None
            assert each.stdout is not None
            each.stdin.write(b"IDENTIFY_SYSTEM;\n")
            each.stdin.flush()
            assert each.stdout.readline()

    yield occupy
    for each in started:
        each.communicate()


@pytest.mark.parametrize("taken", [1, 2])
def test_no_wal_sender_is_free(taken: int, host: Host, senders: Callable[[int], None]) -> None:
    senders(taken)
    assert_refused(host, "has no free slot for a backup", "max_wal_senders", dry_run=False)


def test_no_replication_slot_is_free(host: Host) -> None:
    for n in range(3):
        host.server.psql(f"SELECT pg_create_physical_replication_slot('s{n}')")
    try:
        assert_refused(host, "has no free slot for a backup", "max_replication_slots", dry_run=False)
    finally:
        for n in range(3):
            host.server.psql(f"SELECT pg_drop_replication_slot('s{n}')")


@pytest.mark.root
def test_a_socket_directory_that_is_closed(host: Host, tmp_path: Path) -> None:
    (tmp_path / f".s.PGSQL.{host.server.port}").touch()
    assert_refused(host.but(options={"host": str(tmp_path)}), f"may not reach the socket at {tmp_path}")


def test_no_program_that_fits(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    from hq_backups.engine.postgres import tools

    monkeypatch.setattr(tools, "_PLACES", ())
    monkeypatch.setenv("PATH", "/nowhere")
    with short_directory() as empty:
        assert_refused(
            host.but(options={"bin_dir": str(empty)}), "no psql of any version", "postgresql_bin_dir"
        )


@pytest.mark.postgres18
def test_only_programs_older_than_the_server(pg18: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from hq_backups.engine.postgres import tools

    older = PostgresServer.unavailable(15)
    if older:
        pytest.skip(older)
    monkeypatch.setenv("PATH", "/nowhere")
    assert tools.Tools().find("psql")
    host = Host(pg18, options={"bin_dir": None})
    try:
        assert_refused(host, "no pg_basebackup of version 18 or newer", "(15)", "apt-get install")
    finally:
        shutil.rmtree(host.backups)


def test_a_database_that_cannot_be_looked_into_is_warned_of(host: Host) -> None:
    host.server.psql("CREATE DATABASE closed")
    host.server.psql("ALTER DATABASE closed CONNECTION LIMIT 0")
    try:
        # Not even a limit of none keeps a superuser out: only a damaged one does.
        assert "database-unread" not in host.backup(dry_run=True).warnings
    finally:
        host.server.drop_database("closed")


# The host


def test_a_data_directory_that_is_missing_stops_no_backup(host: Host) -> None:
    """The server is asked, not the directory: only its own files say where that is."""
    elsewhere = host.but(
        store={"data_dir": host.server.workdir / "nowhere"}, options={"host": str(host.server.socket_dir)}
    )
    assert elsewhere.backup(dry_run=True).code is Exit.OK


@pytest.mark.root
def test_a_backup_directory_of_somebody_else(host: Host) -> None:
    host.backups.chmod(0o755)
    shutil.chown(host.backups, "root")
    done = host.run_as_owner("backup", REQUEST)
    assert done.code is Exit.PREFLIGHT
    assert f"the backup directory {host.backups} cannot be written: Permission denied" in done.error
    assert str(host.backups) in done.of("error")[0]["hint"]
    missing = host.but(store={"backup_dir": Path("/proc/nowhere")}).run_as_owner("backup", REQUEST)
    assert missing.code is Exit.PREFLIGHT
    assert "/proc/nowhere cannot be written" in missing.error


def test_a_looser_directory_is_warned_of_and_left(host: Host) -> None:
    host.backups.chmod(0o755)
    assert "directory-mode" in host.backup(dry_run=True).warnings
    assert host.backups.stat().st_mode & 0o777 == 0o755


def test_a_dry_run_writes_nothing(host: Host, s3: S3Service, bucket: str) -> None:
    done = host.but(s3=s3, bucket=bucket).backup(dry_run=True)
    assert done.code is Exit.OK, done
    said = str(done)
    assert f"would write {host.backups}/postgres_" in said
    assert f"s3://{bucket}/postgres_" in said
    assert list(host.backups.iterdir()) == []
    assert "Contents" not in s3.client().list_objects_v2(Bucket=bucket)


def test_a_store_that_is_not_built_yet(host: Host) -> None:
    done = host.but(store={"mode": "incremental"}).backup()
    assert done.code is Exit.USAGE
    assert "postgres in mode incremental is not built yet" in done.error


# The bucket


def broken_buckets() -> dict[str, tuple[dict[str, Any], tuple[str, ...]]]:
    """Return what is wrong with the settings, and the words that must be said."""
    return {
        "no such bucket": ({"bucket": "hqb-no-such-bucket"}, ("hqb-no-such-bucket", "does not exist")),
        "wrong key": ({"s3_settings": {"secret_key": "wrong"}}, ("does not accept the S3 key",)),
        "unreachable": ({"s3_settings": {"endpoint": refused_endpoint()}}, ("cannot be reached",)),
        "no such host": (
            {"s3_settings": {"endpoint": "http://s3.invalid:9"}},
            ("s3.invalid", "cannot be reached"),
        ),
    }


@pytest.mark.parametrize("what", broken_buckets())
def test_a_bucket_that_fails_costs_no_local_backup(what: str, host: Host, s3: S3Service, bucket: str) -> None:
    settings, words = broken_buckets()[what]
    good = host.but(s3=s3, bucket=bucket)
    done = good.but(**settings).backup()
    assert done.code is Exit.UPLOAD_FAILED, done
    assert "the local backup is good, but its upload failed" in done.error
    assert "upload_backups postgres" in done.error
    for word in words:
        assert word in done.error, done.error
    (entry,) = host.catalog("local")
    assert entry["problem"] is None
    assert host.leftovers() == []
    # Listing goes on from the disk; asking the bucket alone tells the truth.
    both = good.but(**settings)
    assert [e["name"] for e in both.catalog("all")] == [entry["name"]]
    if what != "no such bucket":
        return
    assert both.restore(select={"source": "s3"}).code is not Exit.OK
    # Mended, the finished file is sent as it is.
    sent = good.upload()
    assert sent.code is Exit.OK, sent
    (there,) = good.catalog("s3")
    assert there["sha256"] == entry["sha256"]
    assert good.upload().code is Exit.OK
    assert len(good.catalog("s3")) == 1


def test_sending_what_is_missing_says_why_it_cannot(host: Host, s3: S3Service) -> None:
    host.good_backup()
    done = host.but(s3=s3, bucket="hqb-no-such-bucket").upload()
    assert done.code is not Exit.OK
    assert "does not exist" in done.error
    assert done.of("error")[0]["hint"]


@pytest.mark.parametrize(
    ("what", "source"), [*((what, None) for what in broken_buckets()), ("unreachable", "s3")]
)
def test_a_bucket_that_cannot_be_read_is_not_taken_for_an_empty_one(
    what: str, source: str | None, host: Host, s3: S3Service, bucket: str
) -> None:
    settings, words = broken_buckets()[what]
    done = host.but(s3=s3, bucket=bucket).but(**settings).restore(select={"source": source})
    assert done.code is Exit.ERROR, done
    assert "no backup" not in done.error
    for word in words:
        assert word in done.error, done.error
    assert done.of("error")[0]["hint"]
    empty = host.but(s3=s3, bucket=bucket).restore(select={"source": source})
    assert empty.code is Exit.BAD_BACKUP
    assert "no backup latest of postgres" in empty.error


def test_nothing_to_restore_says_so(host: Host) -> None:
    for selection in ("latest", "postgres_x_daily_2026_11_22.tar.gz"):
        done = host.restore(selection)
        assert done.code is Exit.BAD_BACKUP
        assert f"no backup {selection} of postgres" in done.error
        assert "list_backups postgres" in done.error


# Failures in the middle


def test_a_server_that_dies_in_the_middle_leaves_nothing(
    fresh_pg: Callable[..., PostgresServer],
    s3: S3Service,
    versioned_bucket: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = fresh_pg(15)
    host = Host(server, s3, versioned_bucket)
    host.good_backup()
    good = host.artifact.read_bytes()
    script(server, "CREATE TABLE big AS SELECT repeat(md5(n::text), 20) FROM generate_series(1, 40000) n;")
    stream = PostgresPlain.open_stream
    killed = []

    def kill(self: Any, *arguments: Any, **named: Any) -> Any:
        context = stream(self, *arguments, **named)

        class Dying:
            def __enter__(self) -> Any:
                inner = context.__enter__()
                readinto = inner.readinto

                def dying(buffer: memoryview) -> int:
                    count = int(readinto(buffer))
                    if not killed:
                        killed.append(True)
                        server.kill()
                    return count

                inner.readinto = dying
                return inner

            def __exit__(self, *error: Any) -> Any:
                return context.__exit__(*error)

        return Dying()

    monkeypatch.setattr(PostgresPlain, "open_stream", kill)
    done = host.backup()
    assert killed
    assert done.code is Exit.ERROR, done
    assert "pg_basebackup ended with status 1" in done.error
    assert "Look at the server's log" in done.error
    assert host.artifact.read_bytes() == good
    assert host.leftovers() == []
    assert len(host.catalog("s3")) == 1
    assert "Uploads" not in s3.client().list_multipart_uploads(Bucket=versioned_bucket)


@pytest.fixture
def busy(services_dir: Path) -> Iterator[PostgresServer]:
    """Run a server that keeps hardly any WAL."""
    scarce = {"max_wal_size": "2MB", "min_wal_size": "2MB", "wal_keep_size": "0", "checkpoint_timeout": "30s"}
    with PostgresServer(
        15, services_dir / "busy", initdb_args=("--wal-segsize=1",), extra_conf=scarce
    ) as server:
        script(server, "CREATE TABLE t (x text);")
        yield server


def write_much(monkeypatch: pytest.MonkeyPatch, server: PostgresServer) -> None:
    """Let a running backup wait, at its first bytes, for WAL that the server would rather recycle."""
    readinto = basebackup.Piped.readinto
    done = []

    def wait(self: Any, buffer: memoryview) -> int:
        if not done:
            done.append(True)
            for _ in range(4):
                script(
                    server, "INSERT INTO t SELECT repeat(md5(n::text), 9) FROM generate_series(1, 9000) n;"
                )
                script(server, "CHECKPOINT;")
        return readinto(self, buffer)

    monkeypatch.setattr(basebackup.Piped, "readinto", wait)


def test_the_wal_is_there_however_much_is_written(
    busy: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Host(busy)
    write_much(monkeypatch, busy)
    done = host.good_backup()
    assert busy.psql("SELECT count(*) FROM pg_replication_slots") == "0"
    checked = host.verify(deep=True)
    assert checked.code is Exit.OK, checked
    assert done.manifest["plain_size"] > 30 << 20


def test_wal_that_the_server_gave_up_fails_the_backup(
    busy: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(busy, "ALTER SYSTEM SET max_slot_wal_keep_size = '2MB'; SELECT pg_reload_conf();")
    host = Host(busy)
    write_much(monkeypatch, busy)
    done = host.backup()
    assert done.code is Exit.ERROR, done
    assert "has already been removed" in done.error
    assert "max_slot_wal_keep_size" in done.error
    assert list(host.backups.iterdir()) == []


def test_a_damaged_page_is_named(fresh_pg: Callable[..., PostgresServer]) -> None:
    server = fresh_pg(15)
    script(server, "CREATE TABLE bad AS SELECT generate_series(1, 5000) AS n; CHECKPOINT;")
    relation = server.data_dir / server.psql("SELECT pg_relation_filepath('bad')")
    server.stop()
    with relation.open("r+b") as file:
        file.seek(2 * 8192 + 1000)
        file.write(b"damage")
    server.start()
    host = Host(server)
    done = host.backup()
    assert done.code is Exit.ERROR, done
    assert "BadPages" in done.error
    assert str(relation.relative_to(server.data_dir)) in done.error
    assert "The last good backup is kept" in done.error
    assert list(host.backups.iterdir()) == []


@pytest.mark.root
@pytest.mark.faults
def test_a_full_disk_leaves_nothing(host: Host, small_disk: Callable[[str], Path]) -> None:
    assert IS_ROOT
    disk = small_disk("2m")
    give(disk, host.server.os_user)
    done = host.but(store={"backup_dir": disk}).backup()
    assert done.code in (Exit.ERROR, Exit.PREFLIGHT), done
    assert "space" in done.error or "free" in done.error
    assert list(disk.iterdir()) == []
