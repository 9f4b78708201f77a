"""Talking to a server through psql: no driver to install, the same login as every operator uses.

SQL goes over standard input, passwords through a temporary 0600 pgpass file: neither is ever in argv.
"""

from __future__ import annotations

import contextlib
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
        # What is set for the role or the database must neither cut a long run short nor change what names mean:
        # a database's owner could put functions of his own before the system's. Names come as UTF-8.
        options = "-c search_path= -c statement_timeout=0 -c lock_timeout=0"
        env = {"PGOPTIONS": options, "PGCLIENTENCODING": "UTF8"}
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
        r"|role \".*\" does not exist",
        "the server at {where} does not let user {user} in: {detail}",
        "Run as the server's own system user (postgresql_backup_os_user), or set the password in postgres_users, and "
        "check pg_hba.conf.",
    ),
    (
        r"no pg_hba\.conf entry for replication|must be (superuser or )?replication role|permission denied to start WAL"
        r"|REPLICATION attribute",
        "the server at {where} does not allow user {user} a replication connection: {detail}",
        "Add a line to pg_hba.conf (local replication {user} peer) and reload the server.",
    ),
    (
        r"no pg_hba\.conf entry",
        "the server at {where} refuses this connection: {detail}",
        "Add a line for user {user} to pg_hba.conf and reload the server.",
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
        r"max_wal_senders|all replication slots are in use|remaining connection slots",
        "the server at {where} has no free slot for a backup: {detail}",
        "Raise max_wal_senders or max_replication_slots, or drop what holds them: select * from pg_stat_replication, "
        "pg_replication_slots.",
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
            facts = {"where": server.where, "user": server.user, "detail": detail}
            return PreflightFailed(message.format(**facts), hint=hint.format(**facts))
    return ServiceError(f"the server at {server.where} said: {detail}")


def last_line(stderr: str) -> str:
    """Return the most telling line of a program's standard error."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"FATAL|ERROR|error:", line)]
    return (telling or lines or ["nothing"])[-1]
