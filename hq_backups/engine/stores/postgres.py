"""PostgreSQL: what both of its modes share. How to reach the server, who owns it, how it is stopped and tested.

Facts: postgresql.org/docs/current/app-pgbasebackup.html, protocol-replication.html, continuous-archiving.html.
"""

from __future__ import annotations

import contextlib
import os
import pwd
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hq_backups.engine.control import Service
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
from hq_backups.engine.postgres import facts, scratch
from hq_backups.engine.postgres.psql import Server, query_json
from hq_backups.engine.postgres.tools import Tools
from hq_backups.engine.service import find_postgres_service
from hq_backups.engine.stores.base import Store

LOSS = 0.1
"""A copy with less than this part of the rows that were estimated has lost some."""
_SOCKET_DIRECTORIES = ("/var/run/postgresql", "/tmp")  # noqa: S108  where distributions put the server's socket


class PostgresStore(Store):
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
        psql = self.tools.newest("psql").path
        superuser = str(self.settings.options.get("user") or "postgres")
        with scratch.running(
            tree, major_of(manifest), self.tools, superuser=superuser, name=manifest.name
        ) as server:
            found = facts.gather(psql, server)
            counted = {}
            for database in found.contents:
                counted[database] = facts.count_rows(psql, server, database)
                rows = sum(counted[database].values())
                events.step("count", f"database {database!r}: {len(counted[database])} tables, {rows} rows")
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
            for name in sorted(names)[:20]:
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

    def target(self) -> Path:
        """Return the cluster's data directory."""
        if self.settings.data_dir is None:
            raise PreflightFailed(
                "the data directory of PostgreSQL is not known", hint="Set postgresql_data_dir."
            )
        return self.settings.data_dir

    def owner(self) -> str:
        """Return the configured user, else the data directory's owner, else its parent's, else ``postgres``."""
        if self.settings.os_user:
            return self.settings.os_user
        directory = self.settings.data_dir
        for place in (directory, directory.parent if directory else None):
            with contextlib.suppress(OSError, KeyError):
                if place is not None and (uid := place.stat().st_uid) != 0:
                    return pwd.getpwuid(uid).pw_name
        with contextlib.suppress(KeyError):
            return pwd.getpwnam("postgres").pw_name
        return pwd.getpwuid(os.geteuid()).pw_name

    def check_restore(self, manifest: Manifest, events: Events, *, in_place: bool) -> Mapping[str, Any]:
        """Check versions: a cluster serves only with the programs of its own major version."""
        major = major_of(manifest)
        if not in_place:
            return {"version": str(manifest.source.get("version", major))}
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
        commands = service.facts()
        return {
            "version": str(manifest.source.get("version", major)),
            "programs": str(programs.path.parent),
            "service": service.describe(),
            "stopped_by": [" ".join(argv) for argv in commands.get("stop", ())],
            "started_by": " ".join(commands.get("start", ())),
            "monit_paused": list(service.watched()),
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
            listed: list[str] = query_json(
                self.tools.newest("psql").path, self.server(), "postgres", sql, timeout=30
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

    def check_serving(self, manifest: Manifest | None, events: Events) -> None:
        """Ask the started server who it is."""
        server = self.server()
        who = facts.identity(self.tools.newest("psql").path, server)
        if manifest is not None and who["system_identifier"] != manifest.source.get("system_identifier"):
            raise ServiceError(
                f"another server answers at {server.where}: its system identifier is not the backup's"
            )
        events.emit(
            "check",
            name="serving",
            ok=True,
            message=f"PostgreSQL {who['version']} answers at {server.where} with {len(who['databases'])} databases",
        )

    def next_steps(self) -> list[str]:
        """Return what an operator of HQ does after PostgreSQL is back."""
        env = self.config.env
        return [
            f"commcare-cloud {env} django-manage check_services",
            f"commcare-cloud {env} django-manage list_backups --sync",
            "reset pillow checkpoints that are newer than the restored database",
            f"commcare-cloud {env} downtime end",
        ]


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
