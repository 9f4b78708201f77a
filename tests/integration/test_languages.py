"""Databases of other encodings and locales than the cluster's come back with them, from a dump."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hq_backups.engine.errors import Exit
from tests.integration import roundtrip
from tests.integration.pg_helpers import Host, script
from tests.testbed.postgres import PostgresServer

Fresh = Callable[..., PostgresServer]

REMADE = """
\\connect template1
DROP DATABASE postgres;
CREATE DATABASE postgres TEMPLATE template0 ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C';
\\connect postgres
ALTER DATABASE template1 IS_TEMPLATE false;
DROP DATABASE template1;
CREATE DATABASE template1 TEMPLATE template0 ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C' IS_TEMPLATE true;
CREATE TABLE latin AS SELECT chr(228) AS a;
CREATE DATABASE bytes TEMPLATE template0 ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C';
\\connect bytes
CREATE TABLE raw AS SELECT E'\\xe4\\xff'::text AS no_utf8;
"""


@pytest.mark.parametrize(
    "version",
    [
        pytest.param(15, marks=[pytest.mark.postgres15, pytest.mark.slow, pytest.mark.faults]),
        pytest.param(18, marks=[pytest.mark.postgres18, pytest.mark.slow, pytest.mark.faults]),
    ],
)
def test_databases_keep_their_encodings(
    version: int, fresh_pg: Fresh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sync", lambda: None)
    server = fresh_pg(version)
    script(server, REMADE)
    asked = "SELECT datname, pg_encoding_to_char(encoding), datcollate FROM pg_database ORDER BY 1"
    raw = "SELECT encode(convert_to(no_utf8, 'SQL_ASCII'), 'hex') FROM raw"
    before = script(server, asked), script(server, raw, "bytes")
    assert before[1] == "e4ff"
    host = Host(server, store={"mode": "dump"})
    host.good_backup()
    done = host.restore()
    assert done.code is Exit.OK, done
    assert (script(server, asked), script(server, raw, "bytes")) == before
    assert script(server, "SELECT ascii(a) FROM latin") == "228"
    assert roundtrip.databases(server) == ["bytes", "postgres", "template1"]
