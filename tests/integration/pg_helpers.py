"""A PostgreSQL host as the engine sees it: its server, its backup directory, its bucket, and what ran there."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hq_backups.engine.requests import Selection, VerifyRequest
from tests.integration.engine_host import ENV, EngineHost, Outcome
from tests.testbed.postgres import SUPERUSER, PostgresServer
from tests.testbed.process import alive, as_user
from tests.testbed.s3 import S3Service


@dataclass
class Host(EngineHost):
    """One host with a PostgreSQL server; everything of it is in ``server.workdir``."""

    store_name = "postgres"
    server: PostgresServer
    s3: S3Service | None = None
    bucket: str | None = None
    env: str = ENV
    name: str = "pg0"
    options: dict[str, Any] = field(default_factory=dict)
    store: dict[str, Any] = field(default_factory=dict)
    s3_settings: dict[str, Any] = field(default_factory=dict)

    @property
    def workdir(self) -> Path:
        return self.server.workdir

    @property
    def data(self) -> Path:
        return self.server.data_dir

    @property
    def os_user(self) -> str | None:
        return self.server.os_user

    def settings(self) -> dict[str, Any]:
        options = {"bin_dir": str(self.server.bin_dir), "port": self.server.port, **self.options}
        return {"mode": "plain", "options": options}

    def verify(
        self, name: str = "latest", *, select: Mapping[str, Any] | None = None, deep: bool = False
    ) -> Outcome:
        # As its user: no server runs as root.
        return self.run_as_owner("verify", VerifyRequest(Selection("postgres", name, **(select or {})), deep))

    def beside(self) -> list[str]:
        """Return what lies in the data directory's parent, but for locks."""
        ours = {"backups", "socket", "server.log", "pristine"}
        return sorted(
            p.name for p in self.data.parent.iterdir() if p.name not in ours and not p.name.endswith(".lock")
        )

    @property
    def system_identifier(self) -> str:
        return self.server.psql("SELECT system_identifier FROM pg_control_system()")


def script(server: PostgresServer, sql: str, dbname: str = "postgres") -> str:
    """Run several statements, each in its own transaction; return the rows, unaligned."""
    quoted = dbname.replace("\\", "\\\\").replace("'", "\\'")
    conninfo = f"host='{server.socket_dir}' port={server.port} user={SUPERUSER} dbname='{quoted}'"
    done = subprocess.run(
        [
            server.client_bin_dir / "psql",
            "-X",
            "-q",
            "-t",
            "-A",
            "-w",
            "-v",
            "ON_ERROR_STOP=1",
            "-d",
            conninfo,
        ],
        input=sql.encode(),
        capture_output=True,
        cwd="/",
        env={"PATH": os.defpath, "LC_ALL": "C.UTF-8", "PGPASSWORD": server.password},
        check=False,
        **as_user(server.os_user),
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().removesuffix("\n")


ODD_DATABASES = ('-it\'s "two words"', "dätä-ベース", r"a=b host=evil back\slash")

_CLUSTER = """
CREATE ROLE "hq user" LOGIN PASSWORD 'pa''ss:w\\ord';
CREATE ROLE "-rolle-ä" LOGIN PASSWORD 'geheim' CONNECTION LIMIT 7;
CREATE ROLE readers NOLOGIN;
GRANT readers TO "hq user";
CREATE DATABASE hq OWNER "hq user";
GRANT CONNECT ON DATABASE hq TO readers;
ALTER DATABASE hq SET work_mem = '5MB';
ALTER ROLE "hq user" SET statement_timeout = '10ms';
CREATE DATABASE no_connections ALLOW_CONNECTIONS false;
"""

_CONTENTS = """
CREATE SCHEMA "my schema" AUTHORIZATION "hq user";
CREATE TABLE "my schema"."Odd Table" (id serial PRIMARY KEY, doc jsonb, raw bytea, stamp timestamptz);
INSERT INTO "my schema"."Odd Table" (doc, raw, stamp)
  SELECT jsonb_build_object('n', n, 'ключ', repeat(md5(n::text), n % 90)), decode(md5(n::text), 'hex'),
    timestamptz '2026-11-22 00:00:00Z' + n * interval '1 minute' FROM generate_series(1, 3000) n;
CREATE INDEX ON "my schema"."Odd Table" USING gin (doc);
CREATE TABLE parts (day date, n int) PARTITION BY RANGE (day);
CREATE TABLE parts_2025 PARTITION OF parts FOR VALUES FROM ('2025-01-01') TO ('2026-01-01');
CREATE TABLE parts_2026 PARTITION OF parts FOR VALUES FROM ('2026-01-01') TO ('2027-01-01');
INSERT INTO parts SELECT date '2025-06-01' + n, n FROM generate_series(1, 400) n;
CREATE MATERIALIZED VIEW sums AS SELECT date_trunc('month', day) AS month, sum(n) FROM parts GROUP BY 1;
CREATE UNLOGGED TABLE cache AS SELECT n FROM generate_series(1, 50) n;
CREATE SEQUENCE counter START 41;
SELECT nextval('counter'), nextval('counter');
GRANT SELECT ON parts TO readers;
SELECT lo_from_bytea(4242, decode(repeat('c0ffee', 5000), 'hex')), lo_from_bytea(4243, '\\x00');
CREATE FUNCTION twice(n int) RETURNS int LANGUAGE sql AS 'SELECT n * 2';
"""
EXTENSIONS = ("hstore", "pgcrypto", "pg_trgm")


def fill(server: PostgresServer) -> None:
    """Make databases, roles and contents of every kind."""
    script(server, _CLUSTER)
    have = script(server, "SELECT name FROM pg_available_extensions").split()
    wanted = "".join(f"CREATE EXTENSION {e};\n" for e in EXTENSIONS if e in have)
    script(server, wanted + _CONTENTS, "hq")
    for number, name in enumerate(ODD_DATABASES):
        quoted = name.replace('"', '""')
        script(server, f'CREATE DATABASE "{quoted}";')
        script(server, f"CREATE TABLE t AS SELECT {number} AS n, repeat('x', 50) AS x;", name)


_CLUSTER_FACTS = """
SELECT 'role', rolname, rolpassword, rolsuper, rolcanlogin, rolconnlimit FROM pg_authid WHERE rolname !~ '^pg_'
  ORDER BY 2;
SELECT 'member', roleid::regrole, member::regrole FROM pg_auth_members WHERE roleid >= 16384 ORDER BY 2, 3;
SELECT 'database', datname, pg_get_userbyid(datdba), datacl, pg_encoding_to_char(encoding), datcollate, datallowconn
  FROM pg_database ORDER BY 2;
SELECT 'setting', setdatabase, setrole, setconfig FROM pg_db_role_setting ORDER BY 2, 3;
"""
_DATABASE_FACTS = r"""
SELECT 'extension', extname, extversion FROM pg_extension ORDER BY 2;
SELECT 'large object', oid, md5(lo_get(oid)), pg_get_userbyid(lomowner) FROM pg_largeobject_metadata ORDER BY 2;
SELECT 'relation', oid::regclass, relkind, relpersistence, relacl, pg_get_userbyid(relowner) FROM pg_class
  WHERE oid >= 16384 AND relnamespace::regnamespace::text !~ '^pg_' ORDER BY 2;
SELECT 'function', oid::regprocedure FROM pg_proc WHERE oid >= 16384 ORDER BY 2;
SELECT 'sequence', schemaname, sequencename, last_value FROM pg_sequences ORDER BY 2, 3;
SELECT format('SELECT %L, %L, count(*), md5(string_agg(t::text, chr(10) ORDER BY t::text)) FROM %s t', 'rows',
    oid::regclass, oid::regclass)
  FROM pg_class WHERE relkind IN ('r', 'm') AND relpersistence = 'p' AND oid >= 16384
    AND relnamespace::regnamespace::text !~ '^pg_' ORDER BY oid::regclass::text
\gexec
"""


def fingerprint(server: PostgresServer) -> dict[str, str]:
    """Return all that a cluster holds, by database, in words that can be compared."""
    found = {"": script(server, _CLUSTER_FACTS)}
    names = script(server, "SELECT datname FROM pg_database WHERE datallowconn AND datname !~ '^pgbench'")
    for name in names.splitlines():
        found[name] = script(server, _DATABASE_FACTS, name)
    return found


BALANCE = """
SELECT (SELECT sum(abalance) FROM pgbench_accounts), (SELECT sum(tbalance) FROM pgbench_tellers),
  (SELECT sum(bbalance) FROM pgbench_branches), (SELECT coalesce(sum(delta), 0) FROM pgbench_history),
  (SELECT count(*) FROM pgbench_accounts)
"""


def pgbench(server: PostgresServer, *arguments: str) -> list[str]:
    """Return a pgbench command for the database ``pgbench``."""
    words = [str(server.client_bin_dir / "pgbench"), "-h", str(server.socket_dir), "-p", str(server.port)]
    return [*words, "-U", SUPERUSER, *arguments, "pgbench"]


def make_pgbench(server: PostgresServer) -> None:
    """Make pgbench's own database."""
    script(server, "CREATE DATABASE pgbench;")
    argv = pgbench(server, "-i", "-q", "-s", "1")
    subprocess.run(argv, check=True, capture_output=True, cwd="/", **as_user(server.os_user))


@contextmanager
def write_load(server: PostgresServer) -> Iterator[None]:
    """Let two clients write for the length of the block."""
    argv = pgbench(server, "-n", "-c", "2", "-T", "300")
    with subprocess.Popen(
        argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/", **as_user(server.os_user)
    ) as load:
        try:
            yield
            assert load.poll() is None, "the load ended by itself"
        finally:
            load.kill()
            load.wait(20)


def tree(*places: Path) -> dict[str, tuple[Any, ...]]:
    """Return every file below ``places`` with its inode, size, owner, mode and time of change."""
    found: dict[str, tuple[Any, ...]] = {}
    for place in places:
        for path in (place, *place.rglob("*")):
            facts = path.lstat()
            found[str(path)] = (facts.st_ino, facts.st_mode, facts.st_uid, facts.st_size, facts.st_mtime_ns)
    return found


def copy_tree(source: Path, target: Path) -> None:
    """Copy a stopped data directory with owners."""
    subprocess.run(["cp", "--archive", "--reflink=auto", source, target], check=True)


def remove(path: Path) -> None:
    """Delete whatever is there."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def servers_below(place: Path) -> list[int]:
    """Return the PostgreSQL processes that work in a directory below ``place``."""
    found = []
    for each in Path("/proc").iterdir():
        if each.name.isdigit() and alive(int(each.name)):
            try:
                works = (each / "cwd").readlink()
                if (each / "comm").read_text().strip() == "postgres" and place.resolve() in works.parents:
                    found.append(int(each.name))
            except OSError:
                continue
    return found
