"""Talking to a server through psql: no driver to install, the same login as every operator uses.

SQL goes over standard input, passwords through a temporary 0600 pgpass file: neither is ever in argv.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pwd
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hq_backups.engine import process
from hq_backups.engine.errors import HQBackupsError, PreflightFailed, ProducerFailed, ServiceError
from hq_backups.engine.locks import process_started

CONNECT_SECONDS = 10
_PGPASS = "hqb-pgpass-"
_OPTIONS = (
    "-c role=none -c search_path= -c statement_timeout=0 -c lock_timeout=0 -c idle_in_transaction_session_timeout=0"
    " -c default_transaction_read_only=off"
)
_LIMITS = {14: "idle_session_timeout", 17: "transaction_timeout"}
"""Limits that servers know since a major version; older ones refuse the connection over them."""
LOGIN_TRIGGERS = 17
"""The first major version that has them, and a setting that switches them off."""


@dataclass(frozen=True)
class Server:
    """How to reach one server."""

    host: str
    """A socket directory or a host name."""
    port: int
    user: str = "postgres"
    password: str | None = field(default=None, repr=False)
    os_user: str | None = None
    """Who the programs run as, when we are root."""
    major: int = 0
    """The major version, where it is known: newer servers have more limits to lift."""
    superuser: bool = False
    """Whether our user is known to be one: then no trigger on login runs for us, since version 17."""

    def of(self, major: int, *, superuser: bool = False) -> Server:
        """Return the same server, known to be of a version, and perhaps our user to be a superuser of it."""
        return dataclasses.replace(self, major=major, superuser=superuser)

    @property
    def where(self) -> str:
        """Return the address as an operator would write it."""
        return f"{self.host}:{self.port}"

    def conninfo(self, dbname: str, **extra: str) -> str:
        """Return a libpq connection string, every value quoted."""
        values = {
            "host": self.host,
            "port": str(self.port),
            "user": self.user,
            "dbname": dbname,
            "connect_timeout": str(CONNECT_SECONDS),
            "application_name": "hq_backups",
            **extra,
        }
        return " ".join(f"{key}={_quote(value)}" for key, value in values.items())

    @contextmanager
    def environment(self) -> Iterator[dict[str, str]]:
        """Give the environment that carries the password, for as long as it is needed."""
        # What is set for the role or the database must neither cut a long run short nor change who we are or what
        # names mean: a database's owner could put functions of his own before the system's. Names come as UTF-8.
        newer = "".join(f" -c {name}=0" for since, name in _LIMITS.items() if self.major >= since)
        if self.superuser and self.major >= LOGIN_TRIGGERS:
            newer += " -c event_triggers=off"
        env = {"PGOPTIONS": _OPTIONS + newer, "PGCLIENTENCODING": "UTF8"}
        if self.password is None:
            yield env
            return
        _remove_strays()
        fd, path = tempfile.mkstemp(prefix=f"{_PGPASS}{os.getpid()}-")
        try:
            if self.os_user is not None and os.geteuid() == 0:
                entry = pwd.getpwnam(self.os_user)
                os.fchown(fd, entry.pw_uid, entry.pw_gid)
            escaped = self.password.replace("\\", "\\\\").replace(":", "\\:")
            with os.fdopen(fd, "w") as file:
                file.write(f"*:*:*:*:{escaped}\n")
            yield {**env, "PGPASSFILE": path}
        finally:
            os.unlink(path)


def _remove_strays() -> None:
    """Remove the password files of runs that were killed."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PGPASS}*"):
        pid = path.name.removeprefix(_PGPASS).split("-")[0]
        if pid.isdigit() and process_started(pid) is None:
            with contextlib.suppress(OSError):
                path.unlink()


def _quote(value: str) -> str:
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def query_lines(psql: Path, server: Server, dbname: str, sql: str, *, timeout: float = 600) -> list[Any]:
    """Run SQL whose every output row is one JSON value and return them; raises explained errors."""
    argv = [str(psql), "-X", "-A", "-t", "-q", "-w", "-v", "ON_ERROR_STOP=1", "-d", server.conninfo(dbname)]
    with server.environment() as env:
        try:
            done = process.run(argv, input=sql, env=env, user=server.os_user, timeout=timeout)
        except ProducerFailed as error:
            raise explain(str(error.facts["stderr"]), server) from error
    try:
        return [json.loads(line) for line in done.stdout.splitlines() if line]
    except ValueError as error:
        raise ServiceError(f"the server at {server.where} gave an answer that is not JSON") from error


def query_answered(
    psql: Path, server: Server, dbname: str, sql: str, *, timeout: float
) -> tuple[list[Any], str]:
    """Run SQL like query_lines, past statements that fail; return what came, and the errors in the server's words.

    Raises explained errors when not even a connection came about.
    """
    argv = [str(psql), "-X", "-A", "-t", "-q", "-w", "-v", "ON_ERROR_STOP=0", "-d", server.conninfo(dbname)]
    with server.environment() as env:
        done = process.run(argv, input=sql, env=env, user=server.os_user, timeout=timeout, check=False)
    if done.status and not done.stdout:
        raise explain(done.stderr_tail, server)
    try:
        return [json.loads(line) for line in done.stdout.splitlines() if line], done.stderr_tail
    except ValueError as error:
        raise ServiceError(f"the server at {server.where} gave an answer that is not JSON") from error


def replication_rows(psql: Path, server: Server, *commands: str) -> list[list[str]]:
    """Run commands over a replication connection and return each one's only row; raises explained errors."""
    conninfo = server.conninfo("postgres", replication="true")
    argv = [str(psql), "-X", "-A", "-t", "-q", "-w", "-v", "ON_ERROR_STOP=1", "-d", conninfo]
    with server.environment() as env:
        try:
            sql = "".join(f"{command};\n" for command in commands)
            done = process.run(argv, input=sql, env=env, user=server.os_user, timeout=60)
        except ProducerFailed as error:
            raise explain(str(error.facts["stderr"]), server) from error
    rows = [line.split("|") for line in done.stdout.splitlines()]
    if len(rows) != len(commands):
        raise ServiceError(f"the server at {server.where} answered {len(rows)} of {len(commands)} questions")
    return rows


def query_json(psql: Path, server: Server, dbname: str, sql: str, *, timeout: float = 600) -> Any:
    """Run one query whose single row is one JSON value and return that."""
    rows = query_lines(psql, server, dbname, sql, timeout=timeout)
    if len(rows) != 1:
        raise ServiceError(f"the server at {server.where} answered {len(rows)} rows where one was asked for")
    return rows[0]


_EXPLANATIONS: tuple[tuple[str, str, str], ...] = (
    (
        r"unsupported startup parameter|pgbouncer|no such database|bouncer",
        "{where} is a pgbouncer, not the PostgreSQL server itself",
        "Set postgresql_host to the server's socket directory (or its own address) and postgresql_port to its own "
        "port, usually 5432.",
    ),
    (
        r"password authentication failed|no password supplied|Peer authentication failed|Ident authentication failed"
        r"|FATAL:\s+role \".*\" does not exist",
        "the server at {where} does not let user {user} in: {detail}",
        "{login}, and check its pg_hba.conf.",
    ),
    (
        r"no pg_hba\.conf entry for replication|must be (superuser or )?replication role|permission denied to start WAL"
        r"|REPLICATION attribute",
        "the server at {where} does not allow user {user} a replication connection: {detail}",
        "Add a line to its pg_hba.conf ({line}) and reload the server.",
    ),
    (
        r"no pg_hba\.conf entry",
        "the server at {where} refuses this connection: {detail}",
        "Add a line for user {user} to pg_hba.conf and reload the server, or name a user whom it lets in: "
        "postgres_users.backup",
    ),
    (
        r"must be superuser|must have privileges of|permission denied (?:to|for) ",
        "user {user} is not a superuser of the server at {where}: {detail}",
        "Run as the server's own system user (postgresql_backup_os_user), or name a superuser in postgres_users.",
    ),
    (
        r"failed: Permission denied",
        "this user may not reach the socket at {where}: {detail}",
        "Correct postgresql_host (the server's socket directory), or the directory's mode.",
    ),
    (
        r"remaining connection slots|too many clients already|too many connections for",
        "the server at {where} takes no more connections: {detail}",
        "Stop clients that are not needed (select usename, datname, state from pg_stat_activity), or raise "
        "max_connections or the limit of that role or database.",
    ),
    (
        r"max_wal_senders|all replication slots are in use|replication slots? .*max_replication_slots",
        "the server at {where} has no free slot for a backup: {detail}",
        "Raise max_wal_senders or max_replication_slots, or drop what holds them: select * from pg_stat_replication, "
        "pg_replication_slots.",
    ),
    (
        r"the database system is (?:starting up|in recovery mode|not (?:yet )?accepting connections)",
        "the server at {where} is up, but lets nobody in yet: {detail}",
        "Wait until it has recovered (its log says how far it is), then repeat the command; a standby must have "
        "hot_standby = on.",
    ),
    (
        r"WAL level not sufficient|wal_level.* must be|logical decoding requires",
        "the server at {where} writes too little WAL for a base backup: {detail}",
        "Set wal_level = replica and max_wal_senders = 10 in its configuration and restart it, or use "
        "backup_postgres: dump.",
    ),
    (
        r"checkpoint request failed|could not write to file|No space left on device",
        "the server at {where} cannot write to its own disk: {detail}",
        "Look at its log and its disk (df -h), free space there, then repeat the command.",
    ),
    (
        r"standby was promoted|canceling statement due to conflict with recovery|full_page_writes=off was replayed",
        "the standby at {where} changed under the backup: {detail}",
        "Repeat the command. If it was promoted, it is the primary now (pg_backup_from). Against conflicts, raise "
        "max_standby_streaming_delay or set hot_standby_feedback = on there.",
    ),
    (
        r"can only write single tablespace to stdout",
        "the server at {where} has tablespaces, and user {user} may not ask it which",
        "Name a superuser of that server in postgres_users.backup, with its password.",
    ),
    (
        r"Connection refused|No such file or directory|could not connect|starting up|shutting down|server closed the",
        "no PostgreSQL server answers at {where}: {detail}",
        "Start it (`pg_lsclusters`, `systemctl status postgresql`), or correct postgresql_host and postgresql_port.",
    ),
    (
        r"could not translate host name|Name or service not known",
        "the host name in {where} is unknown: {detail}",
        "Correct postgresql_host.",
    ),
    (
        r"timeout expired|timed out|No route to host|Network is unreachable",
        "no answer from {where}: {detail}",
        "Check the address (postgresql_host, postgresql_port) and the firewall between.",
    ),
)


def explain(stderr: str, server: Server) -> HQBackupsError:
    """Turn what a client program wrote to standard error into a cause and a next step."""
    detail = last_line(stderr)
    for pattern, message, hint in _EXPLANATIONS:
        if re.search(pattern, stderr):
            facts = {
                "where": server.where,
                "user": server.user,
                "detail": detail,
                "line": _hba_line(server),
                "login": _login(server),
            }
            return PreflightFailed(message.format(**facts), hint=hint.format(**facts))
    return ServiceError(f"the server at {server.where} said: {detail}")


def _login(server: Server) -> str:
    """Return what gives the right user."""
    if server.host.startswith("/"):
        return (
            "Run as the server's own system user (postgresql_backup_os_user), or set the password in "
            "postgres_users.backup"
        )
    return (
        "Set user and password in postgres_users.backup (for a base backup from another host, "
        "postgres_users.replication will do)"
    )


def _hba_line(server: Server) -> str:
    """Return the line of pg_hba.conf that lets a base backup in."""
    if server.host.startswith("/"):
        return f"local replication {server.user} peer"
    return f"host replication {server.user} <this host's address>/32 scram-sha-256"


def last_line(stderr: str) -> str:
    """Return the most telling line of a program's standard error."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"FATAL|ERROR|error:", line)]
    return (telling or lines or ["nothing"])[-1]
