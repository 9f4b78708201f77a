"""PostgreSQL, mode ``plain``: one tar of the whole cluster from pg_basebackup, WAL included."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hq_backups.engine import archive, process
from hq_backups.engine.errors import (
    BadPages,
    CorruptBackup,
    HQBackupsError,
    PreflightFailed,
    ProducerFailed,
    ProducerTruncated,
)
from hq_backups.engine.events import Events
from hq_backups.engine.manifest import Manifest
from hq_backups.engine.postgres import facts
from hq_backups.engine.postgres.psql import Server, explain
from hq_backups.engine.postgres.wal import held_wal
from hq_backups.engine.stores.base import Destination, Prepared, Stream
from hq_backups.engine.stores.postgres import PostgresStore, major_of, read_text
from hq_backups.engine.streams import PlainReader

_SEGMENT = re.compile(r"pg_wal/[0-9A-F]{24}\Z")
_BAD_PAGE = re.compile(r"checksum (?:verification failed|error)|invalid page", re.IGNORECASE)
_REQUIRED = ("PG_VERSION", "backup_label", "backup_manifest", "global/pg_control")
_KEPT = frozenset({"PG_VERSION", "backup_label", "tablespace_map"})


class PostgresPlain(PostgresStore):
    """A PostgreSQL cluster, backed up by pg_basebackup."""

    mode = "plain"

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
    def open_stream(
        self, prepared: Prepared, run: str, *, accept_bad_pages: bool = False
    ) -> Iterator[Stream]:
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

    def walk(self, plain: PlainReader, manifest: Manifest | None, events: Events) -> Mapping[str, Any]:
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

    def unpack(self, plain: PlainReader, spot: Destination, manifest: Manifest, events: Events) -> None:
        """Unpack the cluster's files."""
        archive.extract(plain, spot.tree)

    def check_unpacked(self, target: Path, manifest: Manifest, events: Events) -> None:
        """Run pg_verifybackup, then remove what would make this a standby of the old primary."""
        # The file may be there and empty; a line in it links to the live directory of a tablespace.
        if read_text(target / "tablespace_map").strip():
            raise PreflightFailed("the backup has tablespaces; this release cannot restore them yet")
        version = read_text(target / "PG_VERSION")
        if version.strip() != str(major_of(manifest)):
            raise CorruptBackup(f"PG_VERSION says {version.strip()!r}", name=manifest.name)
        self._verify_backup(target, manifest, events)
        for name in ("standby.signal", "recovery.signal"):
            if (target / name).exists():
                (target / name).unlink()
                events.step("unpack", f"removed {name}: this will be a primary")

    def _verify_backup(self, target: Path, manifest: Manifest, events: Events) -> None:
        major = major_of(manifest)
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
