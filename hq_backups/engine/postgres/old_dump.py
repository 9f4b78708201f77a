"""What a dump without a manifest tells of the server that it was taken from."""

from __future__ import annotations

import re
from typing import Any

from hq_backups.engine.errors import CorruptBackup
from hq_backups.engine.postgres import dump
from hq_backups.engine.postgres.dump import CREATE_ROLE, IDENTIFIER, Scanner, text_of, unquoted

_NAME = rb"(" + IDENTIFIER + rb")"
_SUPERUSER = re.compile(rb"ALTER ROLE " + _NAME + rb" WITH SUPERUSER\b")
_TABLESPACE = re.compile(rb"CREATE TABLESPACE " + _NAME + rb" .*?LOCATION '((?:[^']|'')*)'.*;\Z", re.DOTALL)


def source_of(scanner: Scanner, head: bytes, default_major: int | None, name: str) -> dict[str, Any]:
    """Return what a manifest's ``source`` would say, as far as the dump tells; raises CorruptBackup.

    Dumps of before version 10 do not say their server's version: then it is this host's.
    """
    if not scanner.databases:
        raise CorruptBackup("no database is in it", name=name)
    roles: list[str] = []
    supers: list[str] = []
    tablespaces: list[dict[str, Any]] = []
    for piece, is_statement in dump.statements(head):
        said = piece.strip()
        if not is_statement:
            continue
        if found := CREATE_ROLE.match(said):
            roles.append(unquoted(found[1]))
        elif found := _SUPERUSER.match(said):
            supers.append(unquoted(found[1]))
        elif found := _TABLESPACE.match(said):
            location = text_of(found[2].replace(b"''", b"'"))
            # Its oid is not in a dump: its place in the list is as good a name.
            tablespaces.append({"oid": len(tablespaces), "name": unquoted(found[1]), "location": location})
    major, minor = scanner.version or (default_major, 0)
    if major is None:
        raise CorruptBackup(
            "it does not say of which version of PostgreSQL it is",
            name=name,
            hint="Set postgresql_version, and the dump is taken for one of that version.",
        )
    rows = scanner.rows()
    return {
        "version": f"{major}.{minor}" if scanner.version else str(major),
        # Before version 10 a major version had two parts.
        "version_num": major * 10000 + (minor if major >= 10 else minor * 100),
        "databases": [{"name": each} for each in rows],
        "roles": sorted(set(roles)),
        "tablespaces": tablespaces,
        "contents": {database: {"tables": tables} for database, tables in rows.items()},
        "rows": rows,
        "cluster": {"bootstrap": "postgres" if "postgres" in supers else (supers or ["postgres"])[0]},
    }
