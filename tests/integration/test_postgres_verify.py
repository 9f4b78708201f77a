"""Backups of PostgreSQL, whole and damaged in every way, before the eyes of verify."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hq_backups.engine.errors import Exit
from hq_backups.engine.requests import Selection, VerifyRequest
from tests.integration.pg_helpers import ENV, Host, script, servers_below
from tests.testbed.postgres import PostgresServer
from tests.testbed.process import give, wait_until
from tests.testbed.s3 import S3Service

pytestmark = pytest.mark.postgres15

Member = tuple[tarfile.TarInfo, bytes]
Rebuild = Callable[[Callable[[list[Member]], list[Member]]], None]
DEEP = VerifyRequest(Selection("postgres"), deep=True)


@pytest.fixture(scope="module")
def home(services_dir: Path, s3: S3Service) -> Iterator[Host]:
    from tests.conftest import require_service

    reason = PostgresServer.unavailable(15)
    require_service("PostgreSQL 15", not reason, reason)
    bucket = s3.make_bucket(versioned=True)
    with PostgresServer(15, services_dir / "verify", initdb_args=("--wal-segsize=1",)) as server:
        script(server, "CREATE TABLE t AS SELECT generate_series(1, 1000) AS n; ANALYZE t; CREATE ROLE r;")
        script(server, "CREATE MATERIALIZED VIEW v AS SELECT * FROM t; CREATE UNLOGGED TABLE u AS SELECT 1;")
        host = Host(server, s3, bucket)
        host.good_backup("daily")
        yield host
    s3.remove_bucket(bucket)


@pytest.fixture
def host(home: Host) -> Iterator[Host]:
    """Return the host with a copy of its backup, to damage."""
    copy = home.server.workdir / "copy"
    shutil.copytree(home.backups, copy)
    copy.chmod(0o700)
    for path in (copy, *copy.iterdir()):
        give(path, home.server.os_user)
    yield home.but(store={"backup_dir": copy})
    assert not servers_below(copy), "a server was left behind"
    shutil.rmtree(copy)


def directory(host: Host) -> Path:
    return Path(host.store["backup_dir"])


def artifact(host: Host) -> Path:
    return directory(host) / host.artifact.name


def change_manifest(host: Host, **changes: Any) -> None:
    path = directory(host) / f".{host.artifact.name}.json"
    facts = json.loads(path.read_bytes())
    facts["source"] = {**facts["source"], **changes.pop("source", {})}
    path.write_text(json.dumps({**facts, **changes}))


def assert_damaged(host: Host, *words: str, deep: bool = False, name: str | None = None) -> None:
    done = host.verify(name or host.artifact.name, select={"source": "local"}, deep=deep)
    assert done.code is Exit.BAD_BACKUP, done
    for word in words:
        assert word in done.error, done.error
    assert done.of("error")[0]["hint"], done.error
    assert not done.of("verified")
    assert not list(directory(host).glob(".verify-*"))
    assert not list(directory(host).glob(".*.verified.json"))


@pytest.mark.parametrize("source", ["local", "s3"])
@pytest.mark.parametrize("deep", [False, True])
def test_a_good_backup_is_good(host: Host, source: str, deep: bool) -> None:
    done = host.verify(select={"source": source}, deep=deep)
    assert done.code is Exit.OK, done
    checks = {c["name"]: c["message"] for c in done.of("check")}
    assert set(checks) == ({"sha256", "pg_verifybackup", "contents"} if deep else {"sha256", "archive"})
    if deep:
        assert "3 databases, 2 roles, 2 tables, 2000 rows" in checks["contents"]
    (said,) = done.of("verified")
    assert said["deep"] is deep
    assert not list(directory(host).glob(".verify-*"))
    assert host.server.running
    times = [e["verified_at"] for e in host.catalog("local")]
    assert all(times) if source == "local" else times == [None]


@pytest.mark.parametrize("missing", [1, 0.5])
def test_a_truncated_one(host: Host, missing: float) -> None:
    path = artifact(host)
    size = path.stat().st_size
    left = size - int(missing) if missing >= 1 else int(size * missing)
    with path.open("r+b") as file:
        file.truncate(left)
    assert_damaged(host, f"it has {left} bytes", f"says {size}")
    latest = host.verify(select={"source": "local"})
    assert latest.code is Exit.BAD_BACKUP
    assert "is not good" in latest.error


@pytest.mark.parametrize("place", [1, 0.3, 0.7, -8, -1])
def test_a_flipped_bit(host: Host, place: float) -> None:
    path = artifact(host)
    data = bytearray(path.read_bytes())
    data[int(place * len(data)) if 0 < place < 1 else int(place)] ^= 4
    path.write_bytes(data)
    assert_damaged(host, f"{path.name} is damaged")


@pytest.mark.parametrize("field", ["sha256", "plain_sha256", "size", "plain_size", "codec", "name"])
def test_a_manifest_that_says_something_else(host: Host, field: str) -> None:
    path = directory(host) / f".{host.artifact.name}.json"
    value = json.loads(path.read_bytes())[field]
    changed = {"codec": "none", "name": "postgres_x_daily_2026_11_22.tar.gz"}.get(field, value)
    if isinstance(value, int):
        changed = value - 1
    elif field.endswith("sha256"):
        changed = value[:-1] + ("0" if value[-1] != "0" else "1")
    change_manifest(host, **{field: changed})
    assert_damaged(host, name=str(artifact(host)) if field == "name" else None)


def test_a_manifest_that_is_no_manifest(host: Host) -> None:
    path = directory(host) / f".{host.artifact.name}.json"
    path.write_bytes(path.read_bytes()[:-9])
    assert_damaged(host, "it is not JSON")


def test_the_manifest_of_another_artifact(host: Host) -> None:
    other = artifact(host).with_name(f"postgres_{ENV}_daily_2001_02_03.tar.gz")
    shutil.copy(artifact(host), other)
    shutil.copy(directory(host) / f".{host.artifact.name}.json", directory(host) / f".{other.name}.json")
    for path in directory(host).iterdir():
        give(path, host.server.os_user)
    assert_damaged(host, f"its manifest is that of {host.artifact.name}", name=str(other))


def test_no_manifest_at_all(host: Host) -> None:
    (directory(host) / f".{host.artifact.name}.json").unlink()
    done = host.verify(host.artifact.name, select={"source": "local"})
    assert done.code is Exit.OK, done
    assert "no-manifest" in done.warnings
    assert not list(directory(host).glob(".*.verified.json"))


@pytest.fixture
def rebuild(host: Host) -> Rebuild:
    """Return a function that changes the archive's members and makes the manifest fit: only sense can tell."""

    def change(what: Callable[[list[Member]], list[Member]]) -> None:
        path = artifact(host)
        with tarfile.open(path) as tar:
            members = [(m, tar.extractfile(m).read() if m.isreg() else b"") for m in tar]  # type: ignore[union-attr]
        made = io.BytesIO()
        with tarfile.open(fileobj=made, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for member, content in what(members):
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        plain = made.getvalue()
        stored = gzip.compress(plain, 1)
        path.write_bytes(stored)
        change_manifest(
            host,
            size=len(stored),
            sha256=hashlib.sha256(stored).hexdigest(),
            crc32=f"{zlib.crc32(stored):08x}",
            plain_size=len(plain),
            plain_sha256=hashlib.sha256(plain).hexdigest(),
        )

    return change


def is_wal(member: tarfile.TarInfo) -> bool:
    return member.isreg() and member.name.startswith("pg_wal/0")


def test_the_rebuilt_archive_itself_is_good(host: Host, rebuild: Rebuild) -> None:
    rebuild(lambda members: members)
    assert host.verify(select={"source": "local"}, deep=True).code is Exit.OK


@pytest.mark.parametrize("name", ["PG_VERSION", "backup_label", "backup_manifest", "global/pg_control"])
def test_a_missing_member(host: Host, rebuild: Rebuild, name: str) -> None:
    rebuild(lambda members: [m for m in members if m[0].name != name])
    assert_damaged(host, f"{name} is not in it")


def test_no_wal(host: Host, rebuild: Rebuild) -> None:
    rebuild(lambda members: [m for m in members if not is_wal(m[0])])
    assert_damaged(host, "no WAL is in it")


def test_a_changed_table_is_found_by_looking_deep(host: Host, rebuild: Rebuild) -> None:
    changed = host.server.psql("SELECT pg_relation_filepath('t')")
    rebuild(lambda members: [(m, c[:-1] + b"!") if m.name == changed else (m, c) for m, c in members])
    assert_damaged(host, "pg_verifybackup", changed, deep=True)


def test_wal_that_is_not_the_backups_is_found_by_looking_deep(host: Host, rebuild: Rebuild) -> None:
    rebuild(lambda members: [(m, b"\0" * len(c)) if is_wal(m) else (m, c) for m, c in members])
    assert_damaged(host, "WAL", deep=True)


def test_another_servers_data_are_found_by_looking_deep(host: Host) -> None:
    change_manifest(host, source={"system_identifier": "7"})
    assert_damaged(host, "its system identifier is another one", deep=True)


def test_another_version_is_found_by_looking_deep(host: Host) -> None:
    change_manifest(host, source={"version_num": 140002})
    assert_damaged(host, "PG_VERSION says '15'", deep=True)


def test_a_loss_of_rows_is_found_by_looking_deep(host: Host) -> None:
    change_manifest(host, source={"contents": {"postgres": {"tables": {"public.t": 1_000_000}}}})
    assert_damaged(host, "it holds 2000 rows, the server had about 1000000", deep=True)


@pytest.mark.parametrize(
    "source",
    [{"version_num": "abc"}, {"databases": [1]}],
)
def test_a_manifest_of_nonsense_is_told_as_such(host: Host, source: dict[str, Any]) -> None:
    change_manifest(host, source=source)
    assert_damaged(host, "BadManifest", "manifest postgres_", deep=True)


# Deep, and killed


@pytest.fixture
def interrupted(host: Host) -> Iterator[Host]:
    """Return the host whose deep verify has its server running, and is stopped there."""
    place = directory(host)
    with host.start_child("verify", DEEP, user=host.server.os_user) as child:
        wait_until(
            lambda: list(place.glob(".verify-*/data/postmaster.pid")), what="the scratch server", timeout=60
        )
        child.send_signal(signal.SIGSTOP)
        host.options = {**host.options, "child": child}
        yield host
        child.kill()


def scratch_sockets(host: Host) -> list[Path]:
    (pid_file,) = directory(host).glob(".verify-*/data/postmaster.pid")
    wait_until(lambda: pid_file.read_text().splitlines()[4:][0:1] not in ([], [""]), what="the pid file")
    return [Path(pid_file.read_text().splitlines()[4])]


def kill_with_what_ties(child: subprocess.Popen[bytes]) -> None:
    """Kill an engine and first of all the shell that would stop its server."""
    for task in Path(f"/proc/{child.pid}/task").iterdir():
        for pid in (task / "children").read_text().split():
            if b"hqb-tied" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(int(pid), signal.SIGKILL)
    child.kill()
    child.wait()


@pytest.mark.parametrize("verb", ["verify", "backup"])
def test_what_a_killed_deep_verify_leaves_is_cleaned_by_the_next_run(interrupted: Host, verb: str) -> None:
    host = interrupted
    child = host.options.pop("child")
    (home,) = scratch_sockets(host)
    kill_with_what_ties(child)
    assert servers_below(directory(host))
    done = host.verify(select={"source": "local"}, deep=True) if verb == "verify" else host.backup("manual")
    assert done.code is Exit.OK, done
    assert "left by a verify that died" in str(done)
    assert not list(directory(host).glob(".verify-*"))
    assert not servers_below(directory(host))
    assert not home.exists()


def test_a_deep_verify_at_work_is_left_alone(interrupted: Host) -> None:
    host = interrupted
    child = host.options.pop("child")
    assert host.backup("manual", upload=False).code is Exit.OK
    assert servers_below(directory(host))
    child.send_signal(signal.SIGCONT)
    out, _ = child.communicate(timeout=60)
    assert child.returncode == 0, out.decode()
    assert not list(directory(host).glob(".verify-*"))
