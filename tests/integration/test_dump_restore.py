"""Dumps by hand, into other places, into running servers, and when something is wrong with them."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import shutil
import subprocess
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hq_backups.engine import crons
from hq_backups.engine.errors import CorruptBackup, Exit
from hq_backups.engine.events import Events
from hq_backups.engine.stores import open_store
from hq_backups.engine.streams import PlainReader
from tests.integration.pg_helpers import Host, script, servers_below, sha256, tree
from tests.integration.test_dump_roundtrip import assert_same, described, dumping
from tests.testbed.places import client_bin_dir
from tests.testbed.postgres import PostgresServer, write_settings
from tests.testbed.process import as_user, free_port

pytestmark = pytest.mark.postgres15
LONG = (pytest.mark.slow, pytest.mark.faults)
Fresh = Callable[..., PostgresServer]

CONTENTS = """
CREATE ROLE hq LOGIN PASSWORD 'geheim';
ALTER ROLE postgres PASSWORD 'of the source';
CREATE DATABASE hq OWNER hq;
\\connect hq
CREATE TABLE note (n text);
INSERT INTO note VALUES ('before'), ('again');
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out sync(2): it waits for whatever else this machine writes."""
    monkeypatch.setattr("os.sync", lambda: None)


@pytest.fixture(scope="module")
def home(services_dir: Path, pg_template: Callable[[int], Path]) -> Iterator[Host]:
    """Return a host that was dumped once; tests change neither its data nor that dump."""
    if reason := PostgresServer.unavailable(15):
        pytest.skip(reason)
    with PostgresServer(15, services_dir / "dumped", template=pg_template(15)) as server:
        script(server, CONTENTS)
        host = dumping(server)
        host.good_backup("daily")
        yield host


def serves_notes(server: PostgresServer, **where: Any) -> bool:
    return server.psql("SELECT count(*) FROM note", "hq", **where) == "2"


def manifest_of(host: Host) -> Path:
    return host.backups / f".{host.artifact.name}.json"


def test_gunzip_and_psql_by_hand_load_it(home: Host, fresh_pg: Fresh) -> None:
    server = fresh_pg(15)
    psql = f"psql -X -q -v ON_ERROR_STOP=0 -h {server.socket_dir} -p {server.port} -U postgres -d postgres"
    done = subprocess.run(
        ["sh", "-c", f"gunzip -c {home.artifact} | {server.client_bin_dir}/{psql}"],
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
    )
    errors = [line for line in done.stderr.splitlines() if "ERROR" in line]
    assert errors == ['ERROR:  role "postgres" already exists']
    assert_same(described(server), described(home.server))


def test_a_data_directory_of_one_s_own_is_made_and_starts(home: Host) -> None:
    target = home.server.workdir / "beside"
    done = home.restore(target_dir=target)
    assert done.code is Exit.OK, done.error
    assert servers_below(target) == []
    assert "loaded" in {c["name"] for c in done.of("check")}
    port = free_port()
    write_settings(
        target / "postgresql.conf", {"port": str(port), "unix_socket_directories": str(home.server.workdir)}
    )
    (target / "pg_hba.conf").write_text("local all all trust\n")
    pg_ctl = [home.server.bin_dir / "pg_ctl", "-D", target, "-w", "-l", home.server.workdir / "beside.log"]
    user = as_user(home.server.os_user)
    subprocess.run([*pg_ctl, "start"], check=True, cwd="/", stdout=subprocess.DEVNULL, **user)
    try:
        assert serves_notes(home.server, host=str(home.server.workdir), port=port)
    finally:
        subprocess.run(
            [*pg_ctl, "stop", "-m", "immediate"], check=True, cwd="/", stdout=subprocess.DEVNULL, **user
        )
        shutil.rmtree(target)


@pytest.mark.root
def test_a_lost_server_comes_back_on_its_port(fresh_pg: Fresh) -> None:
    server = fresh_pg(15)
    script(server, "CREATE DATABASE hq; ALTER SYSTEM SET work_mem = '9MB';")
    script(server, "ALTER SYSTEM SET primary_conninfo = 'password=geheim'; SELECT pg_reload_conf();")
    host = dumping(server)
    host.good_backup("daily")
    assert "geheim" not in manifest_of(host).read_text()
    server.kill()
    shutil.rmtree(server.data_dir)
    done = host.restore()
    assert done.code is Exit.OK, done.error
    assert "configuration" in done.warnings, "who may log in was not recorded"
    # Its own system user may log in by initdb's pg_hba.conf, at the port that the lost configuration named.
    assert server.psql("SELECT count(*) FROM pg_database WHERE datname = 'hq'") == "1"
    assert server.psql("SELECT current_setting('work_mem') || current_setting('primary_conninfo')") == "9MB"


@pytest.mark.slow
@pytest.mark.faults
def test_a_superuser_of_another_name_and_small_wal_segments_come_back(fresh_pg: Fresh) -> None:
    server = fresh_pg(15, initdb_args=("--username=-Chef x", "--wal-segsize=1", "--locale=C"), start=False)
    pg_ctl = [server.bin_dir / "pg_ctl", "-D", server.data_dir, "-w", "-l", server.log]
    user = as_user(server.os_user)
    subprocess.run([*pg_ctl, "start"], check=True, cwd="/", stdout=subprocess.DEVNULL, **user)
    host = dumping(server, options={"user": "-Chef x"})

    def ask(sql: str) -> str:
        where = [
            "-h",
            str(server.socket_dir),
            "-p",
            str(server.port),
            "--username=-Chef x",
            "-d",
            "postgres",
        ]
        argv = [server.client_bin_dir / "psql", "-X", "-A", "-t", "-q", "-w", *where, "-c", sql]
        return subprocess.run(
            argv, check=True, capture_output=True, text=True, cwd="/", **user
        ).stdout.strip()

    facts = (
        "SELECT string_agg(rolname, ',' ORDER BY rolname), current_setting('wal_segment_size'),"
        " (SELECT string_agg(datname || datcollate, ',' ORDER BY datname) FROM pg_database)"
        " FROM pg_roles WHERE rolname !~ '^pg_'"
    )
    ask("CREATE DATABASE hq TEMPLATE template0 LC_COLLATE 'C.UTF-8' LC_CTYPE 'C.UTF-8' ENCODING 'UTF8'")
    before = ask(facts)
    assert before.startswith("-Chef x|1MB|")
    done = host.good_backup("daily")
    assert done.manifest["source"]["cluster"]["bootstrap"] == "-Chef x"
    assert host.verify(deep=True).code is Exit.OK
    ask("DROP DATABASE hq")
    restored = host.restore()
    assert restored.code is Exit.OK, restored.error
    assert ask(facts) == before


def test_tablespaces_are_loaded_into_places_of_their_own(fresh_pg: Fresh) -> None:
    server = fresh_pg(15)
    live = server.workdir / "fast disk"
    live.mkdir()
    shutil.chown(live, server.os_user)
    script(
        server,
        f"""CREATE TABLESPACE "fa st" LOCATION '{live}';\n{CONTENTS}\nALTER TABLE note SET TABLESPACE "fa st";""",
    )
    host = dumping(server)
    host.good_backup("daily")
    script(server, "CHECKPOINT")
    before = tree(live)
    deep = host.verify(deep=True)
    assert deep.code is Exit.OK, deep.error
    done = host.restore()
    assert done.code is Exit.OK, done.error
    assert serves_notes(server)
    (plan,) = done.of("plan")
    ((number, place),) = plan["outer"].items()
    assert plan["facts"]["outer_names"] == {number: "fa st"}
    assert server.psql(
        "SELECT pg_tablespace_location(oid) FROM pg_tablespace WHERE spcname = 'fa st'"
    ) == str(place)
    assert server.psql("SELECT reltablespace <> 0 FROM pg_class WHERE relname = 'note'", "hq") == "t"
    assert tree(live) == before, "the live directory was touched"
    assert host.undo().code is Exit.OK
    assert serves_notes(server)


@pytest.mark.parametrize(
    "harm",
    [
        "refused",
        *(pytest.param(harm, marks=LONG) for harm in ("a-row-less", "no-end", "other-rows")),
    ],
)
def test_a_dump_that_is_damaged_changes_nothing(home: Host, harm: str) -> None:
    good, said = gzip.decompress(home.artifact.read_bytes()), json.loads(manifest_of(home).read_text())
    bad = {
        "a-row-less": good.replace(b"\nagain\n", b"\n"),
        "refused": good.replace(b"CREATE TABLE public.note", b"CREATE TABEL public.note"),
        "no-end": good[:-10],
        "other-rows": good,
    }[harm]
    assert harm == "other-rows" or bad != good
    if harm == "other-rows":
        said["source"]["rows"]["hq"]["public.note"] = 3
    packed = gzip.compress(bad, 1)
    name = home.artifact.name.replace("daily", "weekly")
    plain = {"plain_size": len(bad), "plain_sha256": sha256(bad)}
    said |= {
        "name": name,
        "type": "weekly",
        "run": "bad",
        "size": len(packed),
        "sha256": sha256(packed),
        **plain,
    }
    said["crc32"] = f"{zlib.crc32(packed):08x}"
    path, manifest = home.backups / name, home.backups / f".{name}.json"
    path.write_bytes(packed)
    manifest.write_text(json.dumps(said))
    for each in (path, manifest):
        shutil.chown(each, home.server.os_user)
    before, pid = home.beside(), home.server.pid
    try:
        verified = home.verify(name)
        assert verified.code is (Exit.OK if harm == "refused" else Exit.BAD_BACKUP), verified.error
        if harm != "refused":
            assert home.verify(name, deep=True).code is Exit.BAD_BACKUP
        restored = home.restore(name)
        assert restored.code is Exit.BAD_BACKUP, restored.error
        if harm == "refused":
            assert re.search(r'line \d+: syntax error at or near "TABEL"', restored.error)
    finally:
        path.unlink()
        manifest.unlink()
        for stray in home.backups.glob(f".{name}.*"):
            stray.unlink()
    assert home.server.pid == pid
    assert home.beside() == before
    assert serves_notes(home.server)


# Into a running server


@pytest.fixture
def elsewhere(home: Host, fresh_pg: Fresh) -> Callable[..., Host]:
    """Return a factory of hosts whose server's directory is not theirs; they see the one dump."""

    def make(**options: Any) -> Host:
        server = fresh_pg(15, **options)
        where = {"host": str(server.socket_dir), "port": server.port}
        if server.password:
            where |= {"host": "127.0.0.1", "password": server.password}
        store = {"mode": "dump", "data_dir": None, "backup_dir": home.backups, "os_user": server.os_user}
        return Host(server, options=where, store=store)

    return make


def test_an_empty_server_is_loaded_in_place(home: Host, elsewhere: Callable[..., Host]) -> None:
    host = elsewhere(auth="scram-sha-256")
    planned = host.restore(in_place=True, plan_only=True)
    assert planned.code is Exit.OK, planned.error
    assert "cannot be undone" in str(planned.of("plan")[0]["facts"])
    assert host.server.psql("SELECT count(*) FROM pg_database") == "3"
    done = host.restore(in_place=True)
    assert done.code is Exit.OK, done.error
    assert serves_notes(host.server), "and the password of the role that loaded it is still its own"


def test_a_server_that_is_not_empty_is_loaded_only_when_it_may_be_emptied(
    home: Host, elsewhere: Callable[..., Host]
) -> None:
    host = elsewhere()
    script(
        host.server,
        'CREATE ROLE hq; CREATE ROLE old; CREATE DATABASE "od d" OWNER old IS_TEMPLATE true; CREATE TABLE t (n int);',
    )
    refused = host.restore(in_place=True)
    assert refused.code is Exit.PREFLIGHT
    for word in ("'od d'", "tables in database 'postgres'", "--recreate"):
        assert word in refused.error
    assert host.server.psql("SELECT count(*) FROM t") == "0"
    done = host.restore(in_place=True, recreate=True)
    assert done.code is Exit.OK, done.error
    assert "'od d'" in str(done.of("plan")[0]["facts"])
    found, before = described(host.server), described(home.server)
    for each in (found, before):
        # The role that loads keeps its own password.
        for part in ("", "globals"):
            each[part] = re.sub(r"(?m)^(role\|postgres\||ALTER ROLE postgres WITH).*$", "", each[part])
    assert_same(found, before)


@pytest.mark.slow
@pytest.mark.faults
def test_one_version_is_not_loaded_into_another(home: Host, fresh_pg: Fresh) -> None:
    server = fresh_pg(14)
    where = {"host": str(server.socket_dir), "port": server.port}
    store = {"mode": "dump", "data_dir": None, "backup_dir": home.backups, "os_user": server.os_user}
    refused = Host(server, options=where, store=store).restore(in_place=True)
    assert refused.code is Exit.PREFLIGHT
    assert "of PostgreSQL 15" in refused.error


# Without a manifest


@pytest.mark.parametrize("clean", [pytest.param(clean, marks=LONG) for clean in (False, True)])
def test_what_pg_dumpall_wrote_is_described_and_loads(home: Host, clean: bool, tmp_path: Path) -> None:
    server = home.server
    where = ["-h", str(server.socket_dir), "-p", str(server.port), "-U", "postgres", "-w"]
    argv = [client_bin_dir(15) / "pg_dumpall", *where, *(["--clean", "--if-exists"] if clean else [])]
    path = home.backups / "postgres_icds_new_prod_weekly_2026_11_01.gz"
    path.write_bytes(gzip.compress(subprocess.run(argv, check=True, capture_output=True).stdout))
    shutil.chown(path, server.os_user)
    target = server.workdir / "described"
    try:
        done = home.restore(path.name, target_dir=target)
        assert done.code is Exit.OK, done.error
        assert home.verify(path.name, deep=True).code is Exit.OK
    finally:
        path.unlink()
        shutil.rmtree(target, ignore_errors=True)


def test_an_empty_dump_is_no_backup(home: Host) -> None:
    store = open_store(home.config, "postgres")
    source = io.BytesIO(gzip.compress(b""))
    plain = PlainReader(source, "gzip", "none")
    with pytest.raises(CorruptBackup, match="it is empty"):
        store.walk(plain, None, Events(lambda event: None, "run"))
    plain.close()


def test_the_password_is_in_no_argv(home: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    from hq_backups.engine import child

    seen: list[str] = []
    real = child.Child.__init__

    def watched(self: Any, argv: Any, **options: Any) -> None:
        seen.append(" ".join(map(str, argv)))
        real(self, argv, **options)

    monkeypatch.setattr(child.Child, "__init__", watched)
    host = home.but(options={"password": "sehr-geheim"})
    done = host.backup("hourly")
    assert done.code is Exit.OK, done.error
    assert any("pg_dumpall" in words for words in seen)
    assert not [words for words in seen if "sehr-geheim" in words]
    assert "sehr-geheim" not in str(done) + os.environ.get("PGPASSWORD", "")
    for path in host.backups.glob("*_hourly_*"):
        path.unlink()


def test_an_old_cron_job_is_told_by_backup_and_plan(
    home: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crons, "CRON_DIR", tmp_path)
    (tmp_path / "backup_postgres").write_text("0 0 * * * postgres create_postgres_dump.sh daily 2\n")
    assert "old-cron" in home.backup("daily", dry_run=True).warnings
    (plan,) = home.restore(plan_only=True).of("plan")
    assert str(tmp_path / "backup_postgres") in plan["facts"]["old_cron"]
    (tmp_path / "backup_postgres").unlink()
    assert "old-cron" not in home.backup("daily", dry_run=True).warnings
    (plan,) = home.restore(plan_only=True).of("plan")
    assert "old_cron" not in plan["facts"]
