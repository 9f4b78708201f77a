"""What initdb and a load of pg_dumpall's SQL would lose: recorded with a dump, put back after it was loaded.

pg_dumpall writes the contents of ``postgres`` and ``template1``, but not what is set on the databases themselves,
nor anything of the cluster that initdb decides. It is recorded as facts, not as SQL: a manifest is untrusted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hq_backups.engine.config import from_plain
from hq_backups.engine.errors import BadManifest, HQBackupsError, UsageError
from hq_backups.engine.postgres.psql import Server, query_json, query_lines

TEMPLATES = ("postgres", "template1", "template0")
"""The databases that initdb makes."""

_RECORD = """
SELECT json_build_object(
  'bootstrap', (SELECT rolname FROM pg_roles WHERE oid = 10),
  'segment', (SELECT setting::bigint FROM pg_settings WHERE name = 'wal_segment_size'),
  'checksums', current_setting('data_checksums') = 'on',
  'databases', (SELECT json_agg(json_build_object(
      'name', d.datname, 'encoding', pg_encoding_to_char(d.encoding), 'collate', d.datcollate, 'ctype', d.datctype,
      'provider', to_jsonb(d) ->> 'datlocprovider', 'rules', to_jsonb(d) ->> 'daticurules',
      'locale', coalesce(to_jsonb(d) ->> 'datlocale', to_jsonb(d) ->> 'daticulocale'),
      'owner', pg_get_userbyid(d.datdba), 'connections', d.datconnlimit, 'template', d.datistemplate,
      'comment', shobj_description(d.oid, 'pg_database'),
      'granted', d.datacl IS NOT NULL,
      'grants', (SELECT coalesce(json_agg(json_build_object('grantor', pg_get_userbyid(a.grantor),
            'grantee', CASE WHEN a.grantee <> 0 THEN pg_get_userbyid(a.grantee) END,
            'privilege', a.privilege_type, 'grantable', a.is_grantable) ORDER BY a.n), '[]')
          FROM aclexplode(d.datacl) WITH ORDINALITY a(grantor, grantee, privilege_type, is_grantable, n)),
      'settings', (SELECT coalesce(json_agg(json_build_object('role', r.rolname, 'values', s.setconfig)), '[]')
          FROM pg_db_role_setting s LEFT JOIN pg_roles r ON r.oid = s.setrole WHERE s.setdatabase = d.oid)
    )) FROM pg_database d WHERE d.datname IN ('postgres', 'template1', 'template0')));
"""

# Only what the server itself could use: a line that it does not know would keep the restored one from starting.
_FILES = """
SELECT json_build_object('name', name, 'value', setting, 'automatic', sourcefile LIKE '%/postgresql.auto.conf')
  FROM pg_file_settings WHERE name IS NOT NULL AND setting IS NOT NULL
    AND (error IS NULL OR error = 'setting could not be applied') ORDER BY seqno;
"""
_SECRET = re.compile(
    r"conninfo|_command\Z|pass|secret|token|credential|_key\Z|_library\Z|restore_|recovery_", re.IGNORECASE
)
"""Settings that can hold a password, run a program, or make a standby of the restored server."""
_PLACES = frozenset({"data_directory", "hba_file", "ident_file", "config_file", "external_pid_file"})

_PRIVILEGES = frozenset({"CREATE", "TEMPORARY", "CONNECT"})
_LISTS = frozenset(
    {
        "local_preload_libraries",
        "search_path",
        "session_preload_libraries",
        "shared_preload_libraries",
        "temp_tablespaces",
        "unix_socket_directories",
    }
)
"""Settings whose value is a list of quoted names (GUC_LIST_QUOTE)."""


@dataclass(frozen=True)
class Grant:
    """One privilege on a database."""

    grantor: str
    grantee: str | None
    """None is everybody (PUBLIC)."""
    privilege: str
    grantable: bool


@dataclass(frozen=True)
class Settings:
    """What is SET for a database, or for one role in it."""

    role: str | None
    values: tuple[str, ...]
    """``name=value``."""


@dataclass(frozen=True)
class Database:
    """One of the databases that initdb makes, as it was."""

    name: str
    encoding: str
    collate: str
    ctype: str
    provider: str | None = None
    """``c`` libc, ``i`` ICU, ``b`` built in; None before version 15."""
    rules: str | None = None
    locale: str | None = None
    """Of ICU, or built in."""
    owner: str = ""
    """Empty is the bootstrap role."""
    connections: int = -1
    template: bool = False
    comment: str | None = None
    granted: bool = False
    """Whether privileges were ever changed; ``grants`` says how."""
    grants: tuple[Grant, ...] = ()
    settings: tuple[Settings, ...] = ()

    @property
    def language(self) -> tuple[str | None, ...]:
        """Return encoding and locales: what must be said when a database is made."""
        return (self.encoding, self.collate, self.ctype, self.provider or "c", self.locale, self.rules)


@dataclass(frozen=True)
class Setting:
    """One line of the server's configuration files."""

    name: str
    value: str
    automatic: bool
    """Whether ALTER SYSTEM wrote it."""


@dataclass(frozen=True)
class Cluster:
    """What initdb decides, and what a dump does not carry."""

    bootstrap: str
    segment: int = 16 << 20
    """Bytes of a WAL segment."""
    checksums: bool = True
    databases: tuple[Database, ...] = ()
    files: tuple[Setting, ...] = ()

    def database(self, name: str) -> Database:
        """Return one of the databases that initdb makes; one that was gone is as template0 was."""
        known = {each.name: each for each in self.databases}
        return known.get(name) or known.get("template0") or Database(name, "UTF8", "C.UTF-8", "C.UTF-8")


def record(psql: Path, server: Server) -> dict[str, Any]:
    """Ask a server for what a dump does not carry; settings that can hold secrets are left out."""
    cluster: dict[str, Any] = query_json(psql, server, "postgres", _RECORD)
    try:
        lines = query_lines(psql, server, "postgres", _FILES)
    except HQBackupsError:  # readable for superusers only
        lines = []
    last = {each["name"]: each for each in lines}
    cluster["files"] = [e for n, e in last.items() if not _SECRET.search(n) and n not in _PLACES]
    return cluster


def cluster_of(source: Mapping[str, Any], name: str) -> Cluster:
    """Read what a manifest records; raises BadManifest."""
    try:
        cluster = from_plain(Cluster, source["cluster"])
        _check(cluster)
        _check_roles(source.get("roles", []))
    except (KeyError, UsageError, ValueError) as error:
        raise BadManifest(f"what it says of the cluster makes no sense ({error})", name=name) from error
    return cluster


def _check(cluster: Cluster) -> None:
    words = [cluster.bootstrap]
    for each in cluster.databases:
        words += [each.name, each.owner, each.collate, each.ctype, each.locale or "", each.rules or ""]
        words += [each.comment or "", *(v for s in each.settings for v in (s.role or "", *s.values))]
        words += [v for g in each.grants for v in (g.grantor, g.grantee or "")]
        if not re.fullmatch(r"[A-Za-z0-9_]{1,30}", each.encoding):
            raise ValueError("an encoding is no word")
        if each.provider not in (None, "c", "i", "b"):
            raise ValueError("a locale provider is unknown")
        if any(g.privilege not in _PRIVILEGES for g in each.grants):
            raise ValueError("a privilege is unknown")
    for line in cluster.files:
        words += [line.name, line.value]
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_$.]*", line.name) or "\n" in line.value:
            raise ValueError("a setting is none")
        if _SECRET.search(line.name):
            raise ValueError("a setting is one that is never recorded")
    if any("\0" in word for word in words):
        raise ValueError("a zero byte is in a name")
    if not cluster.bootstrap or cluster.bootstrap.startswith("pg_"):
        raise ValueError("its bootstrap role has no possible name")
    if cluster.segment not in [1 << n for n in range(20, 31)]:
        raise ValueError("its WAL segment size is impossible")


def _check_roles(roles: object) -> None:
    if not isinstance(roles, (list, tuple)) or not all(isinstance(each, str) for each in roles):
        raise ValueError("its roles are no list of names")


def identifier(name: str) -> str:
    """Quote a name for SQL."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """Quote a text for SQL, whatever standard_conforming_strings is."""
    quoted = "'" + text.replace("'", "''").replace("\\", "\\\\") + "'"
    return " E" + quoted if "\\" in text else quoted


def language_sql(database: Database) -> str:
    """Return CREATE DATABASE's options for a database's encoding and locales."""
    said = f"TEMPLATE template0 ENCODING {literal(database.encoding)}"
    said += f" LC_COLLATE {literal(database.collate)} LC_CTYPE {literal(database.ctype)}"
    if database.provider == "i":
        said += f" LOCALE_PROVIDER icu ICU_LOCALE {literal(database.locale or '')}"
        said += f" ICU_RULES {literal(database.rules)}" if database.rules else ""
    elif database.provider == "b":
        said += f" LOCALE_PROVIDER builtin BUILTIN_LOCALE {literal(database.locale or '')}"
    elif database.provider == "c":  # else it is template0's
        said += " LOCALE_PROVIDER libc"
    return said


def remade(database: Database) -> str:
    """Return SQL, for another database than this one, that makes it anew and empty."""
    name = identifier(database.name)
    template = f"ALTER DATABASE {name} IS_TEMPLATE"
    return (
        f"{template} false;\nDROP DATABASE {name};\nCREATE DATABASE {name} {language_sql(database)};\n"
        f"{template} {'true' if database.name == 'template1' else 'false'};\n"
    )


def replay_sql(cluster: Cluster) -> str:
    """Return SQL that puts back what is set on the databases that initdb makes."""
    return "".join(f"{line};\n" for line in replay_steps(cluster))


def replay_steps(cluster: Cluster) -> list[str]:
    """Return the same in steps, each of which holds or fails by itself; two that are equal do the same."""
    known = [each for each in cluster.databases if each.name in ("postgres", "template1")]
    return [step for each in known for step in _on_database(each, cluster.bootstrap)]


def _on_database(database: Database, bootstrap: str) -> Iterator[str]:
    name, owner = identifier(database.name), database.owner or bootstrap
    yield f"ALTER DATABASE {name} OWNER TO {identifier(owner)}"
    yield f"ALTER DATABASE {name} CONNECTION LIMIT {database.connections}"
    yield f"ALTER DATABASE {name} IS_TEMPLATE {'true' if database.template else 'false'}"
    comment = "NULL" if database.comment is None else literal(database.comment)
    yield f"COMMENT ON DATABASE {name} IS {comment}"
    if database.granted:
        lines = [f"REVOKE ALL ON DATABASE {name} FROM {whom}" for whom in ("PUBLIC", identifier(owner))]
        # The owner's first: others pass on what they were given.
        for grant in sorted(database.grants, key=lambda g: g.grantor != owner):
            lines += _granting(grant, name, owner)
        yield ";\n".join(lines)
    for each in database.settings:
        where = f"ALTER DATABASE {name} SET "
        if each.role is not None:
            where = f"ALTER ROLE {identifier(each.role)} IN DATABASE {name} SET "
        for setting in each.values:
            key, _, value = setting.partition("=")
            yield f"{where}{identifier(key)} TO {_value(key, value)}"


def _granting(grant: Grant, database: str, owner: str) -> Iterator[str]:
    to = "PUBLIC" if grant.grantee is None else identifier(grant.grantee)
    option = " WITH GRANT OPTION" if grant.grantable else ""
    if grant.grantor != owner:
        yield f"SET ROLE {identifier(grant.grantor)}"
    yield f"GRANT {grant.privilege} ON DATABASE {database} TO {to}{option}"
    if grant.grantor != owner:
        yield "RESET ROLE"


def _value(name: str, value: str) -> str:
    if name.lower() not in _LISTS:
        return literal(value)
    parts = re.findall(r"\"(?:[^\"]|\"\")*\"|[^,\"\s]+", value)
    names = [p[1:-1].replace('""', '"') if p.startswith('"') else p for p in parts]
    return ", ".join(map(literal, names)) or "''"
