"""PostgreSQL, mode ``plain``: one tar of the whole cluster from pg_basebackup, WAL included."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hq_backups.engine import archive, names, process, space
from hq_backups.engine.errors import (
    CorruptBackup,
    PreflightFailed,
    ProducerFailed,
    UnsafeArchive,
)
from hq_backups.engine.events import Events
from hq_backups.engine.manifest import Manifest
from hq_backups.engine.postgres import (
    afterwards,
    basebackup,
    facts,
    health,
    old,
    spool,
    tablespaces,
)
from hq_backups.engine.postgres.wal import held_wal
from hq_backups.engine.stores.base import Destination, Prepared, Stream
from hq_backups.engine.stores.postgres import PostgresStore, major_of, read_text
from hq_backups.engine.streams import PlainReader


class PostgresPlain(PostgresStore):
    """A PostgreSQL cluster, backed up by pg_basebackup."""

    mode = "plain"
    looks = "a tar archive"

    # Backup

    def prepare(self, last: Manifest | None, events: Events) -> Prepared:
        """Ask the server who it is, find the tools for its version, look into every database."""
        psql = self.tools.newest("psql")
        found = self._look(psql.path, events)
        health.require_wal(found.identity, self.copier())
        health.warn(found.identity, self.copier(), events)
        program = self.tools.client(basebackup.PROGRAM, found.major)
        tools = {
            basebackup.PROGRAM: f"{program.path} ({program.major})",
            "psql": f"{psql.path} ({psql.major})",
        }
        source = found.to_source()
        if self.settings.options.get("backup_from"):
            source["address"] = self.copier().where
        needed = self._spool_size(found, events) if basebackup.is_apart(source) else 0
        # The spool is filled before there is a stream that could tell how far it is.
        self._events = events
        return Prepared(found.size, source, tools, spool=needed, unknown=not found.contents)

    @staticmethod
    def _spool_size(found: facts.Facts, events: Events) -> int:
        """Return the bytes that pg_basebackup's files may take: the databases and the WAL of meanwhile."""
        needed = found.size + found.size // 50 + min(found.size, int(found.identity["max_wal_size"]))
        listed = ", ".join(f"{t['name']!r}" for t in found.identity["tablespaces"])
        events.step(
            "prepare",
            f"the server has tablespaces ({listed}): all of it, about {space.human_bytes(found.size)}, lies in the "
            "backup directory for a while, beside the artifact",
        )
        return needed

    def _look(self, psql: Path, events: Events) -> facts.Facts:
        """Ask the server who it is and what it holds; another host's server may tell a replication user less."""
        options, server = self.settings.options, self.source()
        try:
            if options.get("backup_from") and options.get("replication_user") and not options.get("user"):
                raise PreflightFailed("postgres_users.backup is not set")
            found = facts.gather(psql, server)
            if not found.identity["is_superuser"]:
                raise PreflightFailed(
                    f"user {server.user} is not a superuser of the server at {server.where}",
                    hint="Run as the server's own system user (postgresql_backup_os_user).",
                )
        except PreflightFailed as error:
            if not options.get("backup_from"):
                raise
            found = facts.gather_by_replication(psql, self.copier(), error.message)
            events.warning(
                "contents-unread",
                f"what the server at {self.copier().where} holds is not recorded: {error.message}. verify_backup "
                "--deep will have nothing to compare with; name a superuser in postgres_users.backup",
            )
        else:
            for name, reason in found.unread.items():
                events.warning("database-unread", f"database {name!r} could not be looked into: {reason}")
        return found

    @contextmanager
    def open_stream(
        self, prepared: Prepared, run: str, *, accept_bad_pages: bool = False
    ) -> Iterator[Stream]:
        """Hold the WAL, then run pg_basebackup onto its standard output; with tablespaces into a spool first."""
        major = int(prepared.source["version_num"]) // 10000
        server = self.copier().of(major)
        directory = (
            self.settings.backup_dir / names.spool_name(run) if basebackup.is_apart(prepared.source) else None
        )
        argv = [str(self.tools.client(basebackup.PROGRAM, major).path), "-Ft", "-X", "fetch"]
        argv += ["-D", "-" if directory is None else str(directory)]
        # Without -c fast it waits minutes for a checkpoint, without -w it may ask for a password.
        argv += ["-c", "fast", "-w", "-l", run, "-d", server.conninfo("postgres")]
        if accept_bad_pages:
            argv.append("--no-verify-checksums")
        if directory is not None:
            # Nothing is lost with a spool.
            argv = spool.tied([*argv, "--no-sync"])
        with contextlib.ExitStack() as stack:
            if directory is not None:
                stack.enter_context(spool.emptied(directory, server.os_user))
            with (
                held_wal(self.tools.newest("psql").path, server, run, major),
                server.environment() as env,
                process.Producer(argv, env=env, user=server.os_user, feed=directory is not None) as producer,
            ):
                if directory is None:
                    yield basebackup.Piped(producer, server, bad_pages=accept_bad_pages)
                    return
                try:
                    spool.fill(producer, directory, prepared.estimate, self._events)
                except ProducerFailed as error:
                    raise basebackup.spool_failure(error, server, directory) from error
            yield basebackup.Spooled(directory, prepared.source["tablespaces"], bad_pages=accept_bad_pages)

    # Verify and restore

    @classmethod
    def recognises(cls, head: bytes) -> bool:
        """Look for a tar's first header."""
        return archive.is_tar(head)

    def walk(self, plain: PlainReader, manifest: Manifest | None, events: Events) -> Mapping[str, Any]:
        """Walk the archive: the cluster's required files and the WAL must be in it."""
        if manifest is None or manifest.surveyed:
            return old.walk(plain, events)
        seen: set[str] = set()
        held = {t.oid: False for t in tablespaces.recorded(manifest.source, manifest.name)}
        count, wal = 0, 0
        for member in archive.members(plain):
            path = archive.safe_path(member, plain.name)
            if path is None:
                continue
            if not (member.isreg() or member.isdir()):
                raise CorruptBackup(f"{member.name!r} is neither file nor directory", name=plain.name)
            count += 1
            name = str(path)
            wal += bool(basebackup.SEGMENT.match(name))
            if name in basebackup.REQUIRED:
                seen.add(name)
            if path.parts[0] == tablespaces.LINKS and len(path.parts) > 1:
                if path.parts[1] not in held:
                    raise UnsafeArchive(
                        f"{name!r} is of no tablespace that its manifest knows", name=plain.name
                    )
                held[path.parts[1]] |= len(path.parts) > 2
            events.progress("verify", plain.tell())
        self._require(seen, wal, plain.name)
        if missing := [oid for oid, there in held.items() if not there]:
            raise CorruptBackup(f"tablespace {missing[0]} is not in it", name=plain.name)
        return {"members": count, "wal_segments": wal}

    @staticmethod
    def _require(seen: set[str], wal: int, name: str) -> None:
        missing = [m for m in basebackup.REQUIRED if m not in seen]
        if missing:
            raise CorruptBackup(f"{', '.join(missing)} is not in it", name=name)
        if not wal:
            raise CorruptBackup("no WAL is in it", name=name)

    def unpack(self, plain: PlainReader, spot: Destination, manifest: Manifest, events: Events) -> None:
        """Unpack the cluster's files, each tablespace's into its own place; never what links to live ones."""
        archive.extract(
            plain,
            spot.tree,
            strip=old.wrapper(manifest),
            outer=tablespaces.routes(spot.outer),
            skip=frozenset({tablespaces.MAP}),
        )
        if not manifest.surveyed:
            tablespaces.link(spot.tree, spot.outer, major_of(manifest), manifest.name)
        if afterwards.is_quiet(manifest, self.config, beside=spot.replaces is None):
            afterwards.quieten(spot.tree)

    def check_unpacked(self, target: Path, manifest: Manifest, events: Events) -> None:
        """Run pg_verifybackup, then remove what would make this a standby of the old primary."""
        version = read_text(target / "PG_VERSION").strip()
        if version != (str(manifest.source.get("version")) if manifest.surveyed else str(major_of(manifest))):
            raise CorruptBackup(f"PG_VERSION says {version!r}", name=manifest.name)
        if old.has_file_list(manifest):
            self._verify_backup(target, manifest, events)
        else:
            events.warning(
                "no-file-list",
                f"{manifest.name} has no list of its files: they were checked by sha256 of the whole only",
            )
        for removed in old.make_primary(target, manifest):
            events.step("unpack", f"removed {removed}: this will be a primary")

    def _verify_backup(self, target: Path, manifest: Manifest, events: Events) -> None:
        major = major_of(manifest)
        candidates = sorted(self.tools.find("pg_verifybackup"), key=lambda t: (t.major != major, -t.major))
        if not candidates:
            events.warning(
                "no-verifybackup", "pg_verifybackup is not installed: files were checked by sha256 only"
            )
            return
        tool = candidates[0]
        argv = [str(tool.path), "-q", "-i", tablespaces.MAP]
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
