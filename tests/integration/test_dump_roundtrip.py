"""PostgreSQL as a dump: backed up, lost, restored into a cluster made beside, on every version."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable

import pytest

from hq_backups.engine.errors import Exit
from tests.integration.pg_helpers import ODD_DATABASES, Host, fill, fingerprint, script
from tests.testbed.places import POSTGRES_VERSIONS
from tests.testbed.postgres import PostgresServer
from tests.testbed.process import as_user

LONG = (pytest.mark.slow, pytest.mark.faults)
Fresh = Callable[..., PostgresServer]

# What neither initdb nor a load of pg_dumpall's SQL keeps.
LOST = """
CREATE ROLE second LOGIN;
ALTER DATABASE postgres OWNER TO "hq user";
GRANT CREATE, CONNECT ON DATABASE postgres TO readers WITH GRANT OPTION;
SET ROLE readers;
GRANT CONNECT ON DATABASE postgres TO second;
RESET ROLE;
REVOKE CONNECT ON DATABASE template1 FROM PUBLIC;
COMMENT ON DATABASE postgres IS E'it''s a \\\\ comment\\nCREATE ROLE postgres;';
COMMENT ON DATABASE template1 IS NULL;
ALTER DATABASE postgres CONNECTION LIMIT 50;
ALTER DATABASE postgres SET search_path = "$user", 'my schema', public;
ALTER DATABASE template1 SET work_mem = '7MB';
ALTER ROLE second IN DATABASE postgres SET statement_timeout = '17s';
ALTER ROLE second IN DATABASE postgres SET "my.setting" = E'a ''quoted'' \\\\ value';
ALTER ROLE second IN DATABASE hq SET work_mem = '6MB';
COMMENT ON ROLE second IS 'CREATE ROLE postgres;
CREATE ROLE postgres;
\\connect hq';
CREATE DATABASE pattern IS_TEMPLATE true CONNECTION LIMIT 3;
ALTER DATABASE template1 IS_TEMPLATE false CONNECTION LIMIT 40;
"""

LARGE_OBJECTS = """
ALTER LARGE OBJECT 4242 OWNER TO "hq user";
COMMENT ON LARGE OBJECT 4242 IS 'a picture';
GRANT SELECT ON LARGE OBJECT 4243 TO readers;
"""

# Text that looks like what a dump is made of.
TRAPS = r"""
CREATE FUNCTION trap() RETURNS text LANGUAGE plpgsql AS $body$
BEGIN
  RETURN '
COPY public.counted (n) FROM stdin;
1
\.
\connect postgres
--
-- PostgreSQL database cluster dump complete
--

';
END $body$;
CREATE TABLE counted (n int, said text DEFAULT '
COPY public.counted (n) FROM stdin;
\.
--
-- PostgreSQL database cluster dump complete
--
');
INSERT INTO counted SELECT n, E'\\.\n\\connect x\n-- PostgreSQL database cluster dump complete\n$$ '' " /*'
  FROM generate_series(1, 100) n;
COMMENT ON TABLE counted IS E'a /* b -- c $$ \\ \n\\connect template1\nCOPY public.counted (n) FROM stdin;\n';
CREATE TABLE "COPY x (""a"") FROM stdin;" ("a "" (b" int, "c) FROM stdin;" text);
INSERT INTO "COPY x (""a"") FROM stdin;" VALUES (1, 'one'), (2, E'two\n\\.\n');
CREATE TABLE "no columns" ();
INSERT INTO "no columns" DEFAULT VALUES;
CREATE VIEW looking AS SELECT E'\\\\''' AS a, 'x''' AS b, '$a$' AS c, $q$it's$q$::text AS d;
"""

AROUND = """
SELECT 'database', datname, pg_get_userbyid(datdba), datconnlimit, datistemplate, shobj_description(oid, 'pg_database'),
  pg_encoding_to_char(encoding), datcollate, datctype FROM pg_database WHERE datallowconn ORDER BY 2;
SELECT 'acl', datname, a.grantor::regrole, a.grantee::regrole, a.privilege_type, a.is_grantable
  FROM pg_database, aclexplode(datacl) a WHERE datallowconn ORDER BY 2, 3::text, 4::text, 5;
SELECT 'set', d.datname, r.rolname, s.setconfig FROM pg_db_role_setting s LEFT JOIN pg_database d ON d.oid = setdatabase
  LEFT JOIN pg_roles r ON r.oid = setrole ORDER BY 2, 3;
SELECT 'role', rolname, rolpassword, rolsuper, rolconnlimit, shobj_description(oid, 'pg_authid') FROM pg_authid
  WHERE rolname !~ '^pg_' ORDER BY 2;
SELECT current_setting('data_checksums'), current_setting('wal_segment_size'), current_setting('work_mem');
"""


def program(server: PostgresServer, *argv: str) -> str:
    """Run a client of a server; return what it says but for comments and the words that differ each time."""
    where = ["-h", str(server.socket_dir), "-p", str(server.port), "-U", server.psql("SELECT current_user")]
    name = server.client_bin_dir / argv[0]
    done = subprocess.run(
        [name, *where, *argv[1:]], check=True, capture_output=True, cwd="/", **as_user(server.os_user)
    )
    lines = done.stdout.decode().splitlines()
    return "\n".join(line for line in lines if not re.match(r"--|\\(un)?restrict", line))


def described(server: PostgresServer) -> dict[str, str]:
    """Return everything that must be the same after a restore."""
    found = {"": script(server, AROUND), "globals": program(server, "pg_dumpall", "--globals-only")}
    for name in script(server, "SELECT datname FROM pg_database WHERE datallowconn").splitlines():
        quoted = name.replace("\\", "\\\\").replace("'", "\\'")
        found[name] = program(server, "pg_dump", "--create", f"--dbname=dbname='{quoted}'")
    return {**found, **{f"contents of {name}": text for name, text in fingerprint(server).items() if name}}


def assert_same(found: dict[str, str], before: dict[str, str]) -> None:
    for what, text in before.items():
        # In any order: some are listed by oid.
        assert sorted(found[what].splitlines()) == sorted(text.splitlines()), what
    assert set(found) == set(before)


def dumping(server: PostgresServer, **changes: object) -> Host:
    return Host(server, store={"mode": "dump"}, **changes)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out sync(2): it waits for whatever else this machine writes."""
    monkeypatch.setattr("os.sync", lambda: None)


@pytest.mark.parametrize(
    "version",
    [
        pytest.param(v, marks=[getattr(pytest.mark, f"postgres{v}"), *(LONG if v != 15 else ())])
        for v in POSTGRES_VERSIONS
    ],
)
def test_a_server_comes_back_as_it_was(version: int, fresh_pg: Fresh) -> None:
    server = fresh_pg(version)
    fill(server)
    script(server, LOST)
    script(server, TRAPS, "hq")
    script(server, LARGE_OBJECTS, "hq")
    script(server, "CREATE TABLE here (n int); INSERT INTO here VALUES (1);", "postgres")
    script(server, "CREATE TABLE everywhere (n int);", "template1")
    script(server, "ALTER SYSTEM SET work_mem = '9MB'; SELECT pg_reload_conf();")
    script(server, "DROP DATABASE no_connections;")
    host = dumping(server)
    before, who = described(server), host.system_identifier
    done = host.good_backup("daily")
    name = done.manifest["name"]
    assert re.fullmatch(r"postgres_icds_new_prod_daily_\d{4}_\d\d_\d\d\.gz", name)
    rows = done.manifest["source"]["rows"]
    assert rows["hq"]["public.counted"] == 100
    assert rows["hq"]['"COPY x (""a"") FROM stdin;"'.join(["public.", ""])] == 2
    assert rows["hq"]["public.cache"] == 50, "an unlogged table's rows are in a dump"
    assert set(rows) == {"postgres", "template1", "hq", "pattern", *ODD_DATABASES}
    assert host.verify().code is Exit.OK
    deep = host.verify(deep=True)
    assert deep.code is Exit.OK, deep.error

    script(server, "DROP TABLE counted;", "hq")
    script(server, "DROP DATABASE hq WITH (FORCE);")
    restored = host.restore()
    assert restored.code is Exit.OK, restored.error
    assert_same(described(server), before)
    assert host.system_identifier != who
    assert any("analyze-in-stages" in step for step in restored.of("data")[0]["next_steps"])
    assert host.undo().code is Exit.OK
    assert host.system_identifier == who
    assert server.psql("SELECT count(*) FROM pg_database WHERE datname = 'hq'") == "0"
