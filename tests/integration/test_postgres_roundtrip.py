"""PostgreSQL backed up under load, lost, and restored from a bucket, on every version."""

from __future__ import annotations

import gzip
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hq_backups.engine.errors import Exit
from tests.integration.pg_helpers import (
    BALANCE,
    ENV,
    ODD_DATABASES,
    Host,
    fill,
    fingerprint,
    make_pgbench,
    script,
    sha256,
    write_load,
)
from tests.testbed.places import bin_dirs
from tests.testbed.postgres import PostgresServer, write_settings
from tests.testbed.process import as_user, free_port, wait_until
from tests.testbed.s3 import S3Service

Fresh = Callable[..., PostgresServer]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out sync(2): it waits for whatever else this machine writes."""
    monkeypatch.setattr("os.sync", lambda: None)


def lose_everything(host: Host) -> None:
    """Kill the server, delete its data and the local backups."""
    host.server.kill()
    shutil.rmtree(host.data)
    shutil.rmtree(host.backups)


@pytest.mark.parametrize(
    ("version", "versioned"),
    [
        pytest.param(14, True, marks=pytest.mark.postgres14),
        pytest.param(15, False, marks=pytest.mark.postgres15),
        pytest.param(18, True, marks=pytest.mark.postgres18),
    ],
)
def test_a_lost_server_is_back_from_the_bucket(
    version: int, versioned: bool, fresh_pg: Fresh, s3: S3Service
) -> None:
    server = fresh_pg(version)
    fill(server)
    make_pgbench(server)
    before, who = fingerprint(server), Host(server).system_identifier
    bucket = s3.make_bucket(versioned=versioned)
    host = Host(server, s3, bucket)
    with write_load(server):
        wait_until(
            lambda: int(server.psql("SELECT count(*) FROM pgbench_history", "pgbench")) > 50, what="writes"
        )
        rows_before = int(server.psql("SELECT count(*) FROM pgbench_history", "pgbench"))
        done = host.good_backup("daily")
    rows_after = int(server.psql("SELECT count(*) FROM pgbench_history", "pgbench"))
    assert not done.of("error")
    assert host.leftovers() == []
    assert server.psql("SELECT count(*) FROM pg_replication_slots") == "0"
    if versioned:
        assert done.key == "postgres_daily_pg0.tar.gz"
        assert done.version_id
        assert "bucket-unversioned" not in done.warnings
    else:
        assert done.key == done.manifest["name"]
        assert done.manifest["name"].startswith(f"postgres_{ENV}_daily_20")
        assert "bucket-unversioned" in done.warnings
    assert set(ODD_DATABASES) <= set(done.manifest["source"]["contents"])
    assert done.manifest["source"]["contents"]["hq"]["large_objects"] == 2

    lose_everything(host)
    restored = host.restore()
    assert restored.code is Exit.OK, restored
    assert restored.of("plan")[0]["source"].startswith(f"s3://{bucket}/{done.key}")

    assert server.psql("SELECT pg_is_in_recovery(), current_setting('primary_conninfo')") == "f|"
    assert host.system_identifier == who
    after = fingerprint(server)
    assert after == before
    balances = script(server, BALANCE, "pgbench").split("|")
    assert len(set(balances[:4])) == 1, balances
    assert balances[4] == "100000"
    assert rows_before <= int(server.psql("SELECT count(*) FROM pgbench_history", "pgbench")) <= rows_after
    assert server.psql("SELECT count(*) FROM cache", "hq") == "0", "an unlogged table comes back empty"
    script(server, "INSERT INTO parts VALUES ('2026-02-02', 1); SELECT nextval('counter');", "hq")
    assert host.beside() == [".data.hq_backups-restore.json", "data"]
    if version == 15:  # and the host backs up again
        host.good_backup("daily")
    s3.remove_bucket(bucket)


@pytest.fixture(scope="module")
def made(services_dir: Path, pg_template: Callable[[int], Path], s3: S3Service) -> Iterator[Host]:
    """Return a host whose server was backed up once, to disk and bucket."""
    if reason := PostgresServer.unavailable(15):
        pytest.skip(reason)
    bucket = s3.make_bucket(versioned=True)
    with PostgresServer(15, services_dir / "strangers", template=pg_template(15)) as server:
        fill(server)
        host = Host(server, s3, bucket)
        host.good_backup("daily")
        yield host
    s3.remove_bucket(bucket)


def test_any_s3_client_reads_the_object(made: Host) -> None:
    assert made.s3 is not None
    (entry,) = made.catalog("s3")
    client = made.s3.client()
    body = client.get_object(Bucket=made.bucket, Key="postgres_daily_pg0.tar.gz")["Body"].read()
    assert sha256(body) == entry["sha256"]
    assert len(body) == entry["size"]
    assert body == made.artifact.read_bytes()
    with gzip.open(made.artifact) as plain:
        assert plain.read(20)


def test_a_strangers_tools_unpack_check_and_start_it(made: Host, short_tmp: Path) -> None:
    server = made.server
    subprocess.run(["gzip", "-t", made.artifact], check=True)
    with tarfile.open(made.artifact) as tar:
        assert not [n for n in tar.getnames() if n.startswith(("/", "./.."))]
    data = short_tmp / "by hand"
    data.mkdir(mode=0o700)
    shutil.chown(data, server.os_user)
    # As user postgres would do it: from a copy that it may read.
    archive = short_tmp / "copy.tar.gz"
    shutil.copy(made.artifact, archive)
    archive.chmod(0o644)
    user = as_user(server.os_user)
    subprocess.run(["tar", "-xzf", archive, "-C", data], check=True, cwd="/", **user)
    subprocess.run(
        [bin_dirs()[15] / "pg_verifybackup", data], check=True, capture_output=True, cwd="/", **user
    )
    port = free_port()
    write_settings(data / "postgresql.conf", {"port": str(port), "unix_socket_directories": str(short_tmp)})
    pg_ctl = [bin_dirs()[15] / "pg_ctl", "-D", data, "-w", "-l", short_tmp / "log"]
    subprocess.run([*pg_ctl, "start"], check=True, cwd="/", stdout=subprocess.DEVNULL, **user)
    try:
        said = server.psql("SELECT count(*) FROM parts", "hq", host=str(short_tmp), port=port)
        assert said == server.psql("SELECT count(*) FROM parts", "hq")
    finally:
        subprocess.run(
            [*pg_ctl, "stop", "-m", "immediate"], check=True, cwd="/", stdout=subprocess.DEVNULL, **user
        )
