"""What a cluster holds, in words that can be compared: before a backup, and after its restore.

pg_dump's text of every database, pg_dumpall's globals (passwords, memberships, settings, comments), where each
relation lies, and a checksum over every table. Usable for both modes, and for every version.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import subprocess
from collections.abc import Mapping

from tests.integration.pg_helpers import script
from tests.testbed.postgres import SUPERUSER, PostgresServer
from tests.testbed.process import as_user

BUSY = ("pgbench",)
"""Databases that a load writes to while the backup runs: nothing of them can be equal."""

Snapshot = dict[str, str]

_DATABASES = """
SELECT coalesce(json_agg(datname ORDER BY datname), '[]') FROM pg_database WHERE datallowconn;
"""
# What neither tool writes down: databases that let nobody in, and which tablespace each one is in.
_CLUSTER = """
SELECT datname, pg_get_userbyid(datdba), pg_encoding_to_char(encoding), datcollate, datctype, datallowconn,
  datistemplate, datconnlimit, datacl, shobj_description(oid, 'pg_database'),
  (SELECT spcname FROM pg_tablespace s WHERE s.oid = dattablespace)
  FROM pg_database WHERE datname NOT IN ({skipped}) ORDER BY datname;
SELECT rolname, rolsuper, rolreplication, rolbypassrls, rolpassword FROM pg_authid WHERE rolname !~ '^pg_'
  ORDER BY rolname;
"""
_PLACEMENT = """
SELECT c.oid::regclass, c.relkind, coalesce(s.spcname, 'its database''s')
  FROM pg_class c LEFT JOIN pg_tablespace s ON s.oid = c.reltablespace
  WHERE c.oid >= 16384 AND c.relnamespace::regnamespace::text !~ '^pg_' ORDER BY c.oid::regclass::text;
"""
_CHECKSUMS = r"""
SELECT 'large object', loid, md5(lo_get(loid)) FROM (SELECT oid AS loid FROM pg_largeobject_metadata) l ORDER BY loid;
SELECT schemaname, sequencename, last_value FROM pg_sequences ORDER BY 1, 2;
SELECT format('SELECT %L, count(*), md5(string_agg(t::text, chr(10) ORDER BY t::text)) FROM ONLY %s t',
    oid::regclass, oid::regclass)
  FROM pg_class WHERE (relkind = 'r' OR relkind = 'm' AND relispopulated) AND relpersistence = 'p'
    AND oid >= 16384 AND relnamespace::regnamespace::text !~ '^pg_' ORDER BY oid::regclass::text
\gexec
"""
_RANDOM = re.compile(r"^\\(?:un)?restrict .*\n", re.MULTILINE)
_LOCATION = re.compile(r"(CREATE TABLESPACE .* LOCATION) .*")


def snapshot(server: PostgresServer, skip: tuple[str, ...] = BUSY) -> Snapshot:
    """Return all that a cluster holds, by what was asked; ``skip`` names databases to leave out."""
    skipped = ", ".join("'{}'".format(name.replace("'", "''")) for name in ("", *skip))
    globals_ = _program(server, "pg_dumpall", "--globals-only", "--dbname", _conninfo(server, "postgres"))
    found = {
        "globals": _LOCATION.sub(r"\1 …", globals_),
        "cluster": script(server, _CLUSTER.format(skipped=skipped)),
    }
    for name in databases(server):
        if name in skip:
            continue
        found[f"{name}: placement and checksums"] = script(server, _PLACEMENT + _CHECKSUMS, name)
        # Unlogged tables come back empty from a base backup; --create refuses a name of two lines.
        options = ["--no-unlogged-table-data", *([] if "\n" in name else ["--create"])]
        found[f"{name}: pg_dump"] = _program(server, "pg_dump", *options, "--dbname", _conninfo(server, name))
    return found


def databases(server: PostgresServer) -> list[str]:
    """Return the databases that let somebody in, template1 included."""
    names: list[str] = json.loads(script(server, _DATABASES))
    return names


def assert_same(before: Mapping[str, str], after: Mapping[str, str]) -> None:
    """Show the first lines that differ."""
    assert sorted(before) == sorted(after)
    for what, text in before.items():
        if text != after[what]:
            lines = difflib.unified_diff(
                text.splitlines(), after[what].splitlines(), "before", "after", lineterm="", n=1
            )
            raise AssertionError(f"{what} differs:\n" + "\n".join([*lines][:60]))


def digest(found: Mapping[str, str]) -> str:
    """Return one hash of a snapshot."""
    text = "\0".join(f"{what}\0{found[what]}" for what in sorted(found))
    return hashlib.sha256(text.encode()).hexdigest()


def _conninfo(server: PostgresServer, dbname: str) -> str:
    quoted = dbname.replace("\\", "\\\\").replace("'", "\\'")
    return f"host='{server.socket_dir}' port={server.port} user={SUPERUSER} dbname='{quoted}'"


def _program(server: PostgresServer, name: str, *arguments: str) -> str:
    done = subprocess.run(
        [server.client_bin_dir / name, "--no-password", *arguments],
        capture_output=True,
        cwd="/",
        env={"PATH": os.defpath, "LC_ALL": "C.UTF-8", "PGPASSWORD": server.password},
        check=False,
        **as_user(server.os_user),
    )
    assert done.returncode == 0, done.stderr.decode()
    return _RANDOM.sub("", done.stdout.decode())
