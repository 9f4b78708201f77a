"""Each service of the testbed starts and answers."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError

from tests.conftest import require_service
from tests.testbed import disk
from tests.testbed.disk import is_slow, own_disk, start
from tests.testbed.places import IS_ROOT, bin_dirs, python_reachable
from tests.testbed.process import SHORT_PLACE, as_user
from tests.testbed.s3 import MotoServer, S3Service, VersityGW
from tests.testbed.system import tmpfs, tmpfs_unavailable

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.testbed.debian import DebianCluster
    from tests.testbed.pgbouncer import PgBouncer
    from tests.testbed.postgres import PostgresServer
    from tests.testbed.system import SudoRules
    from tests.testbed.toxiproxy import Toxiproxy

WITH_CHECKSUMS = "SHOW data_checksums"
SYSTEM_ID = "SELECT system_identifier FROM pg_control_system()"


def test_each_postgres_version_answers_on_its_socket_and_on_loopback(pg: PostgresServer) -> None:
    """Ask both ways."""
    assert int(pg.psql("SHOW server_version_num")) // 10000 == pg.version
    assert pg.psql("SELECT 1", host="127.0.0.1") == "1"
    assert pg.psql(WITH_CHECKSUMS) == "on"
    assert pg.psql("SHOW listen_addresses") == "127.0.0.1"


def test_a_base_backup_can_be_taken_over_the_replication_protocol(pg: PostgresServer) -> None:
    """Run pg_basebackup of a version that is not older than the server."""
    program = pg.client_bin_dir / "pg_basebackup"
    done = subprocess.run(
        [program, "-h", pg.socket_dir, "-p", str(pg.port), "-U", "postgres", "-D", "-", "-Ft", "-X", "fetch",
         "-c", "fast", "-w"],
        stdout=subprocess.PIPE, check=True, **as_user(pg.os_user),
    )  # fmt: skip
    assert b"backup_manifest" in done.stdout


def test_a_killed_server_starts_again_with_its_data(fresh_pg: Callable[..., PostgresServer]) -> None:
    """Kill the postmaster and look for a committed row."""
    server = fresh_pg(15)
    server.psql("CREATE TABLE t AS SELECT 7 AS n")
    server.kill()
    assert not server.running
    server.start()
    assert server.psql("SELECT n FROM t") == "7"
    server.stop()
    assert server.pid is None


def test_fresh_clusters_are_other_systems_when_asked(fresh_pg: Callable[..., PostgresServer]) -> None:
    """Compare two copies of the template with one initialised anew."""
    first, copy, other = fresh_pg(18), fresh_pg(18), fresh_pg(18, new_system=True)
    assert first.psql(SYSTEM_ID) == copy.psql(SYSTEM_ID)
    assert first.psql(SYSTEM_ID) != other.psql(SYSTEM_ID)


def test_a_server_may_demand_passwords(fresh_pg: Callable[..., PostgresServer]) -> None:
    """Connect with the password and without."""
    server = fresh_pg(15, auth="scram-sha-256", extra_conf={"work_mem": "5MB"})
    assert server.psql("SHOW work_mem") == "5MB"
    server.password = "wrong"
    with pytest.raises(RuntimeError, match="password authentication failed"):
        server.psql("SELECT 1")


def test_servers_do_not_run_as_root(fresh_pg: Callable[..., PostgresServer]) -> None:
    """Look at the postmaster's and its files' owner."""
    server = fresh_pg(14)
    owner = os.stat(f"/proc/{server.pid}").st_uid
    assert owner == server.data_dir.stat().st_uid
    assert owner != 0


@pytest.mark.parametrize("service", ["versitygw", "moto_server"])
@pytest.mark.s3
def test_an_s3_service_keeps_versions_where_asked(service: str, request: pytest.FixtureRequest) -> None:
    """Write one key twice in each kind of bucket."""
    s3: S3Service = request.getfixturevalue(service)
    client = s3.client()
    for versioned, kept in ((False, 1), (True, 2)):
        bucket = s3.make_bucket(versioned=versioned)
        for body in (b"old", b"new"):
            client.put_object(Bucket=bucket, Key="key", Body=body)
        assert client.get_object(Bucket=bucket, Key="key")["Body"].read() == b"new"
        assert client.get_bucket_versioning(Bucket=bucket).get("Status") == ("Enabled" if versioned else None)
        assert len(client.list_object_versions(Bucket=bucket)["Versions"]) == kept
        s3.remove_bucket(bucket)


def test_versitygw_refuses_a_wrong_signature(versitygw: VersityGW, tmp_path: Path) -> None:
    """Sign with another secret."""
    other = VersityGW(tmp_path)
    other.port, other.secret_key = versitygw.port, "wrong"
    with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        other.client().list_buckets()


def test_two_versitygw_servers_share_nothing(versitygw: VersityGW, tmp_path: Path) -> None:
    """Make a bucket in one, list the other, and find it again after a kill."""
    with VersityGW(tmp_path / "other", versioning=False) as other:
        bucket = other.make_bucket()
        other.kill()
        assert not other.running
        other.start()
        names = [found["Name"] for found in other.client().list_buckets()["Buckets"]]
        assert names == [bucket]
        assert bucket not in [found["Name"] for found in versitygw.client().list_buckets()["Buckets"]]


def test_buckets_of_tests_are_empty(s3: S3Service, bucket: str, versioned_bucket: str) -> None:
    """Look into the fixtures' buckets and leave an unfinished upload for their clean-up."""
    client = s3.client()
    for name in (bucket, versioned_bucket):
        assert client.list_objects_v2(Bucket=name)["KeyCount"] == 0
        client.create_multipart_upload(Bucket=name, Key="left")
        client.put_object(Bucket=name, Key="left too", Body=b"x")


def test_moto_answers_to_any_key(moto_server: MotoServer) -> None:
    """List without a bucket."""
    assert moto_server.client().list_buckets()["Buckets"] == []


def test_toxiproxy_breaks_and_mends_s3(toxiproxy: Toxiproxy, s3: S3Service, bucket: str) -> None:
    """Cut, mend, limit and clean one connection."""
    proxy = toxiproxy.proxy(s3.endpoint)
    client = s3.client(endpoint=proxy.endpoint)
    client.put_object(Bucket=bucket, Key="key", Body=b"x" * 100_000)
    proxy.disable()
    with pytest.raises(EndpointConnectionError):
        client.head_object(Bucket=bucket, Key="key")
    proxy.enable()
    assert client.head_object(Bucket=bucket, Key="key")["ContentLength"] == 100_000
    proxy.add_toxic("limit_data", bytes=20_000)
    with pytest.raises(Exception, match=r"Connection broken|IncompleteRead|closed"):
        s3.client(endpoint=proxy.endpoint).get_object(Bucket=bucket, Key="key")["Body"].read()
    proxy.remove_toxics()
    body = s3.client(endpoint=proxy.endpoint).get_object(Bucket=bucket, Key="key")["Body"].read()
    assert len(body) == 100_000
    proxy.remove()


def test_pgbouncer_answers_like_its_server(pg15: PostgresServer, pgbouncer: Callable[..., PgBouncer]) -> None:
    """Query the server through it, then itself."""
    pooler = pgbouncer(pg15)
    assert pg15.psql("SELECT 1", host=pooler.host, port=pooler.port) == "1"
    assert pg15.psql("SHOW VERSION", "pgbouncer", host=pooler.host, port=pooler.port).startswith("PgBouncer")


def test_a_debian_cluster_has_its_configuration_outside_its_data(debian_cluster: DebianCluster) -> None:
    """Look at both places, and at the neighbours, before and after a drop."""
    assert debian_cluster.psql("SELECT 1") == "1"
    assert (debian_cluster.config_dir / "postgresql.conf").exists()
    assert not (debian_cluster.data_dir / "postgresql.conf").exists()
    assert debian_cluster.psql("SHOW config_file").startswith("/etc/postgresql/15/")
    debian_cluster.stop()
    assert not debian_cluster.running
    debian_cluster.start()
    assert debian_cluster.psql(WITH_CHECKSUMS) == "on"
    debian_cluster.drop()
    assert not debian_cluster.config_dir.exists()
    assert not debian_cluster.running


@pytest.mark.parametrize("target", ["postgres", "couchdb", "root"])
def test_cchq_may_run_this_python_as_anybody(sudo_rules: SudoRules, target: str) -> None:
    """Ask sudo as cchq for this interpreter, then for another program."""
    who = "import pwd, os; print(pwd.getpwuid(os.geteuid()).pw_name)"
    argv = ["sudo", "-n", "-u", target, sys.executable, "-I", "-c", who]
    done = subprocess.run(argv, capture_output=True, text=True, cwd="/", check=False, **as_user("cchq"))
    assert (done.returncode, done.stdout.strip()) == (0, target), done.stderr
    other = ["sudo", "-n", "-u", target, "/usr/bin/id"]
    refused = subprocess.run(other, capture_output=True, cwd="/", check=False, **as_user("cchq"))
    assert refused.returncode != 0


def test_sudo_rules_leave_nothing_behind(sudo_rules: SudoRules) -> None:
    """Remove and look."""
    assert sudo_rules.path.stat().st_mode & 0o777 == 0o440
    sudo_rules.remove()
    assert not sudo_rules.path.exists()


def test_a_small_disk_fills_up(small_disk: Callable[[str], Path]) -> None:
    """Write more than fits."""
    path = small_disk("1m")
    with pytest.raises(OSError, match="No space left"), (path / "file").open("wb") as file:
        file.write(b"x" * (2 << 20))


@pytest.mark.root
@pytest.mark.parametrize("user", ["postgres", "cchq", "couchdb", "nobody"])
def test_other_users_can_run_this_interpreter_with_this_package(user: str) -> None:
    """Import the package as each of them."""
    require_service("root", IS_ROOT, "only root can become another user")
    reason = f"{sys.executable} lies where they cannot go"
    require_service("Python for other users", python_reachable(), reason)
    argv = [sys.executable, "-I", "-c", "import hq_backups, boto3"]
    subprocess.run(argv, cwd="/", check=True, **as_user(user))


@pytest.mark.root
def test_other_users_can_run_the_fetched_servers() -> None:
    """Ask each server program for its version."""
    require_service("root", IS_ROOT, "only root can become another user")
    for version, path in bin_dirs().items():
        argv = [str(path / "postgres"), "--version"]
        done = subprocess.run(argv, capture_output=True, text=True, cwd="/", check=True, **as_user("nobody"))
        assert f" {version}." in done.stdout


class TestOwnDisk:
    """The disk that a run of the tests has for itself where /tmp is slow."""

    @pytest.fixture(autouse=True)
    def needs_mounts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Demand root, mount(8), and no more room than a run's own disk may have left."""
        reason = tmpfs_unavailable()
        require_service("mounts", not reason, reason)
        monkeypatch.setattr(disk, "LEAST", 1 << 30)

    def test_it_is_there_for_everybody_and_gone_with_the_program(self, tmp_path: Path) -> None:
        """Run a program on one; what it leaves there, a server too, is nobody's afterwards."""
        with own_disk(tmp_path) as place:
            assert place is not None
            assert os.path.ismount(place)
            assert not is_slow(place)
            assert os.listdir(tmp_path) == []
            script = f'test -w "${SHORT_PLACE}" && mkdir "${SHORT_PLACE}/left" && exit 7'
            assert start(["sh", "-c", script], place).wait(30) == 7
            # What tests take for a server's, and is none.
            for number, content in enumerate(("", "1", "x\ny\n", "1\n/proc\n")):
                (place / "left" / f"{number}").mkdir()
                (place / "left" / f"{number}" / "postmaster.pid").write_text(content)
        assert not place.exists()

    def test_without_room_or_tools_the_tests_run_in_tmp(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """Offer a disk that is too small, and a machine without mkfs.ext4."""
        with tmpfs("1m") as small, own_disk(small) as place:
            assert place is None
        monkeypatch.setenv("PATH", str(tmp_path))
        with own_disk(tmp_path) as place:
            assert place is None
        assert "no disk of its own" in capfd.readouterr().err
        assert os.listdir(tmp_path) == []
