"""Archives without a manifest, as CommCare's scripts have made them since 2016: found, checked, restored."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from hq_backups.engine.errors import Exit
from hq_backups.engine.requests import PruneRequest
from tests.integration.pg_helpers import Host, copy_tree, remove, script
from tests.testbed.places import server_user
from tests.testbed.postgres import SUPERUSER, PostgresServer
from tests.testbed.process import as_user, free_port, give, short_directory
from tests.testbed.s3 import S3Service

pytestmark = pytest.mark.postgres15

STEM = "postgres_icds_new_prod_daily_2019_03_04"
UNKNOWN = {"from_env": "unknown"}
LONG = (pytest.mark.slow, pytest.mark.faults)
"""More of the same, for which the short run has no time."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out sync(2): it waits for whatever else this machine writes."""
    monkeypatch.setattr("os.sync", lambda: None)


def run(server: PostgresServer, *argv: str | Path, **options: Any) -> bytes:
    """Run a program as the server's user."""
    done = subprocess.run(
        [str(word) for word in argv],
        check=False,
        capture_output=True,
        cwd="/",
        **as_user(server.os_user),
        **options,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def base_backup(server: PostgresServer, target: Path, *options: str) -> Path:
    """Take a base backup with the server's own program."""
    connection = ["-h", str(server.socket_dir), "-p", str(server.port), "-U", SUPERUSER, "-w", "-c", "fast"]
    run(server, server.client_bin_dir / "pg_basebackup", "-D", target, *connection, *options)
    return target


@dataclass(repr=False)
class Old(Host):
    """A host with what the scripts of all years made of its data when their note was ``before``."""

    made: dict[str, Path] = field(default_factory=dict)
    inode: int = 0

    def notes(self) -> str:
        return self.server.psql("SELECT string_agg(n, ' ' ORDER BY n DESC) FROM note")

    @property
    def pristine(self) -> Path:
        return self.server.workdir / "pristine"

    @property
    def store_room(self) -> Path:
        return self.server.workdir / "made"

    @property
    def untouched(self) -> bool:
        there = self.data.is_dir() and self.data.stat().st_ino == self.inode
        return there and self.server.running and self.beside() == ["main"]

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

    def offer(self, what: str, name: str) -> Path:
        """Put one of the archives into the backup directory under a name of its day."""
        path = self.backups / name
        copy_tree(self.made[what], path)
        give(path, self.server.os_user)
        return path

    def put(self, what: str, key: str) -> str | None:
        """Put one of the archives into the bucket as the scripts did; return its version."""
        assert self.s3 is not None
        body = self.made[what].read_bytes()
        done = self.s3.client().put_object(
            Bucket=self.bucket, Key=key, Body=body, ServerSideEncryption="AES256"
        )
        version: str | None = done.get("VersionId")
        return version


def make_all(server: PostgresServer, room: Path) -> dict[str, Path]:
    """Make one archive of each kind, with the programs and options of its scripts."""
    room.mkdir()
    give(room, server.os_user)
    made: dict[str, Path] = {}
    wrapped = room / "x" / "opt" / "data" / "backups" / "postgresql"
    wrapped.mkdir(parents=True)
    for path in (room / "x").rglob("*"):
        give(path, server.os_user)
    made["directory"] = base_backup(server, wrapped / STEM, "-Fp", "-Xs")
    made["today"] = room / "today.tar.gz"
    tar("-zcf", made["today"], "-C", room / "x", f"opt/data/backups/postgresql/{STEM}")
    made["2016"] = room / "2016.tar.bz"
    tar("-jcf", made["2016"], "-C", made["directory"], ".")
    made["2017-06"] = room / "2017-06.tar.gz"
    tar("-zcf", made["2017-06"], "-C", made["directory"], ".")
    made["2017-11"] = base_backup(server, room / "t", "-Ft", "-Z9", "-Xf") / "base.tar.gz"
    login = ("-h", server.socket_dir, "-p", str(server.port), "-U", SUPERUSER, "-w")
    for kind, options in {"dump": (), "dump 2016": ("--clean",)}.items():
        sql = run(server, server.client_bin_dir / "pg_dumpall", *login, *options)
        made[kind] = room / f"{kind.replace(' ', '-')}.gz"
        made[kind].write_bytes(gzip.compress(sql, 6, mtime=0))
    made["standby"] = standby_backup(server, room)
    return made


def tar(*arguments: str | Path) -> None:
    subprocess.run(["tar", *map(str, arguments)], check=True, capture_output=True)


def standby_backup(server: PostgresServer, room: Path) -> Path:
    """Take an archive from a standby that follows the server."""
    with short_directory(server_user()) as place:
        standby = PostgresServer(15, place / "s")
        standby.workdir.mkdir()
        standby.workdir.chmod(0o755)
        give(standby.workdir, standby.os_user)
        base_backup(server, standby.data_dir, "-Fp", "-Xs", "-R")
        # Not in its configuration, which is in the archive: another server must find nothing of this one there.
        standby.port = free_port()
        place_of = f"-p {standby.port} -c unix_socket_directories={standby.socket_dir}"
        pg_ctl = [standby.bin_dir / "pg_ctl", "-s", "-D", standby.data_dir]
        try:
            run(server, *pg_ctl, "start", "-l", standby.log, "-o", place_of)
            assert standby.psql("SELECT pg_is_in_recovery()") == "t"
            wrapped = room / "s" / "opt" / "data" / "backups" / "postgresql"
            wrapped.mkdir(parents=True)
            for path in (room / "s").rglob("*"):
                give(path, server.os_user)
            base_backup(standby, wrapped / STEM, "-Fp", "-Xs")
        finally:
            standby.remove()
    tar("-zcf", room / "standby.tar.gz", "-C", room / "s", f"opt/data/backups/postgresql/{STEM}")
    return room / "standby.tar.gz"


@pytest.fixture(scope="module")
def home(services_dir: Path, s3: S3Service) -> Iterator[Old]:
    from tests.conftest import require_service

    reason = PostgresServer.unavailable(15)
    require_service("PostgreSQL 15", not reason, reason)
    bucket = s3.make_bucket(versioned=True)
    # Small WAL segments: half of an empty cluster is WAL.
    server = PostgresServer(15, services_dir / "old", initdb_args=("--wal-segsize=1",))
    server.data_dir = server.workdir / "pg" / "15" / "main"
    with server:
        script(server, "CREATE TABLE note (n text); INSERT INTO note VALUES ('before');")
        host = Old(server, s3, bucket)
        host.made = make_all(server, host.store_room)
        server.stop()
        # The page's own command, but for the place: tar takes the slash from an absolute path.
        host.made["before restore"] = host.store_room / "postgres_data_before_restore.tar.gz"
        tar("-czf", host.made["before restore"], server.data_dir)
        server.start()
        script(server, "INSERT INTO note VALUES ('after');")
        server.stop()
        copy_tree(server.data_dir, host.pristine)
        yield host
    s3.remove_bucket(bucket)


@pytest.fixture
def host(home: Old) -> Iterator[Old]:
    """Return the host, its server running on the data of now, nothing in its backup directory."""
    for path in home.backups.iterdir():
        remove(path)
    if not home.untouched:
        home.make_data()
    yield home
    assert not any(home.backups.glob(".verify-*"))


def assert_restored(host: Old, done: Any) -> Mapping[str, Any]:
    """Check that the data of then are served, by a primary; return the plan."""
    assert done.code is Exit.OK, done
    assert host.notes() == "before"
    assert host.server.psql("SELECT pg_is_in_recovery()") == "f"
    assert not {"standby.signal", "recovery.conf"} & {p.name for p in host.data.iterdir()}
    (plan,) = done.of("plan")
    return dict(plan)


LOCAL = {
    "2016": ("2016", "postgres_weekly_2016_10_02.tar.bz", UNKNOWN),
    "2017-06": ("2017-06", "postgres_daily_2017_07_01.tar.gz", UNKNOWN),
    "2017-11": ("2017-11", "postgres_icds_new_prod_daily_2017_12_24.tar.gz", {}),
    "2018 directory": ("directory", STEM, {}),
    "today": ("today", f"{STEM}.tar.gz", {}),
    "today, hourly": ("today", "postgres_icds_new_prod_hourly_2026_08_22_03.tar.gz", {}),
    "of a standby": ("standby", f"{STEM}.tar.gz", {}),
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=LONG if case in ("2017-06", "today, hourly") else ()) for case in LOCAL]
)
def test_a_file_of_each_year_is_listed_and_restored(host: Old, case: str) -> None:
    what, name, options = LOCAL[case]
    host.offer(what, name)
    (listed,) = host.catalog("local")
    assert (listed["name"], listed["managed"], listed["run"], listed["mode"]) == (name, False, None, "plain")
    assert listed["env"] == (None if options else host.env)
    assert listed["problem"] is None
    plan = assert_restored(host, host.restore(name, **options))
    assert plan["from_env"] == (host.env if not options else "unknown")
    if case == "2018 directory":
        assert plan["source"] == str(host.backups / name)
    if case == "2016":
        undone = host.undo()
        assert undone.code is Exit.OK, undone
        assert host.notes() == "before after"
    auto = (host.data / "postgresql.auto.conf").read_text()
    assert "primary_conninfo" not in auto


@pytest.fixture
def in_bucket(home: Old) -> Iterator[None]:
    """Empty the bucket after the test."""
    yield
    assert home.s3 is not None
    assert home.bucket is not None
    home.s3.remove_bucket(home.bucket)
    home.s3.make_bucket(home.bucket, versioned=True)


def test_an_older_version_of_a_fixed_key_is_restored(host: Old, in_bucket: None) -> None:
    key = "postgres_daily_ip-10-0-0-1.tar.gz"
    good = host.put("today", key)
    host.made["newer"] = host.store_room / "newer"
    host.made["newer"].write_bytes(b"not the one that is meant")
    newer = host.put("newer", key)
    listed = host.catalog("s3")
    assert [(e["name"], e["host"], e["env"], e["managed"]) for e in listed] == [
        (key, "ip-10-0-0-1", None, False)
    ] * 2
    assert {e["locations"][0]["version_id"] for e in listed} == {good, newer}
    plan = assert_restored(
        host, host.restore(key, select={"source": "s3", "version_id": good}, from_env="unknown")
    )
    assert plan["source"] == f"s3://{host.bucket}/{key} (version {good})"
    assert plan["from_host"] == "ip-10-0-0-1"
    newest = host.verify(key)
    assert newest.code is Exit.BAD_BACKUP
    assert "it begins with 'not the one that'" in newest.error


def test_the_key_of_two_days_without_an_extension(host: Old, in_bucket: None) -> None:
    host.put("today", "postgres_daily")
    host.put("today", "pgbackrest/archive/backups3/postgres_daily_pg0.tar.gz")
    (listed,) = host.catalog("s3")
    assert (listed["name"], listed["type"]) == ("postgres_daily", "daily")
    assert_restored(host, host.restore("postgres_daily", from_env="unknown"))


KEY_2016 = "/opt/data/backups/postgresql/postgres_weekly_2016_10_02.tar.bz"


@pytest.mark.parametrize("service", ["moto_server", pytest.param("versitygw", marks=LONG)])
def test_a_whole_path_as_key(host: Old, service: str, request: pytest.FixtureRequest) -> None:
    """A service that keeps objects as files drops the leading slash; others keep it."""
    s3: S3Service = request.getfixturevalue(service)
    bucket = s3.make_bucket(versioned=True)
    there = host.but(s3=s3, bucket=bucket, made=host.made, inode=host.inode)
    there.put("2016", KEY_2016)
    (listed,) = there.catalog("s3")
    assert listed["name"].removeprefix("/") == KEY_2016[1:]
    assert listed["type"] == "weekly"
    checked = there.verify(KEY_2016)
    assert checked.code is Exit.OK, checked
    assert_restored(there, there.restore(KEY_2016, from_env="unknown"))
    s3.remove_bucket(bucket)


def test_the_local_file_is_read_rather_than_its_upload(host: Old, in_bucket: None) -> None:
    name = f"{STEM}.tar.gz"
    host.offer("today", name)
    host.put("today", name)
    for source, begins in ((None, "/"), ("local", "/"), ("s3", "s3://")):
        done = host.restore(name, select={"source": source}, plan_only=True)
        assert done.of("plan")[0]["source"].startswith(begins), done


def test_a_file_or_directory_anywhere_under_any_name(host: Old) -> None:
    """The page's own safety copy: of a stopped server, so without a backup_label, and with a path in front."""
    refused = host.restore(str(host.made["before restore"]))
    assert refused.code is Exit.PREFLIGHT
    assert "--from-env unknown" in refused.error
    done = host.restore(str(host.made["before restore"]), from_env="unknown")
    plan = assert_restored(host, done)
    assert "no-file-list" in done.warnings
    assert "hot-copy" not in done.warnings
    assert plan["surveyed"]["source"]["root"] == str(host.data)[1:]
    beside = host.server.workdir / "looked at"
    looked = host.restore(str(host.made["directory"]), target_dir=beside)
    assert looked.code is Exit.OK, looked
    assert (beside / "PG_VERSION").read_text() == "15\n"
    remove(beside)


def test_a_copy_of_a_data_directory_in_use_is_warned_about(host: Old) -> None:
    path = host.backups / f"{STEM}.tar.gz"
    subprocess.run(["tar", "-Pzcf", path, host.data], check=False, capture_output=True)
    done = host.verify(path.name)
    assert done.code is Exit.OK, done
    assert {"hot-copy", "no-manifest"} <= done.warnings
    give(path, host.server.os_user)
    beside = host.server.workdir / "looked at"
    assert host.restore(path.name, target_dir=beside).code is Exit.OK
    assert not (beside / "postmaster.pid").exists()
    assert (beside / "global" / "pg_control").exists()
    remove(beside)


@pytest.mark.parametrize(
    "what",
    ["today", "directory", *(pytest.param(w, marks=LONG) for w in ("2016", "standby", "before restore"))],
)
def test_verify_says_what_could_be_checked(host: Old, what: str) -> None:
    done = host.verify(str(host.made[what]))
    assert done.code is Exit.OK, done
    assert "no-manifest" in done.warnings
    (check,) = done.of("check")
    assert "whole to the end; mode plain, version 15" in check["message"]
    assert ("begun 20" in check["message"]) is (what != "before restore")


@pytest.mark.parametrize(
    "what", ["directory", *(pytest.param(what, marks=LONG) for what in ("2017-11", "standby"))]
)
def test_verify_deep_starts_a_server_on_it(host: Old, what: str) -> None:
    name = STEM if what == "directory" else f"{STEM}.tar.gz"
    host.offer(what, name)
    done = host.verify(name, deep=True)
    assert done.code is Exit.OK, done
    checks = {c["name"] for c in done.of("check")}
    # pg_basebackup wrote its list of the files beside the tar, not into it.
    listed = set() if what == "2017-11" else {"pg_verifybackup"}
    assert checks == {"archive", "contents", *listed}
    assert ("no-file-list" in done.warnings) is (not listed)


def test_what_the_plan_read_is_not_read_again(host: Old) -> None:
    name = f"{STEM}.tar.gz"
    path = host.offer("today", name)
    (plan,) = host.restore(name, plan_only=True).of("plan")
    confirmed = {"surveyed": plan["surveyed"], "expected_sha256": plan["sha256"]}
    beside = host.server.workdir / "looked at"
    done = host.restore(name, target_dir=beside, **confirmed)
    assert done.code is Exit.OK, done
    assert "survey" not in {s["name"] for s in done.of("step")}
    remove(beside)

    # The same size, other bytes: found out while it is unpacked.
    raw = bytearray(path.read_bytes())
    raw[4:8] = b"\1\2\3\4"
    path.write_bytes(raw)
    changed = host.restore(name, target_dir=beside, **confirmed)
    assert changed.code is Exit.BAD_BACKUP, changed
    assert "its sha256 is" in changed.error
    assert not beside.exists()
    # Another size: read again, and not the one that was confirmed.
    with path.open("ab") as file:
        file.write(gzip.compress(b""))
    other = host.restore(name, **confirmed)
    assert other.code is Exit.PREFLIGHT, other
    assert "another backup is meant" in other.error
    assert host.untouched


@pytest.mark.root
def test_a_directory_that_the_servers_user_cannot_read_is_told(host: Old) -> None:
    path = host.backups / STEM
    (path / "global").mkdir(parents=True)
    for name in ("PG_VERSION", "global/pg_control"):
        (path / name).write_bytes(b"x")
        (path / name).chmod(0o600)
    done = host.restore(STEM)
    assert done.code is Exit.PREFLIGHT, done
    assert f"chown -R {host.server.os_user} {path}" in done.error
    assert host.untouched


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("version", [14, 18])
def test_other_versions_are_verified_by_starting_them(
    version: int, request: pytest.FixtureRequest, short_tmp: Path
) -> None:
    server: PostgresServer = request.getfixturevalue(f"pg{version}")
    backups = short_tmp / "backups"
    backups.mkdir(mode=0o700)
    give(backups, server.os_user)
    base_backup(server, short_tmp / "opt" / STEM, "-Fp", "-Xs")
    tar("-zcf", backups / f"{STEM}.tar.gz", "-C", short_tmp, f"opt/{STEM}")
    login = ("-h", server.socket_dir, "-p", str(server.port), "-U", SUPERUSER, "-w")
    sql = run(server, server.client_bin_dir / "pg_dumpall", *login)
    (backups / f"{STEM}.gz").write_bytes(gzip.compress(sql, 1))
    for path in backups.iterdir():
        give(path, server.os_user)
    host = Host(server, store={"backup_dir": backups})
    for name in (f"{STEM}.tar.gz", f"{STEM}.gz"):
        done = host.verify(name, deep=True)
        assert done.code is Exit.OK, done
        assert {"archive", "contents"} <= {c["name"] for c in done.of("check")}


def test_old_files_of_other_kinds_than_todays_are_never_pruned(host: Old) -> None:
    kept = [f"postgres_weekly_2016_10_{day}.tar.bz" for day in ("02", "09")]
    kept += ["postgres_2016_02_03.db.gz", "postgres_2016_02_04.db.gz"]
    kept += [f"postgres_daily_2017_07_0{day}.tar.gz" for day in (1, 2, 3)]
    for name in kept:
        (host.backups / name).write_bytes(b"x")
    for day in ("04", "05"):
        kept.append(f"postgres_icds_new_prod_daily_2018_03_{day}")
        (host.backups / kept[-1] / "global").mkdir(parents=True)
    old = [f"postgres_icds_new_prod_daily_2026_08_{day}.tar.gz" for day in (10, 11, 12)]
    for name in old:
        (host.backups / name).write_bytes(b"x")
    for number, name in enumerate([*kept, *old]):
        os.utime(host.backups / name, (number + 1, number + 1))
    done = host.run("prune", PruneRequest("postgres", manual_older_than=1))
    assert done.code is Exit.OK, done
    # Today's kind goes by the rule of today's scripts, but for its newest one.
    assert {str(p["name"]) for p in done.of("pruned")} == set(old[:2])
    assert {p.name for p in host.backups.iterdir()} == {*kept, old[2]}


# Damage


def half_directory(host: Old, path: Path) -> None:
    path.mkdir()
    (path / "PG_VERSION").write_text("15\n")


def cut(what: str, part: float) -> Any:
    def make(host: Old, path: Path) -> None:
        raw = host.made[what].read_bytes()
        path.write_bytes(raw[: int(len(raw) * part)])

    return make


def write(content: bytes) -> Any:
    return lambda host, path: path.write_bytes(content)


def packed(*arguments: str) -> Any:
    """Return a maker of a tar of some of the base backup's files."""

    def make(host: Old, path: Path) -> None:
        tar("-zcf", path, "-C", host.made["directory"], *arguments)

    return make


def cut_tar(host: Old, path: Path) -> None:
    plain = gzip.decompress(host.made["2017-06"].read_bytes())
    path.write_bytes(gzip.compress(plain[: len(plain) // 2], 1))


def of_a_link(host: Old, path: Path) -> None:
    (host.store_room / "link").unlink(missing_ok=True)
    (host.store_room / "link").symlink_to(host.made["directory"])
    tar("-zcf", path, "-C", host.store_room, "link")


def with_tablespaces(host: Old, path: Path) -> None:
    place = host.store_room / "ts"
    place.mkdir(exist_ok=True)
    (place / "tablespace_map").write_text("16385 /srv/fast disk\n")
    tar("-zcf", path, "-C", host.made["directory"], ".", "-C", place, "./tablespace_map")


def with_link(host: Old, path: Path) -> None:
    place = host.store_room / "linked"
    place.mkdir(exist_ok=True)
    (place / "log").symlink_to("/var/log")
    tar("-zcf", path, "-C", host.made["directory"], ".", "-C", place, "./log")


def several(host: Old, path: Path) -> None:
    base = host.made["directory"].parent
    plain = host.store_room / "several.tar"
    for name in "ab":
        mode = "-cf" if name == "a" else "-rf"
        tar(mode, plain, f"--transform=s,^{STEM},{name},", "-C", base, STEM)
    path.write_bytes(gzip.compress(plain.read_bytes(), 1))


DAMAGE = {
    "empty file": (write(b""), "it is an empty file"),
    "failed dump": (write(gzip.compress(b"", mtime=0)), "an empty stream"),
    "cut gzip": (cut("today", 0.6), "it ends before its compressed stream does"),
    "cut bzip2": (cut("2016", 0.6), "it ends before its compressed stream does"),
    "cut tar": (cut_tar, "it ends in the middle of a file"),
    "not an archive": (write(b"hello, world"), "it begins with 'hello, world'"),
    "custom dump": (write(b"PGDMP\1\2\3" * 99), "a dump of one database"),
    "dump of one": (write(b"--\n-- PostgreSQL database dump\n--\n"), "a dump of one database"),
    "no control file": (packed("--exclude=pg_control", "."), "global/pg_control is not in it"),
    "no version": (packed("--exclude=PG_VERSION", "."), "PG_VERSION is not in it"),
    "no WAL": (packed("--exclude=0000*", "./PG_VERSION", "./global", "./backup_label"), "no WAL is in it"),
    "a link": (of_a_link, "a symbolic link and nothing else"),
    "tablespaces": (with_tablespaces, "16385 /srv/fast disk"),
    "a link in it": (with_link, "log is neither file nor directory"),
    "several": (several, "it holds several clusters: a, b"),
    "half directory": (half_directory, "global/pg_control is not in it"),
}


WITHOUT_SERVER = {
    "no control file",
    "no version",
    "no WAL",
    "a link",
    "tablespaces",
    "a link in it",
    "several",
}
"""These are made up in tests/unit/test_old.py too."""


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=LONG if case in WITHOUT_SERVER else ()) for case in DAMAGE]
)
def test_what_is_not_whole_is_refused_with_the_cause(host: Old, case: str) -> None:
    make, says = DAMAGE[case]
    name = STEM if case == "half directory" else f"{STEM}.tar.gz"
    path = host.backups / name
    make(host, path)
    give(path, host.server.os_user)
    for done in (host.verify(name), host.restore(name)):
        assert done.code is Exit.BAD_BACKUP, done
        assert says in done.error, done.error
        assert done.of("error")[0]["hint"]
    assert host.untouched


def test_another_version_is_refused_before_anything_is_changed(host: Old) -> None:
    place = host.store_room / "v96"
    place.mkdir()
    (place / "PG_VERSION").write_text("9.6\n")
    parts = ["-C", host.made["directory"], "backup_label", "global", "pg_wal", "-C", place, "PG_VERSION"]
    tar("-zcf", host.backups / f"{STEM}.tar.gz", *parts)
    assert host.verify(f"{STEM}.tar.gz").code is Exit.OK
    done = host.restore(f"{STEM}.tar.gz")
    assert done.code is Exit.PREFLIGHT, done
    assert "of version 9 on this host" in done.error
    assert host.untouched


def test_a_manifest_that_claims_to_be_none_is_not_believed(host: Old, in_bucket: None) -> None:
    taken = host.good_backup("daily")
    path = host.backups / f".{taken.manifest['name']}.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "run": "unmanaged-0123456789abcdef"}))
    done = host.restore(str(taken.manifest["name"]), select={"source": "local"})
    assert done.code is Exit.BAD_BACKUP, done
    assert "says that it has none" in done.error


def test_an_object_whose_manifest_is_damaged_is_not_taken_for_an_old_scripts(
    host: Old, in_bucket: None
) -> None:
    assert host.s3 is not None
    taken = host.good_backup("daily")
    host.s3.client().put_object(Bucket=host.bucket, Key=f"{taken.key}.manifest.json", Body=b'{"schema": 99}')
    for version in host.s3.client().list_object_versions(Bucket=host.bucket)["Versions"]:
        if version["Key"].endswith(".json") and not version["IsLatest"]:
            host.s3.client().delete_object(
                Bucket=host.bucket, Key=version["Key"], VersionId=version["VersionId"]
            )
    done = host.restore(taken.key, select={"source": "s3"}, plan_only=True)
    assert done.code is Exit.BAD_BACKUP, done
    assert "newer hq_backups" in done.error


# Dumps


DUMPS = {
    "today": ("dump", "postgres_icds_new_prod_daily_2026_08_22.gz", {}),
    "2016 --clean": ("dump 2016", "postgres_2016_02_03.db.gz", UNKNOWN),
    "2016, with a type": ("dump 2016", "postgres_weekly_2016_07_03.db.gz", UNKNOWN),
    # The name says tar: what is in it counts.
    "under a tar's name": ("dump", f"{STEM}.tar.gz", {}),
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if "--clean" in case else LONG) for case in DUMPS]
)
def test_a_dump_is_listed_and_restored(host: Old, case: str) -> None:
    what, name, options = DUMPS[case]
    host.offer(what, name)
    (listed,) = host.catalog("local")
    assert (listed["managed"], listed["env"]) == (False, None if options else host.env)
    done = host.restore(name, **options)
    plan = assert_restored(host, done)
    assert plan["surveyed"]["mode"] == "dump"


def test_a_dump_in_the_bucket_is_restored(host: Old, in_bucket: None) -> None:
    host.put("dump", "postgres_daily_pg0.gz")
    host.put("dump 2016", "postgres_weekly")
    assert {e["name"] for e in host.catalog("s3")} == {"postgres_daily_pg0.gz", "postgres_weekly"}
    assert_restored(host, host.restore("postgres_daily_pg0.gz", from_env="unknown"))
    checked = host.verify("postgres_weekly", select={"source": "s3"})
    assert checked.code is Exit.OK, checked


def test_a_dump_is_verified_by_loading_it(host: Old) -> None:
    host.offer("dump", f"{STEM}.gz")
    done = host.verify(f"{STEM}.gz", deep=True)
    assert done.code is Exit.OK, done
    assert {"archive", "contents"} <= {c["name"] for c in done.of("check")}
    assert "no-manifest" in done.warnings


def test_a_dump_that_was_cut_is_refused(host: Old) -> None:
    sql = gzip.decompress(host.made["dump"].read_bytes())
    path = host.backups / f"{STEM}.gz"
    path.write_bytes(gzip.compress(sql[: sql.rindex(b"-- PostgreSQL database cluster dump complete")]))
    give(path, host.server.os_user)
    for done in (host.verify(path.name), host.restore(path.name)):
        assert done.code is Exit.BAD_BACKUP, done
        assert "complete" in done.error or "completion" in done.error, done.error
    assert host.untouched
