"""PostgreSQL: what both of its modes share. How to reach the server, who owns it, how it is stopped and tested.

Facts: postgresql.org/docs/current/app-pgbasebackup.html, protocol-replication.html, continuous-archiving.html.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hq_backups.engine import accounts
from hq_backups.engine.control import Service, planned
from hq_backups.engine.errors import (
    BadManifest,
    CorruptBackup,
    HQBackupsError,
    PreflightFailed,
    ServiceError,
    WrongVersion,
)
from hq_backups.engine.events import Events
from hq_backups.engine.manifest import Manifest
from hq_backups.engine.postgres import afterwards, facts, old, scratch, tablespaces
from hq_backups.engine.postgres.psql import Server, last_line
from hq_backups.engine.postgres.tools import Tools
from hq_backups.engine.requests import RestoreRequest
from hq_backups.engine.service import find_postgres_service
from hq_backups.engine.stores.base import Outer, StreamStore

SHOWN = 20
"""How many names a message lists."""
LOSS = 0.1
"""A copy with less than this part of the rows that were estimated has lost some."""
_SOCKET_DIRECTORIES = ("/var/run/postgresql", "/tmp")  # noqa: S108  where distributions put the server's socket


class PostgresStore(StreamStore):
    """A PostgreSQL cluster."""

    name = "postgres"

    @property
    def tools(self) -> Tools:
        """Return this host's PostgreSQL programs."""
        bin_dir = self.settings.options.get("bin_dir")
        return Tools(Path(bin_dir) if bin_dir else None)

    def server(self) -> Server:
        """Return how to reach the server itself, never through pgbouncer."""
        options = self.settings.options
        user = options.get("user") or "postgres"
        port = int(options.get("port") or 5432)
        host = options.get("host") or self._socket_directory(port)
        os_user = self.owner() if os.geteuid() == 0 else None
        return Server(host, port, user, options.get("password"), os_user)

    def source(self) -> Server:
        """Return how to reach the server that is backed up: this host's, or the one that pg_backup_from names."""
        host = self.settings.options.get("backup_from")
        return dataclasses.replace(self.server(), host=str(host)) if host else self.server()

    def copier(self) -> Server:
        """Return the same server as a base backup is taken from it: by the user for that, if there is one."""
        server, options = self.source(), self.settings.options
        if not options.get("backup_from") or not options.get("replication_user"):
            return server
        return dataclasses.replace(
            server, user=str(options["replication_user"]), password=options.get("replication_password")
        )

    def _socket_directory(self, port: int) -> str:
        """Read the socket directory from the running server's pid file (its fifth line), else guess."""
        if self.settings.data_dir is not None:
            with contextlib.suppress(OSError, IndexError):
                lines = (self.settings.data_dir / "postmaster.pid").read_text().splitlines()
                if lines[4].strip():
                    return lines[4].strip()
        there = (d for d in _SOCKET_DIRECTORIES if Path(d, f".s.PGSQL.{port}").exists())
        return next(there, _SOCKET_DIRECTORIES[0])

    def deep_check(self, tree: Path, manifest: Manifest, events: Events) -> None:
        """Start the cluster on a private socket and count every row."""
        events.step("deep", "starting a server of our own on the unpacked copy")
        psql = self.tools.newest("psql").path
        recorded = manifest.source.get("bootstrap_role")
        superuser = str(self.settings.options.get("user") or recorded or "postgres")
        with scratch.running(
            tree, major_of(manifest), self.tools, superuser=superuser, name=manifest.name
        ) as server:
            found = facts.gather(psql, server)
            counted, unreadable = {}, dict(found.unread)
            for database, held in found.contents.items():
                counted[database], said = facts.count_readable(psql, server, database)
                rows = sum(counted[database].values())
                events.step("count", f"database {database!r}: {len(counted[database])} tables, {rows} rows")
                damaged = sorted(set(held["tables"]) - set(counted[database]))
                if damaged:
                    unreadable[database] = f"{', '.join(damaged[:SHOWN])} ({last_line(said)})"
        if unreadable:
            raise _damaged(unreadable, manifest)
        try:
            self._compare(found, counted, manifest, events)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise BadManifest(
                f"what it says of the server makes no sense ({error})", name=manifest.name
            ) from error

    @staticmethod
    def _compare(
        found: facts.Facts, counted: Mapping[str, Mapping[str, int]], manifest: Manifest, events: Events
    ) -> None:
        """Compare a started copy with what the manifest recorded.

        What was made or dropped while the backup ran is told and no error; the recorded row counts are the
        planner's estimates, so only a loss that no estimate explains is one.
        """
        source = manifest.source
        if found.identity["system_identifier"] != source.get("system_identifier"):
            raise CorruptBackup("its system identifier is another one", name=manifest.name)
        databases = {d["name"] for d in found.identity["databases"]}
        roles = set(found.identity["roles"])
        contents: Mapping[str, Mapping[str, Any]] = source.get("contents", {})
        missing = {
            "database": {d["name"] for d in source.get("databases", ())} - databases,
            "role": set(source.get("roles", ())) - roles,
            "table": {
                f"{database}.{table}"
                for database, held in contents.items()
                for table in held.get("tables", {})
                if table not in counted.get(database, {}) and database in databases
            },
        }
        for what, names in missing.items():
            for name in sorted(names)[:SHOWN]:
                events.warning(
                    f"{what}-missing", f"{what} {name!r} was there before the backup and is not in it"
                )
        expected = sum(sum(held.get("tables", {}).values()) for held in contents.values())
        rows = sum(sum(tables.values()) for tables in counted.values())
        if rows < expected * LOSS:
            raise CorruptBackup(f"it holds {rows} rows, the server had about {expected}", name=manifest.name)
        tables = sum(len(each) for each in counted.values())
        message = f"{len(databases)} databases, {len(roles)} roles, {tables} tables, {rows} rows, each read"
        events.emit("check", name="contents", ok=True, message=message)

    def clean_scratch(self, tree: Path) -> None:
        """Stop a scratch server that a killed run left."""
        version = read_text(tree / "PG_VERSION").strip()
        if version.isdigit():
            with contextlib.suppress(HQBackupsError):
                user = tree.owner() if os.geteuid() == 0 else None
                scratch.clean(tree, self.tools.own("pg_ctl", int(version)).path, user)

    def directory_problem(self, path: Path) -> str | None:
        """Look for what every cluster has."""
        return old.directory_problem(path)

    def outer(self, manifest: Manifest) -> tuple[Outer, ...]:
        """Return the tablespaces."""
        found = tablespaces.recorded(manifest.source, manifest.name)
        return tuple(Outer(each.oid, each.location, each.size) for each in found)

    def outside(self, tree: Path) -> list[Path]:
        """Return what a cluster of this version has in its tablespaces."""
        version = read_text(tree / "PG_VERSION").strip()
        return [
            found
            for place in tablespaces.linked(tree)
            for found in sorted(place.glob(f"PG_{version}_*"))
            if version.isdigit()
        ]

    def target(self) -> Path:
        """Return the cluster's data directory."""
        if self.settings.data_dir is None:
            raise PreflightFailed(
                "the data directory of PostgreSQL is not known", hint="Set postgresql_data_dir."
            )
        return self.settings.data_dir

    def owner(self) -> str:
        """Return the configured user, else the data directory's owner, else its parent's, else ``postgres``."""
        return self.settings.os_user or accounts.owner_of(self.settings.data_dir, "postgres")

    def check_restore(self, manifest: Manifest, request: RestoreRequest, events: Events) -> Mapping[str, Any]:
        """Check versions: a cluster serves only with the programs of its own major version."""
        major = major_of(manifest)
        about: dict[str, Any] = {"version": str(manifest.source.get("version", major))}
        if manifest.source.get("address"):
            about["taken_from"] = str(manifest.source["address"])
        quiet = afterwards.is_quiet(manifest, self.config, beside=request.target_dir is not None)
        about |= afterwards.plan_facts(manifest, quiet=quiet)
        if listed := tablespaces.recorded(manifest.source, manifest.name):
            about["outer_names"] = {each.oid: each.name for each in listed}
        if request.target_dir is not None:
            return about
        programs = self.tools.own("postgres", major)
        current = read_text(self.target() / "PG_VERSION").strip()
        configured = str(self.settings.options.get("version") or "")
        for other, what in ((current, f"{self.target()} holds"), (configured, "postgresql_version says")):
            if other and other != str(major):
                raise WrongVersion(
                    f"the backup is of PostgreSQL {major}, {what} {other}",
                    hint="Restore beside it: restore_backup postgres … --target-dir DIR",
                )
        service = self.service(manifest)
        return {
            **about,
            "programs": str(programs.path.parent),
            **planned(service),
            "connections": self._connections() if service.is_running() else [],
        }

    def _connections(self) -> list[str]:
        """List who else is connected; a server that does not answer has nobody."""
        sql = (
            "SELECT coalesce(json_agg(format('%s on %s from %s', usename, datname,"
            " coalesce(host(client_addr), 'local'))), '[]') FROM pg_stat_activity"
            " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
        )
        try:
            listed: list[str] = facts.first_answer(
                self.tools.newest("psql").path, self.server(), sql, timeout=30
            )
        except HQBackupsError:
            return []
        return listed

    def service(self, manifest: Manifest | None) -> Service:
        """Return how the server is stopped and started."""
        target = self.target()
        version = read_text(target / "PG_VERSION").strip() or (str(major_of(manifest)) if manifest else "")
        return find_postgres_service(
            target,
            version=int(version) if version.isdigit() else None,
            os_user=self.owner(),
            tools=self.tools,
            stop_command=self.settings.stop_command,
            start_command=self.settings.start_command,
        )

    def check_serving(
        self, manifest: Manifest | None, request: RestoreRequest | None, events: Events
    ) -> None:
        """Ask the started server who it is."""
        server = self.server()
        who = facts.identity(self.tools.newest("psql").path, server)
        if manifest is not None and who["system_identifier"] != self.served_identifier(manifest):
            raise ServiceError(
                f"another server answers at {server.where}: its system identifier is not the restored data's"
            )
        events.emit(
            "check",
            name="serving",
            ok=True,
            message=f"PostgreSQL {who['version']} answers at {server.where} with {len(who['databases'])} databases",
        )

    def served_identifier(self, manifest: Manifest) -> str | None:
        """Return the system identifier that the server has on the restored data."""
        found = manifest.source.get("system_identifier")
        return None if found is None else str(found)

    def next_steps(self, manifest: Manifest | None = None) -> list[str]:
        """Return what an operator of HQ does after PostgreSQL is back."""
        env = self.config.env
        quiet = manifest is not None and afterwards.is_quiet(manifest, self.config, beside=False)
        return [
            *(afterwards.steps(manifest, quiet=quiet) if manifest is not None else ()),
            f"commcare-cloud {env} django-manage check_services",
            f"commcare-cloud {env} django-manage list_backups --sync",
            "reset pillow checkpoints that are newer than the restored database",
            f"commcare-cloud {env} downtime end",
        ]


def _damaged(unreadable: Mapping[str, str], manifest: Manifest) -> CorruptBackup:
    """Return the error for a copy with tables that cannot be read."""
    listed = "; ".join(f"in database {database!r} {what}" for database, what in unreadable.items())
    message = f"the server that was started on it cannot read everything: {listed}"
    if not manifest.source.get("bad_pages"):
        return CorruptBackup(message, name=manifest.name)
    return CorruptBackup(
        message,
        name=manifest.name,
        hint="It was made with --accept-bad-pages, and is what the server held: the rest can be restored. Take those "
        "tables from an older backup (list_backups).",
    )


def major_of(manifest: Manifest) -> int:
    """Return the major version of the server that an artifact is of; raises BadManifest."""
    number = manifest.source.get("version_num")
    if not isinstance(number, int):
        raise BadManifest(f"its server's version is {number!r}", name=manifest.name)
    return number // 10000


def read_text(path: Path) -> str:
    """Return a small file's text; nothing when it cannot be read."""
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
