"""Servers where a session is not what it seems: databases that change its role, triggers that run when it begins."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable

import pytest

from hq_backups.engine.errors import Exit
from tests.integration.pg_helpers import Host
from tests.testbed.postgres import PostgresServer
from tests.testbed.process import as_user

LONG = (pytest.mark.slow, pytest.mark.faults)
Fresh = Callable[..., PostgresServer]

SET_ROLE = """
CREATE ROLE weak;
CREATE DATABASE hq;
\\connect hq
CREATE TABLE note (n text);
INSERT INTO note VALUES ('before');
ALTER DATABASE hq SET role = weak;
ALTER DATABASE postgres SET role = weak;
ALTER ROLE postgres SET role = weak;
"""
# One that writes, and finds its table by the search path; one that lets nobody in.
ON_LOGIN = """
CREATE DATABASE hq;
\\connect hq
CREATE TABLE note (n text);
INSERT INTO note VALUES ('before');
CREATE TABLE entered (who name);
CREATE FUNCTION noted() RETURNS event_trigger LANGUAGE plpgsql AS
  $$ BEGIN INSERT INTO entered VALUES (session_user); END $$;
CREATE EVENT TRIGGER noting ON login EXECUTE FUNCTION noted();
\\connect postgres
"""
SHUT = """
CREATE FUNCTION shut() RETURNS event_trigger LANGUAGE plpgsql AS
  $$ BEGIN RAISE EXCEPTION 'nobody comes in'; END $$;
CREATE EVENT TRIGGER shutting ON login EXECUTE FUNCTION shut();
"""
SETTINGS = """
SELECT coalesce(datname, ''), coalesce(rolname, ''), setconfig FROM pg_db_role_setting
  LEFT JOIN pg_database d ON d.oid = setdatabase LEFT JOIN pg_roles r ON r.oid = setrole ORDER BY 1, 2;
"""
MODES = pytest.mark.parametrize("mode", [pytest.param("plain", marks=LONG), "dump"])


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out sync(2): it waits for whatever else this machine writes."""
    monkeypatch.setattr("os.sync", lambda: None)


def ask(server: PostgresServer, sql: str, dbname: str = "postgres", *, options: str = "-c role=none") -> str:
    """Run statements in a session that is what it seems."""
    where = f"host='{server.socket_dir}' port={server.port} user=postgres dbname={dbname}"
    done = subprocess.run(
        [server.client_bin_dir / "psql", "-X", "-q", "-t", "-A", "-v", "ON_ERROR_STOP=1", "-d", where],
        input=sql.encode(), capture_output=True, cwd="/", check=False,
        env={"PATH": os.defpath, "LC_ALL": "C.UTF-8", "PGOPTIONS": options}, **as_user(server.os_user),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().strip()


@MODES
@pytest.mark.postgres15
def test_databases_that_set_a_weaker_role(mode: str, fresh_pg: Fresh) -> None:
    server = fresh_pg(15)
    ask(server, SET_ROLE)
    before = ask(server, SETTINGS)
    assert before.count("role=weak") == 3
    host = Host(server, store={"mode": mode})
    host.good_backup()
    deep = host.verify(deep=True)
    assert deep.code is Exit.OK, deep
    ask(server, "DROP TABLE note", "hq")
    done = host.restore()
    assert done.code is Exit.OK, done
    assert ask(server, "SELECT n FROM note", "hq") == "before"
    assert ask(server, SETTINGS) == before


@pytest.mark.parametrize("mode", ["plain", "dump"])
@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.postgres18
def test_triggers_on_login_are_passed_by(mode: str, fresh_pg: Fresh) -> None:
    past = "-c event_triggers=off"
    server = fresh_pg(18)
    ask(server, ON_LOGIN + SHUT)
    host = Host(server, store={"mode": mode})
    host.good_backup()
    deep = host.verify(deep=True)
    assert deep.code is Exit.OK, deep
    ask(server, "DROP TABLE note", "hq", options=past)
    done = host.restore()
    assert done.code is Exit.OK, done
    assert ask(server, "SELECT n FROM note", "hq", options=past) == "before"
    assert ask(server, "SELECT count(*) FROM entered", "hq", options=past) == "0"
    assert ask(server, "SELECT evtname FROM pg_event_trigger", options=past) == "shutting"
    assert ask(server, "SELECT count(*) FROM entered", "hq", options="") == "1", "and it goes on noting"


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.postgres18
def test_a_trigger_on_login_that_stops_a_user_of_few_rights_is_told(fresh_pg: Fresh) -> None:
    server = fresh_pg(18)
    ask(server, "CREATE ROLE master LOGIN CREATEDB CREATEROLE; CREATE DATABASE hq;")
    ask(server, SHUT, "hq")
    done = Host(server, options={"user": "master"}, store={"mode": "dump"}).backup()
    assert done.code is Exit.PREFLIGHT, done
    for words in ("database 'hq' could not be looked into", "nobody comes in"):
        assert words in done.error
