"""pg_basebackup's output on its way into an artifact: what must be in it, what it tells, what its failures mean."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hq_backups.engine import archive
from hq_backups.engine.errors import (
    BadPages,
    DiskFull,
    HQBackupsError,
    PreflightFailed,
    ProducerFailed,
    ProducerTruncated,
)
from hq_backups.engine.postgres import spool, tablespaces
from hq_backups.engine.postgres.psql import Server, explain
from hq_backups.engine.process import Producer

PROGRAM = "pg_basebackup"
SEGMENT = re.compile(r"pg_wal/[0-9A-F]{24}\Z")
REQUIRED = ("PG_VERSION", "backup_label", "backup_manifest", "global/pg_control")
_KEPT = frozenset({"PG_VERSION", "backup_label", tablespaces.MAP})
_BAD_PAGE = re.compile(r"checksum (?:verification failed|error)|invalid page", re.IGNORECASE)
_NOT_WRITTEN = re.compile(
    r"error: could not [a-z]+ (?:to )?(?:file|directory) .*: (?:No space left|Disk quota)"
)
_SHOWN = 2000
"""Characters of what it said that a message holds."""


def is_apart(source: Mapping[str, Any]) -> bool:
    """Tell whether a server has tablespaces outside its data directory: only a test's lie inside."""
    return any(str(t["location"]).startswith("/") for t in source["tablespaces"])


class Watched:
    """A base backup on its way: what must be in it, and what it tells."""

    def __init__(self, *, bad_pages: bool) -> None:
        """Begin; ``bad_pages`` marks one that was made without looking at checksums."""
        self.bad_pages = bad_pages
        self.watch = archive.TarWatch(_KEPT)

    def finish(self) -> Mapping[str, Any]:
        """Check that the whole cluster passed, WAL and end of archive included."""
        watch = self.watch
        if not watch.ended:
            raise ProducerTruncated("the end of the archive did not come", program=PROGRAM)
        missing = [m for m in REQUIRED if m not in watch.names]
        if missing:
            raise ProducerTruncated(f"{', '.join(missing)} did not come", program=PROGRAM)
        if not any(SEGMENT.match(n) for n in watch.names):
            raise ProducerTruncated("no WAL came", program=PROGRAM)
        label = watch.kept["backup_label"].decode(errors="replace")
        found = dict(re.findall(r"^([A-Z ]+): (.*)$", label, re.MULTILINE))
        marked = {"bad_pages": True} if self.bad_pages else {}
        return {
            **marked,
            "files": watch.files,
            "start_lsn": found.get("START WAL LOCATION", "").split(" ")[0],
            "start_timeline": found.get("START TIMELINE", ""),
            "backup_from": found.get("BACKUP FROM", ""),
        }


class Piped(Watched):
    """What pg_basebackup writes to its standard output."""

    def __init__(self, producer: Producer, server: Server, *, bad_pages: bool = False) -> None:
        """Read from ``producer``, which copies ``server``."""
        super().__init__(bad_pages=bad_pages)
        self._producer = producer
        self._server = server

    def readinto(self, buffer: memoryview) -> int:
        """Fill some of ``buffer``; 0 only when the program has ended well."""
        try:
            count = self._producer.readinto(buffer)
        except ProducerFailed as error:
            raise _failure(error, self._server, began=bool(self.watch.files)) from error
        if count:
            self.watch.feed(buffer[:count])
        return count


class Spooled(Watched):
    """What pg_basebackup left in a spool, read as one archive."""

    def __init__(self, directory: Path, known: Sequence[Mapping[str, Any]], *, bad_pages: bool) -> None:
        """Read from ``directory``; ``known`` are the tablespaces that the server told of before."""
        super().__init__(bad_pages=bad_pages)
        self._known = {str(t["oid"]): t for t in known}
        self._sizes = spool.tablespaces(directory)
        self._files = spool.Spooled(directory)

    def readinto(self, buffer: memoryview) -> int:
        """Fill some of ``buffer``; 0 at the end."""
        count = self._files.readinto(buffer)
        if count:
            self.watch.feed(buffer[:count])
        return count

    def finish(self) -> Mapping[str, Any]:
        """Return the tablespaces too as they were copied: one may have been made or dropped meanwhile."""
        facts = super().finish()
        mapped = tablespaces.mapped(self.watch.kept.get(tablespaces.MAP, b""))
        if set(mapped) != set(self._sizes):
            raise ProducerTruncated("its files are not those of its tablespaces", program=PROGRAM)
        inside = [t for t in self._known.values() if not str(t["location"]).startswith("/")]
        apart = [
            {"oid": int(oid), "name": str(self._known.get(oid, {}).get("name", oid)), "location": place}
            | {"size": self._sizes[oid]}
            for oid, place in mapped.items()
        ]
        return {**facts, "tablespaces": [*inside, *apart]}


def spool_failure(error: ProducerFailed, server: Server, directory: Path) -> HQBackupsError:
    """Return what a failure to fill a spool means."""
    said = str(error.facts["stderr"])
    if _NOT_WRITTEN.search(said):
        return DiskFull(path=directory.parent)
    status = error.facts["status"]
    told = ProducerFailed(
        program=PROGRAM, status=status, tail=said[-_SHOWN:] or "it said nothing", stderr=said
    )
    return _failure(told, server, began=spool.size(directory) > 0)


def _failure(error: ProducerFailed, server: Server, *, began: bool) -> HQBackupsError:
    """Return what a failure of pg_basebackup means; ``began`` says whether any of the cluster had come."""
    tail = str(error.facts["stderr"])
    if _BAD_PAGE.search(tail):
        damaged = [line for line in tail.splitlines() if _BAD_PAGE.search(line)]
        return BadPages(damaged[0].strip())
    explained = explain(tail, server)
    if began:
        error.hint = "Look at the server's log, then repeat the command; the last good backup is kept."
        if "has already been removed" in tail:
            error.hint = "Raise max_slot_wal_keep_size, which let the WAL go, then repeat the command."
        elif isinstance(explained, PreflightFailed) and "server closed the" not in tail:
            error.hint = explained.hint
        return error
    return explained if isinstance(explained, PreflightFailed) else error
