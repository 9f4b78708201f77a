"""Who a server is and what it holds: recorded at backup time, compared after a restore."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from hq_backups.engine.errors import HQBackupsError, ServiceError
from hq_backups.engine.postgres.psql import (
    LOGIN_TRIGGERS,
    Server,
    query_answered,
    query_json,
    query_lines,
    replication_rows,
)

T = TypeVar("T")

SIDE_BY_SIDE = 4
"""Connections at a time."""

_IDENTITY = """
SELECT json_build_object(
  'version', current_setting('server_version'),
  'version_num', current_setting('server_version_num')::int,
  'system_identifier', (SELECT system_identifier::text FROM pg_control_system()),
  'timeline', (SELECT timeline_id FROM pg_control_checkpoint()),
  'in_recovery', pg_is_in_recovery(),
  'data_directory', (SELECT setting FROM pg_settings WHERE name = 'data_directory'),
  'config_file', (SELECT setting FROM pg_settings WHERE name = 'config_file'),
  'data_checksums', current_setting('data_checksums') = 'on',
  'wal_segment_size', current_setting('wal_segment_size'),
  'archive_mode', current_setting('archive_mode'),
  'wal_level', current_setting('wal_level'),
  'max_wal_senders', current_setting('max_wal_senders')::int,
  'max_wal_size', (SELECT setting::bigint << 20 FROM pg_settings WHERE name = 'max_wal_size'),
  'is_superuser', current_setting('is_superuser') = 'on',
  'bootstrap_role', (SELECT rolname FROM pg_roles WHERE oid = 10),
  'roles', (SELECT json_agg(rolname ORDER BY rolname) FROM pg_roles WHERE rolname !~ '^pg_'),
  'tablespaces', (SELECT coalesce(json_agg(json_build_object('oid', oid::bigint, 'name', spcname,
        'location', pg_tablespace_location(oid),
        'size', CASE WHEN has_tablespace_privilege(oid, 'CREATE') OR pg_has_role('pg_read_all_stats', 'USAGE')
          THEN pg_tablespace_size(oid) END) ORDER BY spcname), '[]')
      FROM pg_tablespace WHERE spcname NOT IN ('pg_default', 'pg_global')),
  'databases', (SELECT json_agg(json_build_object('name', datname,
        'size', CASE WHEN has_database_privilege(oid, 'CONNECT') OR pg_has_role('pg_read_all_stats', 'USAGE')
          THEN pg_database_size(oid) END,
        'encoding', pg_encoding_to_char(encoding), 'collate', datcollate, 'ctype', datctype,
        'connectable', datallowconn) ORDER BY datname)
      FROM pg_database),
  'slots', (SELECT coalesce(json_agg(json_build_object('name', slot_name, 'type', slot_type, 'active', active,
        'held', CASE WHEN pg_is_in_recovery() THEN pg_wal_lsn_diff(pg_last_wal_replay_lsn(), restart_lsn)
          ELSE pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn) END::bigint) ORDER BY slot_name), '[]')
      FROM pg_replication_slots WHERE NOT temporary),
  'subscriptions', (SELECT coalesce(json_agg(json_build_object('name', subname, 'database', datname,
        'enabled', subenabled, 'slot', subslotname) ORDER BY datname, subname), '[]')
      FROM pg_subscription s JOIN pg_database d ON d.oid = subdbid)
);
"""

# table_bytes: heap and TOAST of what a dump holds; system catalogs and indexes are not.
_CONTENTS = """
SELECT json_build_object(
  'table_bytes', (SELECT coalesce(sum(pg_relation_size(c.oid)
          + coalesce(pg_relation_size(nullif(c.reltoastrelid, 0)), 0)), 0)
        + (SELECT pg_relation_size('pg_catalog.pg_largeobject'))
      FROM pg_class c
      WHERE c.relkind = 'r' AND c.oid >= 16384 AND c.relnamespace <> 'pg_toast'::regnamespace),
  'extensions', (SELECT coalesce(json_object_agg(extname, extversion ORDER BY extname), '{}') FROM pg_extension),
  'large_objects', (SELECT count(*) FROM pg_largeobject_metadata),
  'tables', (SELECT coalesce(json_object_agg(format('%I.%I', n.nspname, c.relname), greatest(c.reltuples, 0)::bigint),
        '{}')
      FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
      WHERE (c.relkind = 'r' OR c.relkind = 'm' AND c.relispopulated) AND c.relpersistence = 'p'
        AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'),
  'unlogged', (SELECT coalesce(json_agg(format('%I.%I', n.nspname, c.relname) ORDER BY n.nspname, c.relname), '[]')
      FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
      WHERE c.relkind = 'r' AND c.relpersistence = 'u')
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
        return sum(int(d["size"] or 0) for d in self.identity["databases"])

    def to_source(self) -> dict[str, Any]:
        """Return what the manifest records."""
        return {**self.identity, "contents": self.contents, "unread": self.unread}


def identity(psql: Path, server: Server) -> dict[str, Any]:
    """Ask a server who it is."""
    answer: dict[str, Any] = first_answer(psql, server, _IDENTITY)
    return answer


def first_answer(psql: Path, server: Server, sql: str, *, timeout: float = 600) -> Any:
    """Ask a server of which nothing is known yet, past a trigger on login that lets nobody in if need be."""
    try:
        return query_json(psql, server, "postgres", sql, timeout=timeout)
    except ServiceError as error:
        past = server.of(LOGIN_TRIGGERS, superuser=True)
        try:
            return query_json(psql, past, "postgres", sql, timeout=timeout)
        except HQBackupsError:  # an older server, which knows no such setting, or a user who may not make it
            raise error from None


def gather(psql: Path, server: Server) -> Facts:
    """Ask a server who it is and what each database holds (row counts are the planner's estimates)."""
    who = identity(psql, server)
    server = server.of(int(who["version_num"]) // 10000, superuser=who["is_superuser"])
    contents: dict[str, dict[str, Any]] = {}
    unread: dict[str, str] = {}
    asked = {
        database["name"]: partial(query_json, psql, server, database["name"], _CONTENTS)
        for database in who["databases"]
        if database["connectable"]
    }
    for name, answer in side_by_side(asked).items():
        if isinstance(answer, HQBackupsError):
            unread[name] = answer.message
        else:
            contents[name] = answer
    return Facts(who, contents, unread)


def side_by_side(questions: Mapping[str, Callable[[], T]]) -> dict[str, T | HQBackupsError]:
    """Ask several questions, a few at a time, and return each one's answer or what kept it from coming.

    A connection costs a server far more than most answers do, and each waits for a program to start.
    """
    with ThreadPoolExecutor(SIDE_BY_SIDE, "hqb-ask") as pool:
        asked = {name: pool.submit(question) for name, question in questions.items()}
    answers: dict[str, T | HQBackupsError] = {}
    for name, future in asked.items():
        try:
            answers[name] = future.result()
        except HQBackupsError as error:
            answers[name] = error
    return answers


def count_rows(psql: Path, server: Server, dbname: str) -> dict[str, int]:
    """Count the rows of every permanent table of one database by reading them; raises explained errors."""
    return dict(query_lines(psql, server, dbname, _COUNTS, timeout=24 * 3600))


def count_readable(psql: Path, server: Server, dbname: str) -> tuple[dict[str, int], str]:
    """Count like count_rows, past tables that cannot be read.

    A table that cannot be read is not in the answer; beside it stands what the server said.
    """
    rows, said = query_answered(psql, server, dbname, _COUNTS, timeout=24 * 3600)
    return dict(rows), said


_ASKED = {
    "version": "server_version",
    "version_num": "server_version_num",
    "wal_segment_size": "wal_segment_size",
    "archive_mode": "archive_mode",
    "data_checksums": "data_checksums",
    "wal_level": "wal_level",
    "max_wal_senders": "max_wal_senders",
}


def identity_by_replication(psql: Path, server: Server) -> dict[str, Any]:
    """Ask a server who it is over a replication connection: all that a user may who can only replicate."""
    (system, timeline, *_), *answers = replication_rows(
        psql, server, "IDENTIFY_SYSTEM", *(f"SHOW {name}" for name in _ASKED.values())
    )
    asked = dict(zip(_ASKED, (answer[0] for answer in answers), strict=True))
    in_recovery = None
    if int(asked["version_num"]) >= 140000:
        in_recovery = replication_rows(psql, server, "SHOW in_hot_standby")[0][0] == "on"
    return {
        **asked,
        "version_num": int(asked["version_num"]),
        "max_wal_senders": int(asked["max_wal_senders"]),
        "data_checksums": asked["data_checksums"] == "on",
        "system_identifier": system,
        "timeline": int(timeline),
        "in_recovery": in_recovery,
        "is_superuser": False,
        "roles": [],
        "databases": [],
        "tablespaces": [],
        "slots": [],
        "subscriptions": None,
    }


def gather_by_replication(psql: Path, server: Server, reason: str) -> Facts:
    """Return what a replication connection tells; every database is unread for ``reason``."""
    return Facts(identity_by_replication(psql, server), {}, {"*": reason})
