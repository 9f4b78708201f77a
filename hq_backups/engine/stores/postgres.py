"""PostgreSQL, mode ``plain``: one tar of the whole cluster from pg_basebackup, WAL included.

Facts: postgresql.org/docs/current/app-pgbasebackup.html, protocol-replication.html, continuous-archiving.html.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hq_backups.engine import archive, process
from hq_backups.engine.control import Service
from hq_backups.engine.errors import (
    BadManifest,
    BadPages,
    CorruptBackup,
    HQBackupsError,
    PreflightFailed,
    ProducerFailed,
    ProducerTruncated,
    ServiceError,
    WrongVersion,
)
from hq_backups.engine.events import Events
from hq_backups.engine.manifest import Manifest
from hq_backups.engine.postgres import facts, scratch
from hq_backups.engine.postgres.psql import Server, explain, query_json
from hq_backups.engine.postgres.tools import Tools
from hq_backups.engine.postgres.wal import held_wal
from hq_backups.engine.service import find_postgres_service
from hq_backups.engine.stores.base import Prepared, Store, Stream
from hq_backups.engine.streams import PlainReader

_SEGMENT = re.compile(r"pg_wal/[0-9A-F]{24}\Z")
_BAD_PAGE = re.compile(r"checksum (?:verification failed|error)|invalid page", re.IGNORECASE)
_REQUIRED = ("PG_VERSION", "backup_label", "backup_manifest", "global/pg_control")
_KEPT = frozenset({"PG_VERSION", "backup_label", "tablespace_map"})
LOSS = 0.1
"""A copy with less than this part of the rows that were estimated has lost some."""
_SOCKET_DIRECTORIES = ("/var/run/postgresql", "/tmp")  # noqa: S108  where distributions put the server's socket


class PostgresPlain(Store):
    """A PostgreSQL cluster, backed up by pg_basebackup."""

    name = "postgres"
    mode = "plain"

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

    # Backup

    def prepare(self, events: Events) -> Prepared:
        """Ask the server who it is, find the tools for its version, look into every database."""
        server = self.server()
        psql = self.tools.newest("psql")
        found = facts.gather(psql.path, server)
        if not found.identity["is_superuser"]:
            raise PreflightFailed(
                f"user {server.user} is not a superuser of the server at {server.where}",
                hint="Run as the server's own system user (postgresql_backup_os_user).",
            )
        for name, reason in found.unread.items():
            events.warning("database-unread", f"database {name!r} could not be looked into: {reason}")
        if found.identity["tablespaces"]:
            listed = ", ".join(f"{t['name']} ({t['location']})" for t in found.identity["tablespaces"])
            raise PreflightFailed(
                f"this server has tablespaces ({listed}); this release cannot back them up yet",
                hint="Move their tables to pg_default (ALTER TABLE … SET TABLESPACE), or use pg_basebackup by hand.",
            )
        if not found.identity["data_checksums"]:
            events.warning("no-checksums", "the server keeps no data checksums: damaged pages go unnoticed")
        basebackup = self.tools.client("pg_basebackup", found.major)
        tools = {
            "pg_basebackup": f"{basebackup.path} ({basebackup.major})",
            "psql": f"{psql.path} ({psql.major})",
        }
        return Prepared(found.size, found.to_source(), tools)

    @contextmanager
    def open_stream(self, prepared: Prepared, run: str) -> Iterator[Stream]:
        """Hold the WAL, then run pg_basebackup onto its standard output."""
        server = self.server()
        major = int(prepared.source["version_num"]) // 10000
        argv = [str(self.tools.client("pg_basebackup", major).path), "-D", "-", "-Ft", "-X", "fetch"]
        # Without -c fast it waits minutes for a checkpoint, without -w it may ask for a password.
        argv += ["-c", "fast", "-w", "-l", run, "-d", server.conninfo("postgres")]
        with (
            held_wal(self.tools.newest("psql").path, server, run, major),
            server.environment() as env,
            process.Producer(argv, env=env, user=server.os_user) as producer,
        ):
            yield _BaseBackup(producer, server)

    # Verify and restore

    def walk(self, plain: PlainReader, events: Events) -> Mapping[str, Any]:
        """Walk the archive: the cluster's required files and the WAL must be in it."""
        seen: set[str] = set()
        count, wal = 0, 0
        for member in archive.members(plain):
            path = archive.safe_path(member, plain.name)
            if path is None:
                continue
            if not (member.isreg() or member.isdir()):
                raise CorruptBackup(f"{member.name!r} is neither file nor directory", name=plain.name)
            count += 1
            name = str(path)
            wal += bool(_SEGMENT.match(name))
            if name in _REQUIRED:
                seen.add(name)
            events.progress("verify", plain.tell())
        self._require(seen, wal, plain.name)
        return {"members": count, "wal_segments": wal}

    @staticmethod
    def _require(seen: set[str], wal: int, name: str) -> None:
        missing = [m for m in _REQUIRED if m not in seen]
        if missing:
            raise CorruptBackup(f"{', '.join(missing)} is not in it", name=name)
        if not wal:
            raise CorruptBackup("no WAL is in it", name=name)

    def unpack(self, plain: PlainReader, target: Path, events: Events) -> None:
        """Unpack the cluster's files."""
        archive.extract(plain, target)

    def check_unpacked(self, target: Path, manifest: Manifest, events: Events) -> None:
        """Run pg_verifybackup, then remove what would make this a standby of the old primary."""
        # The file may be there and empty; a line in it links to the live directory of a tablespace.
        if _read(target / "tablespace_map").strip():
            raise PreflightFailed("the backup has tablespaces; this release cannot restore them yet")
        version = _read(target / "PG_VERSION")
        if version.strip() != str(_major(manifest)):
            raise CorruptBackup(f"PG_VERSION says {version.strip()!r}", name=manifest.name)
        self._verify_backup(target, manifest, events)
        for name in ("standby.signal", "recovery.signal"):
            if (target / name).exists():
                (target / name).unlink()
                events.step("unpack", f"removed {name}: this will be a primary")

    def _verify_backup(self, target: Path, manifest: Manifest, events: Events) -> None:
        major = _major(manifest)
        candidates = sorted(self.tools.find("pg_verifybackup"), key=lambda t: (t.major != major, -t.major))
        if not candidates:
            events.warning(
                "no-verifybackup", "pg_verifybackup is not installed: files were checked by sha256 only"
            )
            return
        tool = candidates[0]
        argv = [str(tool.path), "-q"]
        if tool.major != major:
            # Another major cannot parse the WAL; the files are checked all the same.
            argv.append("-n")
            events.warning(
                "wal-unparsed", f"pg_verifybackup is of version {tool.major}: the WAL was not parsed"
            )
        try:
            process.run([*argv, str(target)], timeout=24 * 3600)
        except ProducerFailed as error:
            raise CorruptBackup(f"pg_verifybackup: {error.facts['tail']}", name=manifest.name) from error
        events.emit("check", name="pg_verifybackup", ok=True, message="every file is as the server sent it")

    def deep_check(self, tree: Path, manifest: Manifest, events: Events) -> None:
        """Start the cluster on a private socket and count every row."""
        psql = self.tools.newest("psql").path
        superuser = str(self.settings.options.get("user") or "postgres")
        with scratch.running(
            tree, _major(manifest), self.tools, superuser=superuser, name=manifest.name
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
        version = _read(tree / "PG_VERSION").strip()
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
        major = _major(manifest)
        if not in_place:
            return {"version": str(manifest.source.get("version", major))}
        programs = self.tools.own("postgres", major)
        current = _read(self.target() / "PG_VERSION").strip()
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
        version = _read(target / "PG_VERSION").strip() or (str(_major(manifest)) if manifest else "")
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


class _BaseBackup:
    """pg_basebackup's output, watched."""

    def __init__(self, producer: process.Producer, server: Server) -> None:
        self._producer = producer
        self._server = server
        self._watch = archive.TarWatch(_KEPT)

    def readinto(self, buffer: memoryview) -> int:
        try:
            count = self._producer.readinto(buffer)
        except ProducerFailed as error:
            raise self._explain(error) from error
        if count:
            self._watch.feed(buffer[:count])
        return count

    def _explain(self, error: ProducerFailed) -> HQBackupsError:
        tail = str(error.facts["stderr"])
        if _BAD_PAGE.search(tail):
            damaged = [line for line in tail.splitlines() if _BAD_PAGE.search(line)]
            return BadPages(damaged[0].strip())
        if self._watch.files:
            error.hint = "Look at the server's log, then repeat the command; the last good backup is kept."
            if "has already been removed" in tail:
                error.hint = "Raise max_slot_wal_keep_size, which let the WAL go, then repeat the command."
            return error
        explained = explain(tail, self._server)
        return explained if isinstance(explained, PreflightFailed) else error

    def finish(self) -> Mapping[str, Any]:
        """Check that the whole cluster passed, WAL and end of archive included."""
        watch = self._watch
        if not watch.ended:
            raise ProducerTruncated("the end of the archive did not come", program="pg_basebackup")
        missing = [m for m in _REQUIRED if m not in watch.names]
        if missing:
            raise ProducerTruncated(f"{', '.join(missing)} did not come", program="pg_basebackup")
        if not any(_SEGMENT.match(n) for n in watch.names):
            raise ProducerTruncated("no WAL came", program="pg_basebackup")
        label = watch.kept["backup_label"].decode(errors="replace")
        found = dict(re.findall(r"^([A-Z ]+): (.*)$", label, re.MULTILINE))
        return {
            "files": watch.files,
            "start_lsn": found.get("START WAL LOCATION", "").split(" ")[0],
            "start_timeline": found.get("START TIMELINE", ""),
            "backup_from": found.get("BACKUP FROM", ""),
        }


def _major(manifest: Manifest) -> int:
    number = manifest.source.get("version_num")
    if not isinstance(number, int):
        raise BadManifest(f"its server's version is {number!r}", name=manifest.name)
    return number // 10000


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
