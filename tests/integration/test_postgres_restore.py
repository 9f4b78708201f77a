"""Restores of PostgreSQL on one host: every state of the server and its directory, every way to fail."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hq_backups.engine.errors import Exit
from hq_backups.engine.locks import StoreLock
from tests.integration.pg_helpers import ENV, Host, copy_tree, remove, script, servers_below, tree
from tests.testbed.debian import DebianCluster
from tests.testbed.places import IS_ROOT
from tests.testbed.postgres import PostgresServer
from tests.testbed.process import as_user, short_directory, wait_until
from tests.testbed.s3 import S3Service

pytestmark = pytest.mark.postgres15


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out sync(2): it waits for whatever else this machine writes."""
    monkeypatch.setattr("os.sync", lambda: None)


@dataclass
class Backed(Host):
    """A host with one backup, of the note ``before``; its data of now have the note ``after`` as well."""

    inode: int = 0
    taken: Any = None

    def notes(self) -> str:
        return self.server.psql("SELECT string_agg(n, ' ' ORDER BY n DESC) FROM note")

    @property
    def pristine(self) -> Path:
        return self.server.workdir / "pristine"

    def make_data(self) -> None:
        """Put the data of now in place, with nothing beside them, and start the server."""
        self.server.stop("immediate")
        remove(self.server.workdir / "pg")
        self.data.parent.mkdir(parents=True)
        for made in (self.data.parent, self.data.parent.parent):
            shutil.chown(made, self.server.os_user)
        copy_tree(self.pristine, self.data)
        self.server.start()
        self.inode = self.data.stat().st_ino

    @property
    def untouched(self) -> bool:
        there = self.data.is_dir() and not self.data.is_symlink() and self.data.stat().st_ino == self.inode
        return there and self.server.running and self.beside() == ["main"]

    @property
    def name_there(self) -> str:
        return str(self.taken.manifest["name"])


@pytest.fixture(scope="module")
def home(services_dir: Path, s3: S3Service) -> Iterator[Backed]:
    from tests.conftest import require_service

    reason = PostgresServer.unavailable(15)
    require_service("PostgreSQL 15", not reason, reason)
    bucket = s3.make_bucket(versioned=True)
    # Small WAL segments: half of an empty cluster is WAL.
    server = PostgresServer(15, services_dir / "home", initdb_args=("--wal-segsize=1",))
    server.data_dir = server.workdir / "pg" / "15" / "main"
    with server:
        script(server, "CREATE TABLE note (n text); INSERT INTO note VALUES ('before');")
        host = Backed(server, s3, bucket)
        host.taken = host.good_backup("daily")
        script(server, "INSERT INTO note VALUES ('after');")
        server.stop()
        copy_tree(server.data_dir, host.pristine)
        yield host
    s3.remove_bucket(bucket)


@pytest.fixture
def host(home: Backed) -> Backed:
    """Return the host, its server running on the data of now."""
    if not home.untouched:
        home.make_data()
    return home


def run_of(done: Any) -> str:
    return str(done.events[0].run)


def assert_nothing_changed(host: Backed) -> None:
    assert host.untouched, host.beside()
    assert host.notes() == "before after"


# What there may be before


def test_a_running_server_is_restored_and_undone(host: Backed) -> None:
    done = host.restore()
    assert done.code is Exit.OK, done
    run = run_of(done)
    assert host.notes() == "before"
    assert host.beside() == [".main.hq_backups-restore.json", "main", f"main.before-{run}"]
    (facts,) = done.of("data")
    assert facts["old_data"] == str(host.data.with_name(f"main.before-{run}"))
    assert any("check_services" in step for step in facts["next_steps"])
    assert host.data.stat().st_mode & 0o777 == 0o700
    assert host.data.owner() == host.server.os_user
    assert {c["name"] for c in done.of("check")} >= {"sha256", "pg_verifybackup", "serving"}

    undone = host.undo()
    assert undone.code is Exit.OK, undone
    assert host.notes() == "before after"
    assert host.data.stat().st_ino == host.inode
    assert host.beside() == [".main.hq_backups-restore.json", "main", f"main.failed-{run}"]

    again = host.undo()
    assert again.code is Exit.OK
    assert "nothing to do" in str(again)
    assert host.notes() == "before after"


def test_a_stopped_server_is_restored_and_started(host: Backed) -> None:
    host.server.stop()
    done = host.restore()
    assert done.code is Exit.OK, done
    assert host.notes() == "before"


def test_a_crashed_server_with_a_stale_pid_file_is_restored(host: Backed) -> None:
    host.server.kill()
    assert (host.data / "postmaster.pid").exists()
    done = host.restore(select={"source": "s3"})
    assert done.code is Exit.OK, done
    assert host.notes() == "before"


def test_a_missing_data_directory_is_made_with_its_parents(host: Backed) -> None:
    host.server.stop()
    shutil.rmtree(host.server.workdir / "pg")
    done = host.restore()
    assert done.code is Exit.OK, done
    assert host.notes() == "before"
    assert host.beside() == [".main.hq_backups-restore.json", "main"]
    assert host.data.parent.owner() == host.server.os_user
    assert done.of("plan")[0]["set_aside"] is None
    # Nothing was there, nothing is again.
    assert host.undo().code is Exit.OK
    assert not host.data.exists()
    assert not servers_below(host.server.workdir)


def test_a_data_directory_that_is_a_link_is_exchanged_where_it_lies(host: Backed) -> None:
    host.server.stop()
    disk = host.server.workdir / "pg" / "disk"
    disk.mkdir()
    host.data.rename(disk / "real")
    host.data.symlink_to(disk / "real")
    host.server.start()
    done = host.restore()
    assert done.code is Exit.OK, done
    assert host.notes() == "before"
    assert host.data.is_symlink()
    assert host.beside() == ["main"]
    assert f"real.before-{run_of(done)}" in os.listdir(disk)
    assert host.undo().code is Exit.OK
    assert host.notes() == "before after"
    assert host.data.is_symlink()


def test_an_empty_data_directory_made_by_hand_gets_its_proper_owner_and_mode(host: Backed) -> None:
    host.server.stop()
    shutil.rmtree(host.data)
    host.data.mkdir()
    host.data.chmod(0o755)
    done = host.restore()
    assert done.code is Exit.OK, done
    assert host.notes() == "before"
    assert (host.data.owner(), host.data.stat().st_mode & 0o777) == (host.server.os_user, 0o700)


def test_group_access_to_the_data_is_kept(host: Backed) -> None:
    host.data.chmod(0o750)
    done = host.restore()
    assert done.code is Exit.OK, done
    assert host.data.stat().st_mode & 0o777 == 0o750


@pytest.mark.root
def test_a_mount_point_is_refused(host: Backed, small_disk: Callable[[str], Path]) -> None:
    done = host.but(store={"data_dir": small_disk("1m")}).restore()
    assert done.code is Exit.PREFLIGHT
    assert "is a mount point" in done.error
    assert not done.of("plan"), "it was unpacked for nothing"
    assert "--target-dir" in done.error


@pytest.mark.root
def test_a_place_that_is_too_small_is_refused(host: Backed, small_disk: Callable[[str], Path]) -> None:
    done = host.but(store={"data_dir": small_disk("8m") / "main"}).restore()
    assert done.code is Exit.PREFLIGHT
    assert "free" in done.error
    assert "needed" in done.error


@pytest.mark.root
def test_a_staging_directory_elsewhere_is_refused(host: Backed, small_disk: Callable[[str], Path]) -> None:
    done = host.restore(staging_dir=small_disk("1m"))
    assert done.code is Exit.PREFLIGHT
    assert "--staging-dir" in done.error
    assert_nothing_changed(host)


def test_open_connections_must_be_disconnected_by_name(host: Backed) -> None:
    argv = [
        host.server.client_bin_dir / "psql",
        "-X",
        "-d",
        host.server.conninfo,
        "-c",
        "SELECT pg_sleep(600)",
    ]
    here = "SELECT count(*) FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(600)'"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(argv, cwd="/", **quiet, **as_user(host.server.os_user)) as client:
        try:
            wait_until(lambda: host.server.psql(here) == "1", what="the client")
            refused = host.restore()
            assert refused.code is Exit.PREFLIGHT
            assert "clients are connected to the server (1)" in refused.error
            assert "among them postgres on postgres from 127.0.0.1 " in refused.error
            assert "--disconnect" in refused.error
            assert "downtime start" in refused.error
            assert_nothing_changed(host)
            done = host.restore(disconnect=True)
            assert done.code is Exit.OK, done
            client.wait(20)
        finally:
            client.kill()
    assert host.notes() == "before"


# What may be asked for


def test_a_plan_changes_nothing_at_all(host: Backed) -> None:
    host.server.stop()
    before = tree(host.server.workdir)
    done = host.restore(plan_only=True)
    assert done.code is Exit.OK, done
    assert tree(host.server.workdir) == before
    (plan,) = done.of("plan")
    assert plan["sha256"] == host.taken.manifest["sha256"]
    assert plan["target"] == str(host.data)
    assert plan["facts"]["connections"] == []
    # Also where even the parents are missing.
    shutil.rmtree(host.server.workdir / "pg")
    before = tree(host.server.workdir)
    assert host.restore(plan_only=True).code is Exit.OK
    assert tree(host.server.workdir) == before


def test_every_way_to_name_a_backup_finds_it(host: Backed) -> None:
    manifest = host.taken.manifest
    local, bucket = str(host.artifact), f"s3://{host.bucket}/{host.taken.key}"
    for name, source in {
        "latest": local,
        manifest["name"]: local,
        manifest["run"]: local,
        str(host.artifact): local,
        host.taken.key: local,
    }.items():
        plan = host.restore(name, plan_only=True).of("plan")
        assert [p["source"] for p in plan] == [source], name
    by_key = host.restore(host.taken.key, select={"source": "s3"}, plan_only=True).of("plan")
    assert [p["source"] for p in by_key] == [f"{bucket} (version {host.taken.version_id})"]
    version = host.restore(
        host.taken.key, select={"version_id": host.taken.version_id, "source": "s3"}, plan_only=True
    )
    assert version.code is Exit.OK, version
    by_version = host.restore(host.taken.key, select={"version_id": host.taken.version_id}, plan_only=True)
    assert by_version.code is Exit.OK, by_version
    assert bucket in by_version.of("plan")[0]["source"]


def test_a_name_that_is_nearly_right_is_told(host: Backed) -> None:
    name = host.name_there.replace("daily", "dayly")
    done = host.restore(name)
    assert done.code is Exit.BAD_BACKUP
    assert f"near: {host.name_there}" in done.error
    assert "list_backups postgres" in done.error
    elsewhere = host.restore("/nowhere/postgres_x_daily_2026_11_22.tar.gz")
    assert elsewhere.code is Exit.BAD_BACKUP
    assert "no backup /nowhere/" in elsewhere.error
    version = host.restore(host.taken.key, select={"version_id": "nonsense"})
    assert version.code is Exit.BAD_BACKUP


def test_a_target_directory_gets_the_data_and_nothing_else_is_touched(host: Backed, short_tmp: Path) -> None:
    target = short_tmp / "new"
    planned = host.restore(target_dir=target, plan_only=True)
    assert planned.code is Exit.OK
    assert not target.exists()
    done = host.restore(target_dir=target)
    assert done.code is Exit.OK, done
    assert (target / "PG_VERSION").read_text() == "15\n"
    assert target.owner() == host.server.os_user
    assert target.stat().st_mode & 0o777 == 0o700
    assert "pg_verifybackup" in {c["name"] for c in done.of("check")}
    assert_nothing_changed(host)
    again = host.restore(target_dir=target)
    assert again.code is Exit.PREFLIGHT
    assert f"{target} is not an empty directory" in again.error
    assert "--target-dir" in again.error


def test_another_backup_than_the_confirmed_one_is_refused(host: Backed) -> None:
    done = host.restore(expected_sha256="0" * 64)
    assert done.code is Exit.PREFLIGHT
    assert "another backup is meant" in done.error
    assert_nothing_changed(host)


def test_another_environment_must_be_said_by_name(host: Backed) -> None:
    other = host.but(env="icds_new_staging")
    assert other.restore().code is Exit.BAD_BACKUP
    refused = other.restore(host.name_there)
    assert refused.code is Exit.PREFLIGHT
    assert f"of environment {ENV}, this is icds_new_staging" in refused.error
    assert f"--from-env {ENV}" in refused.error
    assert other.restore(host.name_there, from_env="icds_new_staging").code is Exit.PREFLIGHT
    assert other.restore(host.name_there, from_env=ENV, plan_only=True).code is Exit.OK
    assert_nothing_changed(host)


@pytest.mark.postgres14
def test_another_major_version_is_refused(host: Backed, fresh_pg: Callable[..., PostgresServer]) -> None:
    configured = host.but(options={"version": "14"}).restore()
    assert configured.code is Exit.PREFLIGHT
    assert "postgresql_version says 14" in configured.error
    older = Host(fresh_pg(14, start=False))
    before = tree(older.data)
    done = older.restore(str(host.artifact))
    assert done.code is Exit.PREFLIGHT
    assert f"of PostgreSQL 15, {older.data} holds 14" in done.error
    assert "--target-dir" in done.error
    assert tree(older.data) == before


def test_latest_of_several_hosts_is_ambiguous(host: Backed) -> None:
    other = host.but(name="pg1").good_backup("manual", upload=False).manifest["name"]
    try:
        refused = host.restore(plan_only=True)
        assert refused.code is Exit.PREFLIGHT
        assert "several hosts have backups of postgres: pg0, pg1" in refused.error
        assert "--host pg0" in refused.error
        for name in ("pg0", "pg1"):
            plan = host.restore(select={"host": name}, plan_only=True).of("plan")
            assert [p["from_host"] for p in plan] == [name]
        # A rebuilt host has another name: its own is never looked at.
    finally:
        (host.backups / other).unlink()
        (host.backups / f".{other}.json").unlink()
    assert host.but(name="rebuilt").restore(plan_only=True).of("plan")[0]["from_host"] == "pg0"


def test_a_restore_waits_for_no_backup_that_runs(host: Backed) -> None:
    with StoreLock(host.backups, "20261122T000002Z-pg0-postgres", "backup"):
        done = host.restore()
    assert done.code is Exit.LOCKED
    assert "20261122T000002Z-pg0-postgres (backup)" in done.error
    assert_nothing_changed(host)


# What may go wrong


def test_a_damaged_backup_is_noticed_before_anything_is_touched(host: Backed) -> None:
    path = host.artifact
    whole = path.read_bytes()
    try:
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        done = host.restore(select={"source": "local"})
    finally:
        path.write_bytes(whole)
    assert done.code is Exit.BAD_BACKUP
    assert f"{path.name} is damaged" in done.error
    assert_nothing_changed(host)


@pytest.mark.root
def test_a_backup_that_the_servers_user_cannot_read_is_told(host: Backed, tmp_path: Path) -> None:
    # Root copied it into its own home, with another user's ownership.
    name, manifest = host.artifact.name, f".{host.artifact.name}.json"
    for each in (name, manifest):
        shutil.copy(host.backups / each, tmp_path / each)
        os.chown(tmp_path / each, 12345, 12345)
    done = host.restore(str(tmp_path / name))
    assert done.code is Exit.PREFLIGHT
    assert f"user {host.server.os_user} cannot read {tmp_path / name}" in done.error
    assert "chown" in done.error
    assert_nothing_changed(host)
    # What is root's own is handed over open, wherever it lies.
    os.chown(tmp_path / name, 0, 0)
    assert host.restore(str(tmp_path / name)).code is Exit.OK


def test_data_that_do_not_start_are_rolled_back(host: Backed) -> None:
    conf = host.data / "postgresql.conf"
    good = conf.read_text()
    conf.write_text(good + "shared_buffers = 'nonsense'\n")
    name = host.good_backup("manual", upload=False).manifest["name"]
    conf.write_text(good)
    try:
        done = host.restore(name)
    finally:
        for path in (name, f".{name}.json"):
            (host.backups / path).unlink()
    assert done.code is Exit.RESTORE_ROLLED_BACK, done
    assert "the old data was put back" in done.error
    assert "The old data are serving" in done.error
    assert "nonsense" in done.error
    assert host.notes() == "before after"
    assert host.data.stat().st_ino == host.inode
    assert f"main.failed-{run_of(done)}" in host.beside()
    # Nothing is left that would keep the next one from working.
    assert host.restore(select={"source": "local"}).code is Exit.OK
    assert host.notes() == "before"


def test_an_answer_of_another_server_is_rolled_back(host: Backed, pg14: PostgresServer) -> None:
    done = host.but(options={"host": str(pg14.socket_dir), "port": pg14.port}).restore(disconnect=True)
    assert done.code is Exit.RESTORE_ROLLED_BACK, done
    assert "another server answers" in done.error
    assert host.notes() == "before after"


@pytest.fixture
def commands(host: Backed) -> Iterator[Callable[..., tuple[str, ...]]]:
    """Return a maker of stop and start commands: shell scripts with the server's own pg_ctl in ``$pg_ctl``."""
    become = (
        f"setpriv --reuid={host.server.os_user} --regid={host.server.os_user} --clear-groups "
        if IS_ROOT
        else ""
    )
    pg_ctl = f"{become}{host.server.bin_dir}/pg_ctl -D {host.data} -w -l {host.server.log}"
    with short_directory() as place:

        def make(name: str, body: str) -> tuple[str, ...]:
            path = place / name
            path.write_text(f'#!/bin/sh\npg_ctl="{pg_ctl}"\n{body}\n')
            path.chmod(0o755)
            return (str(path),)

        yield make


def test_a_roll_back_that_fails_says_where_everything_is(host: Backed, commands: Any) -> None:
    stop = commands("stop", "$pg_ctl -m fast stop")
    broken = host.but(store={"stop_command": stop, "start_command": commands("start", "echo no >&2; exit 1")})
    done = broken.restore()
    assert done.code is Exit.RESTORE_NEEDS_HANDS, done
    assert f"Old data: {host.data}." in done.error
    assert f"Restored data: {host.data}.failed-{run_of(done)}." in done.error
    assert "restore_backup postgres --undo" in done.error
    assert stop[0].replace("stop", "start") in done.error
    # When the cause is mended, the command that was named works.
    undone = host.undo()
    assert undone.code is Exit.OK, undone
    assert host.notes() == "before after"


def test_a_restore_that_was_killed_is_undone(host: Backed, commands: Any) -> None:
    stop = commands("stop", "$pg_ctl -m fast stop")
    killing = {"stop_command": stop, "start_command": commands("start", "kill -9 $PPID")}
    broken = host.but(store=killing)
    with broken.start_child("restore", host.restore_request()) as child:
        assert child.stdout is not None
        said = child.stdout.read().decode()
    assert child.returncode == -9, said
    run = next(n for n in host.beside() if n.startswith("main.before-")).removeprefix("main.before-")
    assert not host.server.running
    refused = host.restore()
    assert refused.code is Exit.PREFLIGHT
    assert "was interrupted (starting)" in refused.error
    assert not refused.of("plan"), "it was planned for nothing"
    assert "restore_backup postgres --undo" in refused.error
    planned = host.undo(plan_only=True)
    assert planned.of("plan")[0]["phase"] == "starting"
    assert not host.server.running
    done = host.undo()
    assert done.code is Exit.OK, done
    assert host.notes() == "before after"
    assert host.data.stat().st_ino == host.inode
    assert host.beside() == [".main.hq_backups-restore.json", "main", f"main.failed-{run}"]


def test_a_restore_that_was_killed_while_unpacking_leaves_nothing_for_long(host: Backed) -> None:
    with host.start_child("restore", host.restore_request()) as child:
        staging: list[Path] = []
        while not staging and child.poll() is None:
            staging = list(host.data.parent.glob(".main.hq_backups-staging-*/PG_VERSION"))
            time.sleep(0.001)
        child.kill()
    assert staging
    assert host.notes() == "before after"
    done = host.restore()
    assert done.code is Exit.OK, done
    assert "left by a restore that died" in str(done)
    assert not list(host.data.parent.glob(".main.hq_backups-staging-*"))


def test_there_is_nothing_to_undo_before_a_restore(host: Backed) -> None:
    done = host.undo()
    assert done.code is Exit.PREFLIGHT
    assert "there is no restore of" in done.error


@pytest.mark.slow
def test_a_server_that_asks_for_a_password_is_restored(fresh_pg: Callable[..., PostgresServer]) -> None:
    server = fresh_pg(15, auth="scram-sha-256", initdb_args=("--wal-segsize=1",))
    script(server, "CREATE TABLE note AS SELECT 'before' AS n;")
    host = Backed(server, options={"user": "postgres", "password": server.password})
    host.good_backup("daily")
    script(server, "INSERT INTO note VALUES ('after');")
    # The password of now is not the one of then: the restored server has the old one.
    script(server, "ALTER ROLE postgres PASSWORD 'of-now-4711';")
    wrong = host.but(options={"user": "postgres", "password": "of-now-4711"})
    done = wrong.restore(disconnect=True)
    assert done.code is Exit.RESTORE_ROLLED_BACK, done
    assert "does not let user postgres in" in done.error
    assert "of-now-4711" not in str(done)
    right = host.restore()
    assert right.code is Exit.OK, right
    assert host.notes() == "before"


@pytest.mark.root
def test_a_debian_cluster_is_backed_up_lost_and_restored(debian_cluster: DebianCluster) -> None:
    """Its configuration lies in /etc, not in the archive; its server is controlled by Debian's own tools."""
    script(debian_cluster, "CREATE TABLE note AS SELECT 'before' AS n;")
    host = Backed(debian_cluster, options={"bin_dir": None})
    taken = host.good_backup("daily")
    with tarfile.open(host.backups / taken.manifest["name"]) as tar:
        assert "postgresql.conf" not in tar.getnames()
    deep = host.verify(deep=True)
    assert deep.code is Exit.OK, deep
    script(debian_cluster, "INSERT INTO note VALUES ('after');")
    done = host.restore()
    assert done.code is Exit.OK, done
    assert f"PostgreSQL cluster 15 {debian_cluster.name}" in done.of("plan")[0]["facts"]["service"]
    assert host.notes() == "before"
    assert host.undo().code is Exit.OK
    assert host.notes() == "before after"
    debian_cluster.kill()
    shutil.rmtree(host.data)
    lost = host.restore()
    assert lost.code is Exit.OK, lost
    assert host.notes() == "before"
    assert host.data.owner() == debian_cluster.os_user
