"""Backups of PostgreSQL day after day: their names, what stays of them, and what the manifest says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from hq_backups.engine.errors import Exit
from hq_backups.engine.postgres.wal import held_wal
from hq_backups.engine.stores import open_store
from hq_backups.engine.stores.postgres_plain import PostgresPlain
from tests.integration.pg_helpers import ENV, Host, script, sha256
from tests.testbed.postgres import PostgresServer
from tests.testbed.process import wait_until
from tests.testbed.s3 import S3Service

pytestmark = pytest.mark.postgres15


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out sync(2): it waits for whatever else this machine writes."""
    monkeypatch.setattr("os.sync", lambda: None)


@pytest.fixture(scope="module")
def server(services_dir: Path) -> Iterator[PostgresServer]:
    from tests.conftest import require_service

    reason = PostgresServer.unavailable(15)
    require_service("PostgreSQL 15", not reason, reason)
    with PostgresServer(15, services_dir / "days", initdb_args=("--wal-segsize=1",)) as server:
        script(server, "CREATE TABLE t AS SELECT generate_series(1, 1000) AS n; ANALYZE t;")
        yield server


@pytest.fixture
def host(server: PostgresServer) -> Iterator[Host]:
    host = Host(server)
    yield host
    shutil.rmtree(host.backups)


def names(host: Host) -> set[str]:
    return {p.name for p in host.backups.iterdir()}


@pytest.mark.parametrize("type_", ["daily", "weekly", "hourly", "manual"])
def test_each_type_has_its_name(type_: str, host: Host) -> None:
    began = datetime.now(UTC)
    name = host.good_backup(type_).manifest["name"]
    pattern = {"hourly": "%Y_%m_%d_%H", "manual": "%Y_%m_%d_%H%M%S"}.get(type_, "%Y_%m_%d")
    moments = [
        began + timedelta(seconds=n) for n in range(int((datetime.now(UTC) - began).total_seconds()) + 2)
    ]
    assert name in {f"postgres_{ENV}_{type_}_{m.strftime(pattern)}.tar.gz" for m in moments}
    assert names(host) == {name, f".{name}.json"}
    assert {p.stat().st_mode & 0o777 for p in host.backups.iterdir()} == {0o600}
    assert host.backups.stat().st_mode & 0o777 == 0o700


def test_the_manifest_says_what_there_is(host: Host) -> None:
    manifest = host.good_backup("daily").manifest
    path = host.backups / manifest["name"]
    assert json.loads((host.backups / f".{path.name}.json").read_bytes()) == dict(manifest)
    assert manifest["size"] == path.stat().st_size
    assert manifest["sha256"] == sha256(path.read_bytes())
    source = manifest["source"]
    assert source["system_identifier"] == host.system_identifier
    assert source["version_num"] == int(host.server.psql("SHOW server_version_num"))
    assert [d["name"] for d in source["databases"]] == ["postgres", "template0", "template1"]
    assert source["contents"]["postgres"]["tables"] == {"public.t": 1000}
    assert source["start_lsn"]
    assert source["backup_from"] == "primary"
    assert (manifest["env"], manifest["host"], manifest["store"], manifest["mode"]) == (
        ENV,
        "pg0",
        "postgres",
        "plain",
    )
    assert "15" in manifest["tools"]["pg_basebackup"]


def test_the_second_of_a_day_takes_the_firsts_place_when_it_is_good(host: Host) -> None:
    first = host.good_backup("daily").manifest
    failed = host.but(options={"port": 1, "host": "127.0.0.1"}).backup("daily")
    assert failed.code is Exit.PREFLIGHT
    (entry,) = host.catalog()
    assert entry["run"] == first["run"]
    script(host.server, "CREATE TABLE more AS SELECT 1 AS n;")
    second = host.good_backup("daily").manifest
    assert second["name"] == first["name"]
    assert second["sha256"] != first["sha256"]
    assert names(host) == {second["name"], f".{second['name']}.json"}
    (entry,) = host.catalog()
    assert (entry["run"], entry["sha256"]) == (second["run"], second["sha256"])
    assert host.verify().code is Exit.OK


def test_the_seconds_object_stands_beside_the_firsts(host: Host, s3: S3Service, bucket: str) -> None:
    """An unversioned bucket: both objects stay, the second with its time in the key."""
    there = host.but(s3=s3, bucket=bucket)
    first, second = there.good_backup("daily"), there.good_backup("daily")
    assert first.key == first.manifest["name"]
    assert second.key != first.key
    assert second.key.startswith(first.key.removesuffix(".tar.gz") + "_")
    assert {e["run"] for e in there.catalog("s3")} == {first.manifest["run"], second.manifest["run"]}
    older = there.restore(first.key, select={"source": "s3"}, plan_only=True)
    assert older.of("plan")[0]["sha256"] == first.manifest["sha256"]


def test_both_versions_of_the_key_can_be_restored(host: Host, s3: S3Service, versioned_bucket: str) -> None:
    there = host.but(s3=s3, bucket=versioned_bucket)
    first, second = there.good_backup("daily"), there.good_backup("daily")
    assert first.key == second.key == "postgres_daily_pg0.tar.gz"
    assert first.version_id != second.version_id
    for done in (first, second):
        plan = there.restore(done.key, select={"source": "s3", "version_id": done.version_id}, plan_only=True)
        assert plan.of("plan")[0]["sha256"] == done.manifest["sha256"], plan
    latest = there.restore(select={"source": "s3"}, plan_only=True)
    assert latest.of("plan")[0]["sha256"] == second.manifest["sha256"]
    assert there.verify(first.manifest["run"], select={"source": "s3"}).code is Exit.OK


def test_all_is_listed_newest_first_with_its_places(host: Host, s3: S3Service, versioned_bucket: str) -> None:
    there = host.but(s3=s3, bucket=versioned_bucket)
    daily = there.good_backup("daily").manifest["run"]
    manual = there.good_backup("manual", upload=False).manifest["run"]
    listed = there.catalog()
    assert [(e["run"], [p["kind"] for p in e["locations"]]) for e in listed] in (
        [(manual, ["local"]), (daily, ["local", "s3"])],
        [(daily, ["local", "s3"]), (manual, ["local"])],  # both in one second
    )
    assert there.upload().code is Exit.OK
    assert all(len(e["locations"]) == 2 for e in there.catalog())


def test_two_runs_of_one_second_are_two_backups(
    host: Host, s3: S3Service, versioned_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = host.but(s3=s3, bucket=versioned_bucket)
    monkeypatch.setattr("hq_backups.engine.entry.utc_now", lambda: datetime(2026, 11, 22, tzinfo=UTC))
    runs = {there.good_backup("daily").manifest["run"]}
    runs.add(there.good_backup("manual", upload=False).manifest["run"])
    assert len(runs) == 1
    assert there.upload().code is Exit.OK
    assert [len(e["locations"]) for e in there.catalog()] == [2, 2]


def test_another_environments_key_is_never_written_over(
    host: Host, s3: S3Service, versioned_bucket: str
) -> None:
    there = host.but(s3=s3, bucket=versioned_bucket)
    there.good_backup("daily")
    done = there.but(env="other").backup("daily")
    assert done.code is Exit.PREFLIGHT, done
    assert f"belongs to environment {ENV}, this is other" in done.error
    assert done.of("error")[0]["hint"]
    assert {e["env"] for e in there.catalog("s3")} == {ENV}


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_other_compressions_are_whole_and_named_so(compression: str, host: Host, short_tmp: Path) -> None:
    import dataclasses

    class Packed(Host):
        @property
        def config(self):  # type: ignore[no-untyped-def]
            return dataclasses.replace(super().config, compression=compression)

    packed = Packed(host.server)
    done = packed.good_backup("daily")
    assert done.manifest["name"].endswith({"none": ".tar", "zstd": ".tar.zst"}[compression])
    assert packed.verify().code is Exit.OK
    target = short_tmp / "there"
    assert packed.restore(target_dir=target).code is Exit.OK
    assert (target / "global" / "pg_control").exists()


def test_an_old_backup_goes_only_after_a_good_one(host: Host, make_old: Callable[[str, int], str]) -> None:
    old = make_old("daily", 5)
    failed = host.but(options={"port": 1, "host": "127.0.0.1"}).backup("daily")
    assert failed.code is Exit.PREFLIGHT
    assert old in names(host)
    done = host.good_backup("daily", prune=False)
    assert old in names(host)
    done = host.good_backup("daily")
    assert [p["name"] for p in done.of("pruned")] == [old]
    assert names(host) == {done.manifest["name"], f".{done.manifest['name']}.json"}


@pytest.fixture
def make_old(host: Host) -> Callable[[str, int], str]:
    """Return a function that puts a good artifact some days into the past."""

    def make(type_: str, days: int) -> str:
        manifest = dict(host.good_backup(type_).manifest)
        moment = datetime.now(UTC) - timedelta(days=days)
        name = f"postgres_{ENV}_{type_}_{moment:%Y_%m_%d}.tar.gz"
        (host.backups / f".{manifest['name']}.json").unlink()
        (host.backups / manifest["name"]).rename(host.backups / name)
        stamp = f"{moment:%Y-%m-%dT%H:%M:%SZ}"
        manifest |= {
            "name": name,
            "run": f"old-{days}",
            "started_at": stamp,
            "local_date": f"{moment:%Y-%m-%d}",
        }
        (host.backups / f".{name}.json").write_text(json.dumps(manifest))
        return name

    return make


def test_a_backup_of_a_standby_is_restored_as_a_primary(
    host: Host, fresh_pg: Callable[..., PostgresServer]
) -> None:
    """Copy a standby's data directory, back it up, and restore it: nothing of the old primary is left in it."""
    import subprocess

    from tests.testbed.process import as_user

    primary = fresh_pg(15)
    standby = fresh_pg(15, start=False)
    shutil.rmtree(standby.data_dir)
    argv = [standby.client_bin_dir / "pg_basebackup", "-D", standby.data_dir, "-R", "-c", "fast"]
    argv += ["-d", primary.conninfo]
    subprocess.run(argv, check=True, cwd="/", **as_user(standby.os_user))
    standby.configure()
    standby.start()
    replica = Host(standby)
    done = replica.good_backup("daily")
    assert done.manifest["source"]["in_recovery"] is True
    standby.stop()
    primary.stop()
    restored = replica.restore()
    assert restored.code is Exit.OK, restored
    assert standby.psql("SELECT pg_is_in_recovery()") == "f"
    assert "removed standby.signal" in str(restored)
    standby.psql("CREATE TABLE writable (n int)")


def test_settings_of_the_role_and_the_server_do_not_get_in_the_way(
    fresh_pg: Callable[..., PostgresServer],
) -> None:
    hostile = {
        "statement_timeout": "1ms", "lock_timeout": "1ms", "idle_session_timeout": "20ms",
        "default_transaction_read_only": "on", "client_encoding": "LATIN1", "datestyle": "German",
        "log_min_messages": "debug1", "client_min_messages": "debug1", "intervalstyle": "postgres_verbose",
    }  # fmt: skip
    server = fresh_pg(15)
    script(server, 'CREATE DATABASE "dätä-ベース";')
    script(server, "CREATE TABLE t AS SELECT 1 AS n;", "dätä-ベース")
    # A database's owner, who is no superuser, puts his own function before the system's.
    script(server, """
        CREATE SCHEMA evil;
        CREATE FUNCTION evil.format(text, name, name) RETURNS text LANGUAGE plpgsql
          AS $$ BEGIN RAISE EXCEPTION 'ran what a database holds'; END $$;
        ALTER DATABASE "dätä-ベース" SET search_path = evil, pg_catalog;
        """, "dätä-ベース")  # fmt: skip
    script(server, "".join(f"ALTER SYSTEM SET {k} = '{v}';" for k, v in hostile.items()))
    script(server, "".join(f"ALTER ROLE postgres SET {k} = '{v}';" for k, v in hostile.items()))
    server.restart()
    host = Host(server)
    done = host.good_backup("daily")
    assert done.warnings == set()
    assert set(done.manifest["source"]["contents"]) == {"dätä-ベース", "postgres", "template1"}
    checked = host.verify(deep=True)
    assert checked.code is Exit.OK, checked
    assert checked.warnings == set()


def test_the_slot_that_holds_the_wal_outlives_an_idle_timeout(
    fresh_pg: Callable[..., PostgresServer],
) -> None:
    server = fresh_pg(15, extra_conf={"idle_session_timeout": "20ms"})
    there = "SELECT format('%s %s %s', slot_name, temporary, active) FROM pg_replication_slots"
    store = open_store(Host(server).config, "postgres")
    assert isinstance(store, PostgresPlain)
    with held_wal(store.tools.newest("psql").path, store.server(), "20261122T000002Z-pg0-postgres", 15):
        assert server.psql("SELECT pg_sleep(0.3)") == ""  # fifteen times its patience
        assert server.psql(there) == "hqb_20261122t000002z_pg0_postgres t t"
        assert server.psql("SELECT restart_lsn IS NOT NULL FROM pg_replication_slots") == "t"
    wait_until(lambda: server.psql(there) == "", what="the slot to go with its connection")
