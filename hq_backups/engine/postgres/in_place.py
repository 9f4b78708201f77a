"""Emptying a running server whose data directory is not ours, so that a dump can be loaded into it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hq_backups.engine.errors import HQBackupsError
from hq_backups.engine.events import Events
from hq_backups.engine.postgres import replay, rights
from hq_backups.engine.postgres.psql import Server, query_json, query_lines

_SHOWN = 20
THEIRS = frozenset({"rdsadmin", "azure_maintenance", "azure_sys", "cloudsqladmin"})
"""Databases that hosting services keep for themselves."""
_BASE = ("postgres", "template1")

_LISTED = """
SELECT json_build_object(
  'databases', (SELECT coalesce(json_agg(datname ORDER BY datname), '[]') FROM pg_database
      WHERE datname NOT IN ('postgres', 'template0', 'template1')),
  'roles', (SELECT coalesce(json_agg(rolname ORDER BY rolname), '[]') FROM pg_roles
      WHERE rolname !~ '^(pg_|rds|azure|cloudsql)' AND oid <> 10 AND rolname <> current_user
        AND (NOT rolsuper OR current_setting('is_superuser') = 'on')));
"""
_OBJECTS = """
SELECT coalesce(json_agg(c.oid::regclass::text), '[]') FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
  WHERE c.relkind IN ('r', 'p', 'v', 'm', 'S', 'f') AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
    AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = c.oid AND d.classid = 'pg_class'::regclass
      AND d.deptype = 'e');
"""


@dataclass(frozen=True)
class Held:
    """What a server holds that a load would meet."""

    databases: Sequence[str]
    roles: Sequence[str]
    filled: Sequence[str]
    """Those of ``postgres`` and ``template1`` that have tables of users."""

    @property
    def anything(self) -> bool:
        """Tell whether it is not empty; roles alone are no obstacle."""
        return bool(self.databases or self.filled)

    def listed(self) -> str:
        """Say what it is."""
        parts = [f"database {name!r}" for name in self.databases]
        parts += [f"tables in database {name!r}" for name in self.filled]
        more = len(parts) - _SHOWN
        return ", ".join(parts[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def contents(psql: Path, server: Server) -> Held:
    """Ask a server what it holds."""
    listed = query_json(psql, server, "postgres", _LISTED)
    filled = [name for name in _BASE if query_json(psql, server, name, _OBJECTS)]
    return Held([n for n in listed["databases"] if n not in THEIRS], listed["roles"], filled)


def empty(psql: Path, server: Server, held: Held, cluster: replay.Cluster, events: Events) -> None:
    """Drop databases, then roles; a role that something else still needs stays, and is told."""
    # Whoever is no superuser drops what is his own, or of a role that he is a member of.
    query_lines(psql, server, "postgres", rights.borrow_sql(server.major))
    for name in held.databases:
        quoted = replay.identifier(name)
        query_lines(psql, server, "postgres", f"ALTER DATABASE {quoted} IS_TEMPLATE false;")
        query_lines(psql, server, "postgres", f"DROP DATABASE {quoted} WITH (FORCE);", timeout=3600)
    for name in held.filled:
        other = "template1" if name == "postgres" else "postgres"
        query_lines(psql, server, other, replay.remade(cluster.database(name)), timeout=3600)
    for role in held.roles:
        try:
            query_lines(psql, server, "postgres", f"DROP ROLE {replay.identifier(role)};")
        except HQBackupsError as error:
            events.warning(
                "role-kept", f"role {role!r} could not be dropped, it is changed instead: {error.message}"
            )


def put_back(psql: Path, server: Server, cluster: replay.Cluster, name: str, events: Events) -> None:
    """Put back what is set on ``postgres`` and ``template1`` as far as our user may; what it may not is told."""
    now = replay.cluster_of({"cluster": replay.record(psql, server)}, name)
    done = set(replay.replay_steps(now))
    for step in replay.replay_steps(cluster):
        if step in done:
            continue
        try:
            query_lines(psql, server, "postgres", f"BEGIN;\n{step};\nCOMMIT;\n")
        except HQBackupsError as error:
            said = " ".join(step.split())
            events.warning("left-out", f"user {server.user} may not run: {said} ({error.message})")
