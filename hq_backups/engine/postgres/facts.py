"""Who a server is and what it holds: recorded at backup time, compared after a restore."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hq_backups.engine.errors import HQBackupsError
from hq_backups.engine.postgres.psql import Server, query_json, query_lines

_IDENTITY = """
SELECT json_build_object(
  'version', current_setting('server_version'),
  'version_num', current_setting('server_version_num')::int,
  'system_identifier', (SELECT system_identifier::text FROM pg_control_system()),
  'timeline', (SELECT timeline_id FROM pg_control_checkpoint()),
  'in_recovery', pg_is_in_recovery(),
  'data_directory', current_setting('data_directory', true),
  'config_file', current_setting('config_file', true),
  'data_checksums', current_setting('data_checksums') = 'on',
  'wal_segment_size', current_setting('wal_segment_size'),
  'archive_mode', current_setting('archive_mode'),
  'is_superuser', current_setting('is_superuser') = 'on',
  'roles', (SELECT json_agg(rolname ORDER BY rolname) FROM pg_roles WHERE rolname !~ '^pg_'),
  'tablespaces', (SELECT coalesce(json_agg(json_build_object('oid', oid::bigint, 'name', spcname,
        'location', pg_tablespace_location(oid)) ORDER BY spcname), '[]')
      FROM pg_tablespace WHERE spcname NOT IN ('pg_default', 'pg_global')),
  'databases', (SELECT json_agg(json_build_object('name', datname, 'size', pg_database_size(oid),
        'encoding', pg_encoding_to_char(encoding), 'collate', datcollate, 'ctype', datctype,
        'connectable', datallowconn) ORDER BY datname)
      FROM pg_database)
);
"""

_CONTENTS = """
SELECT json_build_object(
  'extensions', (SELECT coalesce(json_object_agg(extname, extversion ORDER BY extname), '{}') FROM pg_extension),
  'large_objects', (SELECT count(*) FROM pg_largeobject_metadata),
  'tables', (SELECT coalesce(json_object_agg(format('%I.%I', n.nspname, c.relname), greatest(c.reltuples, 0)::bigint),
        '{}')
      FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
      WHERE c.relkind IN ('r', 'm') AND c.relpersistence = 'p' AND n.nspname !~ '^pg_'
        AND n.nspname <> 'information_schema')
);
"""

# Exact: reads every page of every table, which is what proves them.
_COUNTS = r"""
SELECT format('SELECT json_build_array(%L, count(*)) FROM ONLY %I.%I', format('%I.%I', n.nspname, c.relname),
    n.nspname, c.relname)
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
  WHERE (c.relkind = 'r' OR c.relkind = 'm' AND c.relispopulated) AND c.relpersistence = 'p'
    AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
\gexec
"""


@dataclass(frozen=True)
class Facts:
    """A server's identity and, by database, its contents."""

    identity: dict[str, Any]
    contents: dict[str, dict[str, Any]]
    unread: dict[str, str]
    """Databases that could not be looked into, with the reason."""

    @property
    def major(self) -> int:
        """Return the major version, such as 14."""
        return int(self.identity["version_num"]) // 10000

    @property
    def size(self) -> int:
        """Return the bytes of all databases."""
        return sum(int(d["size"]) for d in self.identity["databases"])

    def to_source(self) -> dict[str, Any]:
        """Return what the manifest records."""
        return {**self.identity, "contents": self.contents, "unread": self.unread}


def identity(psql: Path, server: Server) -> dict[str, Any]:
    """Ask a server who it is."""
    answer: dict[str, Any] = query_json(psql, server, "postgres", _IDENTITY)
    return answer


def gather(psql: Path, server: Server) -> Facts:
    """Ask a server who it is and what each database holds (row counts are the planner's estimates)."""
    who = identity(psql, server)
    contents: dict[str, dict[str, Any]] = {}
    unread: dict[str, str] = {}
    for database in who["databases"]:
        name = database["name"]
        if not database["connectable"]:
            continue
        try:
            contents[name] = query_json(psql, server, name, _CONTENTS)
        except HQBackupsError as error:
            unread[name] = error.message
    return Facts(who, contents, unread)


def count_rows(psql: Path, server: Server, dbname: str) -> dict[str, int]:
    """Count the rows of every permanent table of one database by reading them."""
    return dict(query_lines(psql, server, dbname, _COUNTS, timeout=24 * 3600))
