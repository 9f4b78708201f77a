"""Dumps of and into servers whose administrator is no superuser, as hosting services give them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from hq_backups.engine.errors import Exit
from hq_backups.engine.locks import StoreLock
from tests.integration.pg_helpers import Host, script
from tests.testbed.postgres import PostgresServer
from tests.testbed.process import LOOPBACK

LONG = (pytest.mark.slow, pytest.mark.faults)
Fresh = Callable[..., PostgresServer]
MASTER = {"user": "master", "password": "mas'ter", "host": LOOPBACK}

MANAGED = """
CREATE ROLE master LOGIN CREATEDB CREATEROLE PASSWORD 'mas''ter';
GRANT pg_read_all_data, pg_monitor TO master;
ALTER DATABASE postgres OWNER TO master;
CREATE ROLE rdsadmin SUPERUSER;
CREATE DATABASE rdsadmin OWNER rdsadmin;
REVOKE CONNECT ON DATABASE rdsadmin FROM PUBLIC;
"""
FILLED = """
CREATE ROLE hq LOGIN PASSWORD 'geheim' CONNECTION LIMIT 7;
CREATE ROLE "read ""ers";
CREATE ROLE boss SUPERUSER REPLICATION;
GRANT "read ""ers" TO hq WITH ADMIN OPTION;
GRANT hq TO master;
CREATE ROLE lone;
CREATE DATABASE hq OWNER hq;
ALTER DATABASE hq SET default_transaction_read_only = on;
COMMENT ON DATABASE postgres IS 'put back';
\\connect hq
SET default_transaction_read_only = off;
SET ROLE hq;
CREATE TABLE note (n text);
INSERT INTO note VALUES ('before'), ('again');
GRANT SELECT ON note TO "read ""ers";
RESET ROLE;
-- Nobody is a member of its owner.
CREATE SCHEMA apart AUTHORIZATION lone;
CREATE TABLE apart.t (n int);
ALTER TABLE apart.t OWNER TO lone;
"""
MAPPED = """
SET default_transaction_read_only = off;
CREATE FOREIGN DATA WRAPPER other;
CREATE SERVER away FOREIGN DATA WRAPPER other;
GRANT USAGE ON FOREIGN SERVER away TO hq, master;
CREATE USER MAPPING FOR hq SERVER away OPTIONS (password 'of hq');
CREATE USER MAPPING FOR master SERVER away OPTIONS (password 'of master');
"""
FACTS = """
SELECT rolname, rolcanlogin, rolcreatedb, rolconnlimit, shobj_description(oid, 'pg_authid') FROM pg_roles
  WHERE rolname IN ('hq', 'read "ers', 'boss') ORDER BY 1;
SELECT DISTINCT roleid::regrole::text, member::regrole::text, admin_option FROM pg_auth_members
  WHERE roleid >= 16384 AND (member::regrole::text <> 'master' OR NOT admin_option) ORDER BY 1, 2;
SELECT datname, pg_get_userbyid(datdba), shobj_description(oid, 'pg_database') FROM pg_database
  WHERE datname IN ('hq', 'postgres') ORDER BY 1;
SELECT setconfig FROM pg_db_role_setting;
"""
VERSIONS = [
    pytest.param(15, marks=pytest.mark.postgres15),
    pytest.param(14, marks=[pytest.mark.postgres14, *LONG]),
    pytest.param(18, marks=[pytest.mark.postgres18, *LONG]),
]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out sync(2): it waits for whatever else this machine writes."""
    monkeypatch.setattr("os.sync", lambda: None)


def managed(server: PostgresServer, **store: Any) -> Host:
    return Host(
        server,
        options={**MASTER, "port": server.port},
        store={"mode": "dump", "data_dir": None, "os_user": server.os_user, **store},
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_an_administrator_dumps_and_loads(version: int, fresh_pg: Fresh) -> None:
    source, target = fresh_pg(version), fresh_pg(version, new_system=True)
    for server in (source, target):
        script(server, MANAGED)
        server.write_hba("scram-sha-256")
        with server.hba_file.open("r+") as file:
            rules = file.read()
            file.seek(0)
            file.write(f"local all postgres trust\n{rules}")
        server.psql("SELECT pg_reload_conf()")
    script(source, FILLED)
    taken = managed(source).good_backup()
    assert taken.warnings >= {"no-passwords", "database-left-out"}
    assert set(taken.manifest["source"]["rows"]) == {"postgres", "template1", "hq"}

    host = managed(target, backup_dir=managed(source).backups)
    for recreate in (False, True):
        done = host.restore(in_place=True, recreate=recreate)
        assert done.code is Exit.OK, done
        said = "\n".join(str(w["message"]) for w in done.of("warning"))
        for words in ("'boss' is not given SUPERUSER", "'boss' is not given REPLICATION", "'rdsadmin' stays"):
            assert words in said
        assert script(target, "SELECT n FROM note", "hq") == "before\nagain"
        assert script(
            target, "SELECT relowner::regrole, relacl FROM pg_class WHERE relname = 'note'", "hq"
        ) == (script(source, "SELECT relowner::regrole, relacl FROM pg_class WHERE relname = 'note'", "hq"))
        assert script(target, FACTS) == script(source, FACTS)

    with StoreLock(host.config.stores["postgres"].backup_dir, "other", "backup"):
        assert host.restore(in_place=True, recreate=True).code is Exit.LOCKED
    assert script(target, "SELECT n FROM note", "hq") == "before\nagain"


@pytest.mark.postgres15
def test_what_cannot_be_dumped_or_loaded_is_explained(fresh_pg: Fresh) -> None:
    server = fresh_pg(15)
    script(server, MANAGED)
    script(server, 'CREATE DATABASE "new\nline";')
    refused = managed(server).backup()
    assert refused.code is Exit.PREFLIGHT, refused
    assert r"'new\nline'" in refused.error
    script(server, 'DROP DATABASE "new\nline"; CREATE TABLE of_postgres (n int); DROP DATABASE rdsadmin;')
    host = managed(server)
    host.good_backup()
    done = host.restore(in_place=True, recreate=True)
    assert done.code is Exit.ERROR, done
    assert "of_postgres" in done.error or "line" in done.error
    assert "sed -n" in done.error


@pytest.mark.postgres15
def test_passwords_of_user_mappings_that_cannot_be_seen_are_named(fresh_pg: Fresh) -> None:
    server = fresh_pg(15)
    script(server, MANAGED)
    script(server, FILLED)
    script(server, MAPPED, "hq")
    done = managed(server).good_backup()
    (said,) = [w["message"] for w in done.of("warning") if w["code"] == "mapping-options-left-out"]
    for words in ("of 'hq' at foreign server 'away' in database 'hq'", "not in the dump"):
        assert words in said
    assert "of hq" not in str(done)
    seen = Host(server, store={"mode": "dump"}).good_backup("weekly")
    assert "mapping-options-left-out" not in seen.warnings


@pytest.mark.parametrize("version", VERSIONS)
def test_a_load_that_fails_gives_borrowed_memberships_back(version: int, fresh_pg: Fresh) -> None:
    source, target = fresh_pg(version), fresh_pg(version, new_system=True)
    for server in (source, target):
        script(server, MANAGED)
    script(source, FILLED)
    script(source, "SET default_transaction_read_only = off; CREATE SCHEMA of_postgres;", "hq")
    # It owns something in a database that stays, so it stays as well when the server is emptied.
    script(target, "CREATE ROLE keeper; GRANT CONNECT ON DATABASE rdsadmin TO keeper;")
    managed(source).good_backup()
    host = managed(target, backup_dir=managed(source).backups)
    asked = (
        "SELECT DISTINCT roleid::regrole FROM pg_auth_members WHERE member::regrole::text = 'master'"
        " AND roleid >= 16384 AND NOT admin_option"
    )
    assert script(target, asked) == ""
    for recreate in (False, True):
        done = host.restore(in_place=True, recreate=recreate)
        assert done.code is Exit.ERROR, done
        assert "sed -n" in done.error
        assert script(target, "SELECT count(*) FROM pg_roles WHERE rolname IN ('lone', 'keeper')") == "2"
        assert script(target, asked) == "hq", "which it is by the dump's own word"
