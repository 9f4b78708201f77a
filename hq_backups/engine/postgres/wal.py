"""Holding the WAL that a base backup needs until it has it.

``pg_basebackup -X fetch`` reads the WAL at the end; without a slot made *before* it starts, with immediate
reserve, a busy server may have removed it by then. A temporary slot lives as long as its connection
(postgresql.org/docs/current/protocol-replication.html, CREATE_REPLICATION_SLOT).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hq_backups.engine.errors import PreflightFailed, ProducerFailed
from hq_backups.engine.postgres.psql import Server, explain
from hq_backups.engine.process import Producer

ANSWER_SECONDS = 120


def slot_name(run: str) -> str:
    """Return a legal, telling name of a slot: lower case, digits and underscores, 63 at most."""
    return ("hqb_" + re.sub(r"[^a-z0-9]+", "_", run.lower()))[:63]


@contextmanager
def held_wal(psql: Path, server: Server, run: str, major: int) -> Iterator[None]:
    """Keep a temporary physical slot for the block; raises PreflightFailed when the server gives none."""
    conninfo = server.conninfo("postgres", replication="true")
    argv: list[str | Path] = [psql, "-X", "-A", "-t", "-q", "-w", "-v", "ON_ERROR_STOP=1", "-d", conninfo]
    command = f"CREATE_REPLICATION_SLOT {slot_name(run)} TEMPORARY PHYSICAL RESERVE_WAL;\n"
    with contextlib.ExitStack() as stack:
        # It is idle all the time: the server's patience must not end it, and with it the slot.
        env = stack.enter_context(server.of(major).environment())
        holder = stack.enter_context(Producer(argv, env=env, user=server.os_user, feed=True))
        try:
            # A psql that is already gone says why on its standard error.
            with contextlib.suppress(BrokenPipeError):
                holder.stdin.write(command.encode())
            if not holder.readable(ANSWER_SECONDS):
                raise PreflightFailed(f"the server at {server.where} gives no replication slot")
            holder.read(4096)
        except ProducerFailed as error:
            raise explain(str(error.facts["stderr"]), server) from error
        # Killed at the end of the block, the connection drops its slot.
        yield
