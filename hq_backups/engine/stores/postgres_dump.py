"""PostgreSQL, mode ``dump``: the SQL of pg_dumpall; restored by loading it into a cluster of its own, made beside."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hq_backups.engine import process
from hq_backups.engine.errors import (
    BadManifest,
    CorruptBackup,
    PreflightFailed,
    ServiceError,
    WrongVersion,
)
from hq_backups.engine.events import Events
from hq_backups.engine.manifest import Manifest
from hq_backups.engine.postgres import (
    controlfile,
    facts,
    fresh,
    in_place,
    old_dump,
    replay,
    rights,
    scratch,
    tablespaces,
)
from hq_backups.engine.postgres.dump import HEAD_LIMIT, Scanner, table_name
from hq_backups.engine.postgres.dump_stream import PROGRAM, DumpStream
from hq_backups.engine.postgres.load import Changes, load
from hq_backups.engine.postgres.psql import Server, query_json, query_lines
from hq_backups.engine.requests import RestoreRequest
from hq_backups.engine.stores.base import Destination, Prepared, Stream
from hq_backups.engine.stores.postgres import SHOWN, PostgresStore, major_of, read_text
from hq_backups.engine.streams import PlainReader

_CLUSTER_DUMP = re.compile(rb"^-- PostgreSQL database cluster dump\r?$", re.MULTILINE)
_SINGLE_DUMP = re.compile(rb"^-- PostgreSQL database dump\r?$", re.MULTILINE)
# The view shows no options of others' mappings, and does not tell those from mappings without any.
_HIDDEN_MAPPINGS = """
SELECT coalesce(json_agg(json_build_object('user', usename, 'server', srvname) ORDER BY srvname, usename), '[]')
  FROM pg_user_mappings WHERE umoptions IS NULL;
"""


class PostgresDump(PostgresStore):
    """A PostgreSQL cluster, backed up by pg_dumpall."""

    mode = "dump"
    looks = "a dump of the whole server by pg_dumpall"

    # Backup

    def prepare(self, last: Manifest | None, events: Events) -> Prepared:
        """Ask the server who it is, find the tools for its version, record what a dump does not carry."""
        server, psql = self.source(), self.tools.newest("psql")
        found = _without_theirs(facts.gather(psql.path, server), events)
        server = server.of(found.major, superuser=found.identity["is_superuser"])
        _require_names(found.contents)
        for name, reason in found.unread.items():
            raise PreflightFailed(
                f"database {name!r} could not be looked into, so it could not be dumped: {reason}",
                hint=f"Let user {server.user} in (GRANT CONNECT ON DATABASE, pg_hba.conf), then repeat the command.",
            )
        left_out = [
            d["name"]
            for d in found.identity["databases"]
            if not d["connectable"] and d["name"] not in in_place.THEIRS
        ]
        for name in left_out:
            if name != "template0":
                events.warning(
                    "database-left-out", f"database {name!r} takes no connections: it is not dumped"
                )
        if not found.identity["is_superuser"]:
            _warn_of_rights(found, server, psql.path, events)
        dumpall = self.tools.client(PROGRAM, found.major)
        tools = {
            PROGRAM: f"{dumpall.path} ({dumpall.major})",
            "psql": f"{psql.path} ({psql.major})",
        }
        table_bytes = sum(int(held["table_bytes"]) for held in found.contents.values())
        source = {
            **found.to_source(),
            "cluster": replay.record(psql.path, server),
            "table_bytes": table_bytes,
        }
        if self.settings.options.get("backup_from"):
            source["address"] = server.where
        return Prepared(_estimate(table_bytes, last), source, tools)

    @contextmanager
    def open_stream(
        self, prepared: Prepared, run: str, *, accept_bad_pages: bool = False
    ) -> Iterator[Stream]:
        """Run pg_dumpall onto its standard output."""
        major = int(prepared.source["version_num"]) // 10000
        server = self.source().of(major, superuser=prepared.source["is_superuser"])
        dumpall = self.tools.client(PROGRAM, major)
        argv = [str(dumpall.path), "-w", "-d", server.conninfo("postgres")]
        if not prepared.source["is_superuser"]:
            argv.append("--no-role-passwords")
        named = {d["name"] for d in prepared.source["databases"]}
        argv += [f"--exclude-database={name}" for name in sorted(in_place.THEIRS & named)]
        with server.environment() as env:
            # Each database in its own encoding: one in SQL_ASCII may hold what is no UTF-8.
            env.pop("PGCLIENTENCODING", None)
            with process.Producer(argv, env=env, user=server.os_user) as producer:
                # A newer one writes what the server itself refuses: a dump must be good for its own version.
                yield DumpStream(producer, server, prepared.source, mend=dumpall.major != major)

    # Verify and restore

    @classmethod
    def recognises(cls, head: bytes) -> bool:
        """Look for the first line of pg_dumpall."""
        return _CLUSTER_DUMP.search(head) is not None

    @classmethod
    def lookalike(cls, head: bytes) -> tuple[str, str] | None:
        """Know what pg_dump makes of one database."""
        custom = head.startswith(b"PGDMP")
        if not custom and _SINGLE_DUMP.search(head) is None:
            return None
        program = "pg_restore -d NAME FILE" if custom else "psql -d NAME -f FILE"
        return (
            "it is a dump of one database (pg_dump), not of the whole server",
            f"Load it by hand into a new database: {program}",
        )

    def walk(self, plain: PlainReader, manifest: Manifest | None, events: Events) -> Mapping[str, Any]:
        """Read the SQL to its end: the completion line, and as many rows of each table as were dumped."""
        scanner, head = Scanner(), b""
        while chunk := plain.chunk():
            if scanner.head_end is None and len(head) <= HEAD_LIMIT:
                head += chunk
            scanner.feed(chunk)
        scanner.require_whole(plain.name)
        members = {"members": len(scanner.copies), "rows": sum(c.rows for c in scanner.copies)}
        if manifest is None or manifest.surveyed:
            source = old_dump.source_of(
                scanner, head[: scanner.head_end or 0], self._default_major(), plain.name
            )
            source["cluster"] |= self._segment_here()
            return {**members, "source": source}
        _compare_rows(scanner.rows(), manifest)
        events.step("verify", "whether a server takes the SQL is tried by verify_backup --deep")
        return members

    def _default_major(self) -> int | None:
        """Return the version of this host's server: for dumps that do not say theirs."""
        configured = str(self.settings.options.get("version") or "")
        current = read_text(self.target() / "PG_VERSION").strip() if self.settings.data_dir else ""
        return next((int(v) for v in (configured, current) if v.isdigit()), None)

    def _segment_here(self) -> dict[str, int]:
        """Return the size of the WAL segments of this host's cluster: its settings, taken over, may rely on it."""
        tools = self.tools.find("pg_controldata")
        if not tools or self.settings.data_dir is None:
            return {}
        said = controlfile.report(max(tools, key=lambda t: t.major).path, self.settings.data_dir)
        found = controlfile.field(said, "Bytes per WAL segment") or ""
        return {"segment": int(found)} if found.isdigit() else {}

    def unpacked_size(self, manifest: Manifest) -> int:
        """Return the size of the databases: a loaded cluster is larger than its text, indexes are."""
        try:
            recorded = sum(int(d["size"] or 0) for d in manifest.source.get("databases", ()))
        except (KeyError, TypeError, ValueError):
            recorded = 0
        size = recorded or 2 * manifest.plain_size
        return size + size // 10 + min(fresh.WAL, size)

    def unpack(self, plain: PlainReader, spot: Destination, manifest: Manifest, events: Events) -> None:
        """Make a new cluster, load the dump into it, put back what a dump does not carry; leaves it shut down."""
        cluster, major = replay.cluster_of(manifest.source, manifest.name), major_of(manifest)
        psql = self.tools.newest("psql").path
        changes = Changes(frozenset({cluster.bootstrap}), tablespaces=_places(manifest, spot))
        events.step("initdb", f"making a cluster of PostgreSQL {major}, superuser {cluster.bootstrap!r}")
        fresh.initdb(spot.tree, cluster, major, self.tools)
        with scratch.running(
            spot.tree,
            major,
            self.tools,
            superuser=cluster.bootstrap,
            name=manifest.name,
            settings=fresh.LOADING,
            keep=True,
        ) as server:
            self._remake(psql, server, cluster, manifest.name)
            events.step("load", f"loading {manifest.name}")
            scanner = load(plain, psql, server, changes, spot.tree)
            if not manifest.surveyed:
                _compare_rows(scanner.rows(), manifest)
            _run(psql, server, "postgres", replay.replay_sql(cluster), manifest.name)
            self._compare_names(facts.gather(psql, server), scanner, manifest, events)
        self._configure(spot, manifest, cluster, events)

    @staticmethod
    def _remake(psql: Path, server: Server, cluster: replay.Cluster, artifact: str) -> None:
        """Make ``postgres`` and ``template1`` anew where they had another encoding or locale than the rest."""
        base = cluster.database("template0").language
        for name, other in (("postgres", "template1"), ("template1", "postgres")):
            database = cluster.database(name)
            if database.language != base:
                _run(psql, server, other, replay.remade(database), artifact)

    def _configure(
        self, spot: Destination, manifest: Manifest, cluster: replay.Cluster, events: Events
    ) -> None:
        source = manifest.source
        home, file = str(source.get("data_directory") or ""), str(source.get("config_file") or "")
        inside = bool(home) and Path(file).is_relative_to(home)
        try:
            fresh.configure(spot.tree, spot.replaces, cluster, inside=inside, events=events)
        except OSError as error:
            raise PreflightFailed(
                f"the configuration of {spot.replaces} could not be taken over: {error.strerror} ({error.filename})",
                hint="Give it to the server's own user, then repeat the command; nothing was changed.",
            ) from error

    @staticmethod
    def _compare_names(found: facts.Facts, scanner: Scanner, manifest: Manifest, events: Events) -> None:
        """Compare the loaded cluster with the dump; what was gone before the dump began is told."""
        databases = {d["name"] for d in found.identity["databases"]}
        missing = [name for name in scanner.databases if name not in databases]
        for database, tables in scanner.rows().items():
            held = found.contents.get(database, {})
            known = {table_name(t) for t in [*held.get("tables", ()), *held.get("unlogged", ())]}
            if not manifest.surveyed:  # an old one names tables without their schema
                missing += [f"{database}.{table}" for table in tables if table not in known]
        if missing:
            raise CorruptBackup(f"{', '.join(missing[:SHOWN])} did not come of it", name=manifest.name)
        for role in sorted(set(manifest.source.get("roles", ())) - set(found.identity["roles"]))[:SHOWN]:
            events.warning("role-missing", f"role {role!r} was there before the backup and is not in it")
        rows = sum(c.rows for c in scanner.copies)
        message = f"{len(databases)} databases, {len(found.identity['roles'])} roles, {rows} rows, as many as dumped"
        events.emit("check", name="loaded", ok=True, message=message)

    def check_unpacked(self, target: Path, manifest: Manifest, events: Events) -> None:
        """Look for a cluster of the right version, shut down in order."""
        version = read_text(target / "PG_VERSION").strip()
        if version != str(major_of(manifest)):
            raise CorruptBackup(f"PG_VERSION says {version!r}", name=manifest.name)
        if (state := self._state(target, major_of(manifest))) != "shut down":
            raise CorruptBackup(f"the cluster that was loaded is {state!r}", name=manifest.name)

    def deep_check(self, tree: Path, manifest: Manifest, events: Events) -> None:
        """Start the loaded cluster and count every row of every table that was dumped."""
        events.step("deep", "starting a server of our own on the loaded copy")
        cluster, psql = replay.cluster_of(manifest.source, manifest.name), self.tools.newest("psql").path
        dumped = manifest.source.get("rows") or {}
        with scratch.running(
            tree, major_of(manifest), self.tools, superuser=cluster.bootstrap, name=manifest.name
        ) as server:
            total = 0
            for database, tables in dumped.items():
                counted = {table_name(t): n for t, n in facts.count_rows(psql, server, database).items()}
                events.step(
                    "count", f"database {database!r}: {len(counted)} tables, {sum(counted.values())} rows"
                )
                total += sum(counted.values())
                _compare_counted(tables, counted, _of_extensions(psql, server, database), database, manifest)
        message = f"{len(dumped)} databases, {total} rows, each table's counted"
        events.emit("check", name="contents", ok=True, message=message)

    def _state(self, target: Path, major: int) -> str:
        """Return the state that the control file of a data directory tells."""
        said = controlfile.report(self.tools.client("pg_controldata", major).path, target)
        return controlfile.field(said, "Database cluster state") or "unknown"

    def served_identifier(self, manifest: Manifest) -> str | None:
        """Return the restored directory's own identifier: a cluster that was loaded has a new one."""
        control = self.target() / "global" / "pg_control"
        try:
            return controlfile.system_identifier(control.read_bytes())
        except OSError as error:
            raise ServiceError(f"{control} cannot be read: {error.strerror}") from error

    def next_steps(self, manifest: Manifest | None = None) -> list[str]:
        """Return what an operator does; statistics are not in a dump."""
        steps = super().next_steps(manifest)
        return ["vacuumdb --all --analyze-in-stages", *steps] if manifest is not None else steps

    # Into a server whose directory is not ours

    def check_in_place(
        self, manifest: Manifest, request: RestoreRequest, events: Events
    ) -> Mapping[str, Any]:
        """Check that the running server is of the dump's version, and empty or to be emptied."""
        server, psql = self.server(), self.tools.newest("psql").path
        who, major = facts.identity(psql, server), major_of(manifest)
        if int(who["version_num"]) // 10000 != major:
            raise WrongVersion(
                f"the backup is of PostgreSQL {major}, the server at {server.where} is {who['version']}",
                hint="Restore into a server of that version.",
            )
        server = server.of(major, superuser=who["is_superuser"])
        may = rights.of_user(psql, server)
        may.require(server)
        if not may.superuser:
            _require_tablespaces(manifest, who, server)
        held = in_place.contents(psql, server)
        if held.anything and not request.recreate:
            raise PreflightFailed(
                f"the server at {server.where} is not empty: it has {held.listed()}",
                hint="If all that may be deleted for good: add --recreate",
            )
        told = {
            "server": server.where,
            "version": str(who["version"]),
            "as_role": server.user,
            "no_way_back": "this cannot be undone: the server's data are changed as they are, nothing is kept aside",
        }
        if held.anything:
            told["deleted_first"] = held.listed()
        if not may.superuser:
            told["rights"] = (
                f"user {may.user} is no superuser: attributes and memberships of roles that it may not give are left "
                "out, each with a warning; anything else that it may not do ends the restore"
            )
        return told

    def load_in_place(
        self, plain: PlainReader, manifest: Manifest, request: RestoreRequest, events: Events
    ) -> None:
        """Load the dump into the running server, emptied first when that was asked for."""
        cluster = replay.cluster_of(manifest.source, manifest.name)
        server, psql = self.server(), self.tools.newest("psql").path
        server = server.of(major_of(manifest), superuser=facts.identity(psql, server)["is_superuser"])
        held, before = in_place.contents(psql, server), rights.of_user(psql, server)
        if held.anything and not request.recreate:
            raise PreflightFailed(f"the server at {server.where} is no longer empty: {held.listed()}")
        with rights.borrowed(psql, server, before, events) as narrower:
            if held.anything:
                events.step("recreate", f"deleting {held.listed()}")
                in_place.empty(psql, server, held, cluster, events)
            who = facts.identity(psql, server)
            if narrower is not None:
                narrower.renew(rights.of_user(psql, server), who["roles"])
            there = {str(t["name"]): None for t in who["tablespaces"]}
            changes = Changes(frozenset(who["roles"]), frozenset({server.user}), there, narrower)
            scanner = load(plain, psql, server, changes, server.where)
            if narrower is None:
                _run(psql, server, "postgres", replay.replay_sql(cluster), manifest.name)
            else:
                narrower.warn(events)
                in_place.put_back(psql, server, cluster, manifest.name, events)
            self._compare_names(facts.gather(psql, server), scanner, manifest, events)


def _without_theirs(found: facts.Facts, events: Events) -> facts.Facts:
    """Leave out the databases that a hosting service keeps for itself."""
    theirs = sorted(in_place.THEIRS & {d["name"] for d in found.identity["databases"]})
    for name in theirs:
        events.warning(
            "database-left-out", f"database {name!r} is the hosting service's own: it is not dumped"
        )
    contents = {name: held for name, held in found.contents.items() if name not in theirs}
    unread = {name: reason for name, reason in found.unread.items() if name not in theirs}
    return facts.Facts(found.identity, contents, unread)


def _require_names(names: Iterable[str]) -> None:
    """Refuse databases that pg_dumpall cannot name to pg_dump; raises PreflightFailed."""
    for name in names:
        if "\n" in name or "\r" in name:
            raise PreflightFailed(
                f"pg_dumpall cannot dump database {name!r}: its name has more than one line",
                hint="Rename it (ALTER DATABASE … RENAME TO …), or use backup_postgres: plain.",
            )


def _warn_of_rights(found: facts.Facts, server: Server, psql: Path, events: Events) -> None:
    """Tell what pg_dumpall leaves out without a word when its user is no superuser."""
    events.warning(
        "no-passwords", f"user {server.user} is no superuser: passwords of roles are not in the dump"
    )
    for each in found.identity["subscriptions"]:
        events.warning(
            "subscription-left-out",
            f"user {server.user} is no superuser: subscription {each['name']!r} of database {each['database']!r} is "
            "not in the dump",
        )
    for database in found.contents:
        for mapping in query_json(psql, server, database, _HIDDEN_MAPPINGS):
            events.warning(
                "mapping-options-left-out",
                f"user {server.user} is no superuser: of the user mapping of {mapping['user']!r} at foreign server "
                f"{mapping['server']!r} in database {database!r} it sees no options, such as a password; if there are "
                "any, they are not in the dump",
            )


def _require_tablespaces(manifest: Manifest, who: Mapping[str, Any], server: Server) -> None:
    """Only superusers make tablespaces; raises PreflightFailed."""
    there = {t["name"] for t in who["tablespaces"]}
    missing = [t.name for t in tablespaces.recorded(manifest.source, manifest.name) if t.name not in there]
    if missing:
        raise PreflightFailed(
            f"the dump has tablespaces that the server at {server.where} lacks, and user {server.user} may not make "
            f"them: {', '.join(map(repr, missing[:SHOWN]))}",
            hint="Make them there, or load as a superuser.",
        )


def _estimate(table_bytes: int, last: Manifest | None) -> int:
    """Return the bytes of SQL to expect: by the last good dump, for text and tables differ by any factor."""
    before = last.source.get("table_bytes") if last is not None else None
    if last is None or not isinstance(before, int) or before <= 0:
        return table_bytes
    return table_bytes * last.plain_size // before


def _places(manifest: Manifest, spot: Destination) -> dict[str, Path | None]:
    """Return the new directory of each tablespace, by name; raises BadManifest."""
    return {each.name: spot.outer[each.oid] for each in tablespaces.recorded(manifest.source, manifest.name)}


def _compare_rows(found: Mapping[str, Mapping[str, int]], manifest: Manifest) -> None:
    """Compare the rows that pass with those that passed when the dump was made."""
    recorded = manifest.source.get("rows")
    if recorded == found:
        return
    if not isinstance(recorded, Mapping):
        raise BadManifest("it records no rows", name=manifest.name)
    differing = sorted({*recorded, *found}, key=lambda name: recorded.get(name) == found.get(name))
    raise CorruptBackup(
        f"database {differing[0]!r} has other tables or rows than its manifest says", name=manifest.name
    )


def _compare_counted(
    dumped: Mapping[str, int],
    counted: Mapping[str, int],
    of_extensions: set[str],
    database: str,
    manifest: Manifest,
) -> None:
    for table, rows in dumped.items():
        held = counted.get(table)
        # An unlogged table is not counted; an extension's own table holds rows that it made itself.
        if held is None or held == rows or (table in of_extensions and held > rows):
            continue
        raise CorruptBackup(
            f"{table} in {database!r} has {held} rows when loaded, {rows} were dumped", name=manifest.name
        )


def _of_extensions(psql: Path, server: Server, database: str) -> set[str]:
    sql = (
        "SELECT coalesce(json_agg(format('%I.%I', n.nspname, c.relname)), '[]') FROM pg_depend d"
        " JOIN pg_class c ON c.oid = d.objid JOIN pg_namespace n ON n.oid = c.relnamespace"
        " WHERE d.classid = 'pg_class'::regclass AND d.deptype = 'e';"
    )
    return {table_name(name) for name in query_json(psql, server, database, sql)}


def _run(psql: Path, server: Server, dbname: str, sql: str, name: str) -> None:
    """Run SQL that answers nothing; raises CorruptBackup with the server's words."""
    try:
        query_lines(psql, server, dbname, sql)
    except ServiceError as error:
        raise CorruptBackup(
            f"what it records of the cluster is refused: {error.message}", name=name
        ) from error
