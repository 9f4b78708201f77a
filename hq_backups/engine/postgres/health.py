"""What of a server's state stands in a base backup's way, or will soon stand in the server's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hq_backups.engine import space
from hq_backups.engine.errors import PreflightFailed
from hq_backups.engine.events import Events
from hq_backups.engine.postgres.psql import Server

SENDERS = 2
"""Replication connections that a base backup takes: its own, and the one that holds the WAL."""
HOARD = 2
"""A slot that holds more than so many times max_wal_size is told of."""


def require_wal(identity: Mapping[str, Any], server: Server) -> None:
    """Refuse a server that can give no base backup by its settings; raises PreflightFailed."""
    if identity["wal_level"] == "minimal":
        raise PreflightFailed(
            f"the server at {server.where} writes too little WAL for a base backup: wal_level is minimal",
            hint="Set wal_level = replica and max_wal_senders = 10 there and restart it, or use backup_postgres: dump.",
        )
    if identity["max_wal_senders"] < SENDERS:
        raise PreflightFailed(
            f"the server at {server.where} allows {identity['max_wal_senders']} replication connections "
            f"(max_wal_senders); a base backup takes {SENDERS}",
            hint="Set max_wal_senders = 10 there and restart it, or use backup_postgres: dump.",
        )


def warn(identity: Mapping[str, Any], server: Server, events: Events) -> None:
    """Tell what is no reason against a backup, but should be known."""
    if identity["in_recovery"]:
        events.step("prepare", f"the server at {server.where} is a standby: its backup is as old as it lags")
    if not identity["data_checksums"]:
        events.warning("no-checksums", "the server keeps no data checksums: damaged pages go unnoticed")
    for slot in identity["slots"]:
        held = slot["held"]
        if held is not None and held > HOARD * identity["max_wal_size"]:
            reader = "its reader lags" if slot["active"] else "nobody reads it"
            events.warning(
                "slot-holds-wal",
                f"replication slot {slot['name']!r} keeps {space.human_bytes(held)} of WAL on the server's disk and "
                f"{reader}: let its reader catch up, or drop it (select pg_drop_replication_slot('…'))",
            )
