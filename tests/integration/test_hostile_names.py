"""Names and contents that hurt: every kind is backed up, verified and restored as it was, in both modes."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from hq_backups.engine.errors import Exit
from tests.integration import roundtrip
from tests.integration.pg_helpers import Host, make_pgbench, script, write_load
from tests.testbed.postgres import PostgresServer
from tests.testbed.process import as_user, free_port, wait_until

Fresh = Callable[..., PostgresServer]

NAMES = (
    "--host=evil",
    '-d o\'clock "☃" a=b host=evil\\slash {c} %s %I $1;drop',
    "postgres://evil/x",
)
MULTILINE = "new\nline"
"""PostgreSQL takes such names, pg_dumpall refuses them."""
CLOSED = "lets nobody in"
"""No dump holds a database that takes no connections."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out sync(2): it waits for whatever else this machine writes."""
    monkeypatch.setattr("os.sync", lambda: None)


def ident(name: str) -> str:
    return '"{}"'.format(name.replace('"', '""'))


def literal(text: str) -> str:
    return "E'{}'".format(text.replace("\\", "\\\\").replace("'", "\\'"))


_ODD = r"""
CREATE EXTENSION file_fdw;
CREATE EXTENSION postgres_fdw;
CREATE EXTENSION IF NOT EXISTS "uuid-ossp";
CREATE SCHEMA "-s; ""x"" y";
CREATE TABLE "-s; ""x"" y"."t\ab 'c
d" (id int GENERATED ALWAYS AS IDENTITY, n int, twice int GENERATED ALWAYS AS (n * 2) STORED, "col ""umn" text);
INSERT INTO "-s; ""x"" y"."t\ab 'c
d" (n, "col ""umn") SELECT n, repeat('ü', n) FROM generate_series(1, 50) n;
COMMENT ON TABLE "-s; ""x"" y"."t\ab 'c
d" IS E'a comment\n\\connect elsewhere\n-- PostgreSQL database cluster dump complete';
CREATE UNLOGGED TABLE gone AS SELECT generate_series(1, 5) AS n;
CREATE SEQUENCE "se quence" START 7 INCREMENT 3;
SELECT nextval('"se quence"'), nextval('"se quence"');
CREATE TABLE guarded (who name, n int);
INSERT INTO guarded VALUES ('nobody', 1), ('postgres', 2);
ALTER TABLE guarded ENABLE ROW LEVEL SECURITY;
ALTER TABLE guarded FORCE ROW LEVEL SECURITY;
CREATE POLICY "none; of it" ON guarded USING (false);
CREATE MATERIALIZED VIEW empty_view AS SELECT * FROM guarded WITH NO DATA;
CREATE SERVER files FOREIGN DATA WRAPPER file_fdw;
CREATE FOREIGN TABLE far_file (line text) SERVER files OPTIONS (filename '/nowhere/at/all');
CREATE SERVER "far away" FOREIGN DATA WRAPPER postgres_fdw OPTIONS (host '127.0.0.1', port '1');
CREATE USER MAPPING FOR PUBLIC SERVER "far away" OPTIONS (user 'x', password 'se''cret');
CREATE TABLE parts (day date, n int) PARTITION BY RANGE (day);
CREATE TABLE near PARTITION OF parts FOR VALUES FROM ('2026-01-01') TO ('2027-01-01');
CREATE FOREIGN TABLE far PARTITION OF parts FOR VALUES FROM ('2025-01-01') TO ('2026-01-01') SERVER "far away";
INSERT INTO parts VALUES ('2026-05-05', 5);
CREATE PUBLICATION "p'ub" FOR TABLE near;
SELECT lo_from_bytea(77, '\xc0ffee');
COMMENT ON LARGE OBJECT 77 IS 'cof''fee';
GRANT SELECT ON LARGE OBJECT 77 TO "--host=evil";
-- Functions of the system's names, which a careless path would find first.
CREATE FUNCTION public.count(anyelement) RETURNS bigint LANGUAGE sql AS 'SELECT 0::bigint';
CREATE FUNCTION public.format(text, text) RETURNS text LANGUAGE sql AS 'SELECT $$SELECT 1/0$$';
"""


def hurt(server: PostgresServer, names: tuple[str, ...]) -> None:
    """Fill a cluster with everything that has a name."""
    made = []
    for name in names:
        role, text = ident(name), literal(name)
        made += [
            f"CREATE ROLE {role} LOGIN PASSWORD {text}; COMMENT ON ROLE {role} IS {text};",
            f"CREATE DATABASE {role} OWNER {role}; COMMENT ON DATABASE {role} IS {text};",
            f"ALTER DATABASE {role} SET application_name = {text};",
            f"ALTER ROLE {role} IN DATABASE {role} SET search_path = {role}, public;",
        ]
    script(server, "\n".join(made))
    for name in names[1:]:
        script(server, f"CREATE TABLE {ident(name)} AS SELECT 1 AS {ident(name)};", name)
    script(
        server,
        f"""
        GRANT "--host=evil" TO {ident(NAMES[1])} WITH ADMIN OPTION;
        GRANT pg_monitor TO "postgres://evil/x";
        CREATE DATABASE mould IS_TEMPLATE true CONNECTION LIMIT 9 LOCALE 'C' ENCODING 'SQL_ASCII' TEMPLATE template0;
        ALTER DATABASE mould SET work_mem = '7MB';
        CREATE DATABASE {ident(CLOSED)};
        ALTER DATABASE {ident(CLOSED)} ALLOW_CONNECTIONS false;
        CREATE DATABASE odd;
        """,
    )
    script(server, "CREATE TABLE inside AS SELECT 1 AS n;", "mould")
    if server.version >= 15 and script(server, "SELECT 1 FROM pg_collation WHERE collname = 'de-x-icu'"):
        script(
            server, "CREATE DATABASE icu LOCALE_PROVIDER icu ICU_LOCALE 'de-u-co-phonebk' TEMPLATE template0;"
        )
        script(
            server,
            "CREATE TABLE words (w text PRIMARY KEY); INSERT INTO words VALUES ('ä'), ('az'), ('b');",
            "icu",
        )
    if server.version >= 17:
        script(
            server,
            "CREATE DATABASE builtin LOCALE_PROVIDER builtin BUILTIN_LOCALE 'C.UTF-8' TEMPLATE template0;",
        )
    have = script(server, "SELECT name FROM pg_available_extensions").split()
    lines = [
        line for line in _ODD.split("\n")
        if not line.startswith("CREATE EXTENSION IF") or "uuid-ossp" in have
    ]  # fmt: skip
    script(server, "\n".join(lines), "odd")


CASES = [
    pytest.param("plain", 14, marks=[pytest.mark.postgres14, pytest.mark.slow, pytest.mark.faults]),
    pytest.param("plain", 15, marks=pytest.mark.postgres15),
    pytest.param("plain", 18, marks=[pytest.mark.postgres18, pytest.mark.slow, pytest.mark.faults]),
    pytest.param("dump", 14, marks=[pytest.mark.postgres14, pytest.mark.slow, pytest.mark.faults]),
    pytest.param("dump", 15, marks=[pytest.mark.postgres15, pytest.mark.slow, pytest.mark.faults]),
    pytest.param("dump", 18, marks=[pytest.mark.postgres18, pytest.mark.slow, pytest.mark.faults]),
]


@pytest.mark.parametrize(("mode", "version"), CASES)
def test_everything_comes_back_under_its_name(mode: str, version: int, fresh_pg: Fresh) -> None:
    server = fresh_pg(version)
    names = (*NAMES, MULTILINE) if mode == "plain" else NAMES
    hurt(server, names)
    loaded = mode == "plain" and version != 15
    if loaded:
        make_pgbench(server)
    skip = roundtrip.BUSY if mode == "plain" else (*roundtrip.BUSY, CLOSED)
    before = roundtrip.snapshot(server, skip)
    host = Host(server, store={"mode": mode})
    with write_load(server) if loaded else nullcontext():
        done = host.good_backup()
    source = done.manifest["source"]
    assert set(names) <= set(source["contents"])
    assert set(names) <= set(source["roles"])
    assert source["contents"]["odd"]["unlogged"] == ["public.gone"]
    assert "se'cret" not in str(done)
    deep = host.verify(deep=True)
    assert deep.code is Exit.OK, deep
    # Nothing is missed that was never there, such as the rows of a view without data.
    assert not {w for w in deep.warnings if w.endswith("-missing")}, deep
    server.kill()
    shutil.rmtree(server.data_dir) if mode == "plain" else None
    restored = host.restore()
    assert restored.code is Exit.OK, restored
    if mode == "plain":
        assert "odd: public.gone" in str(restored.of("plan")[0]["facts"]["empty_afterwards"])
        assert script(server, "SELECT count(*) FROM gone", "odd") == "0"
    roundtrip.assert_same(before, roundtrip.snapshot(server, skip))


# Publications and subscriptions

LOGICAL = {"wal_level": "logical", "wal_retrieve_retry_interval": "100ms"}


@pytest.fixture
def subscribed(fresh_pg: Fresh) -> tuple[PostgresServer, Host]:
    """Run a publisher and a subscriber that has all of it."""
    publisher = fresh_pg(15, extra_conf=LOGICAL)
    subscriber = fresh_pg(15, extra_conf=LOGICAL, new_system=True)
    for server in (publisher, subscriber):
        script(server, "CREATE TABLE t (n int PRIMARY KEY);")
    script(publisher, "INSERT INTO t SELECT generate_series(1, 100); CREATE PUBLICATION pub FOR TABLE t;")
    script(
        subscriber,
        f"CREATE SUBSCRIPTION sub CONNECTION 'host={publisher.socket_dir} port={publisher.port} user=postgres "
        "dbname=postgres password=geheim' PUBLICATION pub WITH (slot_name = 'sub_scription');",
    )
    arrived(subscriber, 100)
    return publisher, Host(subscriber)


def arrived(server: PostgresServer, rows: int) -> None:
    wait_until(lambda: server.psql("SELECT count(*) FROM t") == str(rows), what="the rows")


def slot(publisher: PostgresServer) -> str:
    return publisher.psql("SELECT active, confirmed_flush_lsn FROM pg_replication_slots")


@contextmanager
def started(data: Path, server: PostgresServer) -> Iterator[str]:
    """Start a copy as an operator would by hand; give its port."""
    port = free_port()
    options = f"-c port={port} -c unix_socket_directories={data.parent}"
    pg_ctl = [server.bin_dir / "pg_ctl", "-s", "-w", "-D", data, "-l", data.parent / "copy.log"]
    as_postgres: dict[str, Any] = {"cwd": "/", "stdout": subprocess.DEVNULL, **as_user(server.os_user)}
    subprocess.run([*pg_ctl, "-o", options, "start"], check=True, **as_postgres)
    try:
        yield str(port)
    finally:
        subprocess.run([*pg_ctl, "-m", "immediate", "stop"], check=True, **as_postgres)


@pytest.mark.postgres15
def test_no_copy_drains_the_originals_subscription(
    subscribed: tuple[PostgresServer, Host], short_tmp: Path
) -> None:
    publisher, host = subscribed
    original = host.server
    done = host.good_backup()
    assert done.manifest["source"]["subscriptions"] == [
        {"name": "sub", "database": "postgres", "enabled": True, "slot": "sub_scription"}
    ]
    assert "geheim" not in json.dumps(done.manifest)
    # The original is down for a while: its slot waits for it, and is free for any other.
    original.stop()
    wait_until(lambda: slot(publisher).startswith("f"), what="the slot to be free")
    script(publisher, "INSERT INTO t VALUES (101);")
    before = slot(publisher)

    deep = host.verify(deep=True)
    assert deep.code is Exit.OK, deep
    assert slot(publisher) == before

    beside = host.restore(target_dir=short_tmp / "copy" / "data")
    assert beside.code is Exit.OK, beside
    said = beside.of("plan")[0]["facts"]["subscriptions"]
    assert said == "sub: switched off (max_logical_replication_workers = 0 in postgresql.auto.conf)"
    with started(short_tmp / "copy" / "data", original) as port:
        assert original.psql("SELECT count(*) FROM t", host=str(short_tmp / "copy"), port=int(port)) == "100"
        time.sleep(2)
        assert slot(publisher) == before

    original.start()
    arrived(original, 101)


@pytest.mark.postgres15
def test_another_hosts_subscriptions_are_switched_off(subscribed: tuple[PostgresServer, Host]) -> None:
    publisher, host = subscribed
    name = host.good_backup().manifest["name"]
    original = host.server
    original.stop()
    wait_until(lambda: slot(publisher).startswith("f"), what="the slot to be free")
    script(publisher, "INSERT INTO t VALUES (101);")
    before = slot(publisher)
    # The same files seen by another machine of another environment.
    drill = host.but(name="drill0", env="staging")
    restored = drill.restore(name, from_env=host.env)
    assert restored.code is Exit.OK, restored
    (step,) = [s for s in restored.of("data")[-1]["next_steps"] if "subscriptions" in s]
    assert "ALTER SYSTEM RESET max_logical_replication_workers" in step
    time.sleep(2)
    assert slot(publisher) == before
    assert original.psql("SELECT count(*) FROM t") == "100"
    # What the step says works.
    original.psql("ALTER SYSTEM RESET max_logical_replication_workers")
    original.restart()
    arrived(original, 101)


@pytest.mark.postgres15
@pytest.mark.slow
@pytest.mark.faults
def test_the_hosts_own_subscriptions_go_on(subscribed: tuple[PostgresServer, Host]) -> None:
    publisher, host = subscribed
    publisher.psql("SELECT pg_create_physical_replication_slot('standby')")
    host.server.psql("SELECT pg_create_physical_replication_slot('followers')")
    host.good_backup()
    host.server.stop()
    restored = host.restore()
    assert restored.code is Exit.OK, restored
    assert restored.of("plan")[0]["facts"]["subscriptions"] == "sub: go on by themselves"
    steps = "\n".join(restored.of("data")[-1]["next_steps"])
    assert "does not come again" in steps
    assert "replication slots (followers) are in no backup" in steps
    script(publisher, "INSERT INTO t VALUES (101);")
    arrived(host.server, 101)
