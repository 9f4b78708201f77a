"""What is read out of a dump as it passes, and what is changed in it on its way into a server."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from hq_backups.engine.errors import BadManifest
from hq_backups.engine.postgres.dump import Mender, Scanner, connected, statements, table_name
from hq_backups.engine.postgres.load import Changes
from hq_backups.engine.postgres.replay import cluster_of, literal, replay_sql

HEAD = b"""--
-- PostgreSQL database cluster dump
--

\\restrict abc

SET default_transaction_read_only = off;

DROP DATABASE IF EXISTS hq;
DROP ROLE hq;
DROP DATABASE template1;
CREATE ROLE postgres;
ALTER ROLE postgres WITH SUPERUSER LOGIN PASSWORD 'a;b';
CREATE ROLE "it's ""hq"" ;";
COMMENT ON ROLE "it's ""hq"" ;" IS 'two
CREATE ROLE postgres;
';
CREATE TABLESPACE "fa st" OWNER postgres LOCATION '/srv/it''s';
CREATE TABLESPACE plain OWNER postgres LOCATION '/srv/plain';
"""
BODY = b"""
\\connect template1

-- Dumped from database version 14.9 (Debian)
CREATE DATABASE hq WITH TEMPLATE = template0 ENCODING = 'UTF8' LOCALE_PROVIDER = libc LOCALE = 'C.UTF-8';
\\connect -reuse-previous=on "dbname='it\\'s a ""x""'"
SET transaction_timeout = 0;
CREATE FUNCTION f() RETURNS text AS $_$
COPY public.no (a) FROM stdin;
SET transaction_timeout = 0;
\\.
\\connect nowhere
--
-- PostgreSQL database cluster dump complete
--

$_$;
/* COPY public.no (a) FROM stdin;
*/
COPY public.one (a, "b (") FROM stdin;
1\t $$ '
2\t LOCALE_PROVIDER = libc
SET transaction_timeout = 0;
\\.

COPY "s.t"."two
lines"  FROM stdin;
\\.
COPY public.one (a, "b (") FROM stdin;
3\t "
\\.
"""
END = b"""
--
-- PostgreSQL database cluster dump complete
--

"""
WHOLE = HEAD + BODY + END


def scanned(data: bytes, piece: int, major: int | None = None) -> tuple[Scanner, bytes]:
    scanner = Scanner(major)
    mender = Mender(scanner)
    out = b"".join(mender.feed(data[at : at + piece]) for at in range(0, len(data), piece)) + mender.end()
    return scanner, out


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 61, 500, 1 << 20])
def test_a_dump_is_understood_however_it_is_cut(piece: int) -> None:
    scanner, out = scanned(WHOLE, piece)
    assert scanner.problem() is None
    assert out == WHOLE
    assert scanner.databases == ["template1", 'it\'s a "x"']
    assert scanner.rows() == {
        "template1": {},
        'it\'s a "x"': {"public.one": 4, '"s.t"."two\nlines"': 0},
    }
    assert [c.rows for c in scanner.copies] == [3, 0, 1]
    assert scanner.version == (14, 9)
    assert scanner.head_end == len(HEAD) + 1


def test_every_cut_of_a_dump_is_noticed() -> None:
    for length in range(len(WHOLE)):
        scanner = Scanner()
        scanner.feed(WHOLE[:length])
        assert scanner.problem() is not None, length
    assert Scanner().problem() == "it is empty"


def test_what_follows_the_end_makes_it_none() -> None:
    for more in (b"SELECT 1;\n", b"\\connect x\n", b"COPY public.a FROM stdin;\n\\.\n", b"\n"):
        scanner = Scanner()
        scanner.feed(WHOLE + more)
        assert scanner.problem() is not None, more
    scanner = Scanner()
    scanner.feed(WHOLE + b"\\unrestrict abc\n\n")
    assert scanner.problem() is None


@pytest.mark.parametrize("piece", [1, 13, 1 << 20])
def test_what_an_old_server_refuses_is_blanked_where_it_is_a_command(piece: int) -> None:
    _, out = scanned(WHOLE, piece, 14)
    assert len(out) == len(WHOLE)
    assert b"ENCODING = 'UTF8'" + b" " * len(" LOCALE_PROVIDER = libc") + b" LOCALE = " in out
    assert out.count(b"SET transaction_timeout = 0;") == 2
    assert out.count(b"LOCALE_PROVIDER") == 1
    _, untouched = scanned(WHOLE, piece, 18)
    assert untouched == WHOLE


def test_a_long_dump_takes_little_memory() -> None:
    scanner, dice = Scanner(), random.Random(1)
    scanner.feed(HEAD + b"\n\\connect a\nCOPY public.t (a) FROM stdin;\n")
    for _ in range(40):
        scanner.feed(dice.randbytes(1 << 16).replace(b"\\", b"x"))
        assert len(scanner._data) < 200_000
    scanner.feed(b"\n\\.\n-- " + b"x" * (5 << 20))
    scanner.feed(b"y" * (1 << 20))
    assert len(scanner._data) < 2 << 20


@pytest.mark.parametrize(
    ("line", "name"),
    [
        (b"\\connect hq", "hq"),
        (b'\\connect "old ""x"" spelling"', 'old "x" spelling'),
        (b"\\connect -reuse-previous=on \"dbname='-a\\\\\\\\b'\"", "-a\\\\b"),
        (b'\\connect -reuse-previous=on "dbname=plain-x"', "plain-x"),
        (b"\\connect a b c", None),
    ],
)
def test_both_spellings_of_connect_are_read(line: bytes, name: str | None) -> None:
    assert connected(line) == name


def test_the_head_loses_only_what_no_server_would_take() -> None:
    assert b"".join(piece for piece, _ in statements(HEAD)) == HEAD
    changes = Changes(frozenset({"postgres"}), tablespaces={"fa st": Path("/new/it's"), "plain": None})
    out = changes.apply(HEAD)
    assert out.count(b"\n") == HEAD.count(b"\n"), "errors name the lines of the dump"
    gone = {line for line in HEAD.splitlines() if line not in out.splitlines()}
    assert gone == {
        b"DROP DATABASE IF EXISTS hq;",
        b"DROP ROLE hq;",
        b"CREATE TABLESPACE \"fa st\" OWNER postgres LOCATION '/srv/it''s';",
        b"CREATE TABLESPACE plain OWNER postgres LOCATION '/srv/plain';",
    }
    assert out.count(b"CREATE ROLE postgres;") == 1, "the one inside a comment stays"
    assert b"LOCATION '/new/it''s';" in out
    kept = Changes(frozenset(), frozenset({"postgres"})).apply(HEAD)
    assert b"ALTER ROLE postgres" not in kept


def test_names_of_tables_are_spelt_in_one_way() -> None:
    assert table_name('public."user"') == table_name("public.user") == "public.user"
    assert table_name('"a.b"."c""d"') == '"a.b"."c""d"'


def test_what_is_put_back_is_quoted_and_nothing_else_is_let_in() -> None:
    assert literal("it's \\") == " E'it''s \\\\'"
    base = {"name": "postgres", "encoding": "UTF8", "collate": "C", "ctype": "C"}
    evil = {
        **base,
        "owner": 'a"; DROP',
        "comment": "'; DROP",
        "settings": [{"role": None, "values": ['search_path="$user", x\'y']}],
    }
    sql = replay_sql(cluster_of({"cluster": {"bootstrap": "postgres", "databases": [evil]}}, "m"))
    assert 'OWNER TO "a""; DROP";' in sql
    assert "IS '''; DROP';" in sql
    assert "SET \"search_path\" TO '$user', 'x''y';" in sql
    for change in (
        {"encoding": "UTF8' x"},
        {"provider": "x"},
        {"grants": [{"grantor": "a", "grantee": "b", "privilege": "ALL ON x", "grantable": False}]},
        {"comment": "a\0b"},
    ):
        with pytest.raises(BadManifest):
            cluster_of({"cluster": {"bootstrap": "postgres", "databases": [{**base, **change}]}}, "m")
    for cluster in ({"bootstrap": ""}, {"bootstrap": "x", "segment": 3}, {}, None, {"bootstrap": "x", "files": [
        {"name": "archive_command", "value": "rm -rf /", "automatic": True}]}):  # fmt: skip
        with pytest.raises(BadManifest):
            cluster_of({"cluster": cluster}, "m")
