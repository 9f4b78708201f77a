"""Databases of other encodings and locales than the cluster's come back with them, from a dump."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hq_backups.engine.errors import Exit
from tests.integration import roundtrip
from tests.integration.pg_helpers import Host, script
from tests.testbed.postgres import PostgresServer

Fresh = Callable[..., PostgresServer]

LONG = (pytest.mark.slow, pytest.mark.faults)
ICU, LIBC = "LOCALE_PROVIDER icu ICU_LOCALE 'de-u-co-phonebk'", "LOCALE_PROVIDER libc LC_COLLATE 'C'"
BUILTIN = "LOCALE_PROVIDER builtin BUILTIN_LOCALE"
LANGUAGES = """
SELECT datname, encoding, datcollate, datctype, to_jsonb(d) ->> 'datlocprovider',
  coalesce(to_jsonb(d) ->> 'datlocale', to_jsonb(d) ->> 'daticulocale') FROM pg_database d ORDER BY 1;
"""
WORDS = "SELECT string_agg(w, ' ' ORDER BY w) FROM (VALUES ('Zug'), ('ärger'), ('afer'), ('Aal')) t (w)"

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
        pytest.param(15, marks=[pytest.mark.postgres15, *LONG]),
        pytest.param(18, marks=[pytest.mark.postgres18, *LONG]),
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


@pytest.mark.parametrize(
    ("version", "cluster", "postgres", "template1"),
    [
        pytest.param(15, (), ICU, "LOCALE_PROVIDER icu ICU_LOCALE 'sv'", marks=pytest.mark.postgres15),
        pytest.param(
            15, ("--locale-provider=icu", "--icu-locale=de"), LIBC, ICU, marks=[pytest.mark.postgres15, *LONG]
        ),
        pytest.param(18, (), f"{BUILTIN} 'C.UTF-8'", f"{BUILTIN} 'C'", marks=[pytest.mark.postgres18, *LONG]),
        pytest.param(
            18,
            ("--locale-provider=builtin", "--builtin-locale=C.UTF-8"),
            LIBC,
            f"{BUILTIN} 'PG_UNICODE_FAST'",
            marks=[pytest.mark.postgres18, *LONG],
        ),
    ],
    ids=["icu-in-libc", "libc-in-icu", "builtin-in-libc", "libc-in-builtin"],
)
def test_databases_keep_their_locale_providers(
    version: int,
    cluster: tuple[str, ...],
    postgres: str,
    template1: str,
    fresh_pg: Fresh,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.sync", lambda: None)
    server = fresh_pg(version, initdb_args=cluster)
    script(
        server,
        f"""
        \\connect template1
        DROP DATABASE postgres;
        CREATE DATABASE postgres TEMPLATE template0 {postgres};
        \\connect postgres
        ALTER DATABASE template1 IS_TEMPLATE false;
        DROP DATABASE template1;
        CREATE DATABASE template1 TEMPLATE template0 {template1} IS_TEMPLATE true;
        CREATE DATABASE hq TEMPLATE template0 {postgres};
        """,
    )
    names = ("postgres", "template1", "hq")
    before = [script(server, LANGUAGES), *(script(server, WORDS, name) for name in names)]
    host = Host(server, store={"mode": "dump"})
    host.good_backup()
    done = host.restore()
    assert done.code is Exit.OK, done
    assert [script(server, LANGUAGES), *(script(server, WORDS, name) for name in names)] == before
