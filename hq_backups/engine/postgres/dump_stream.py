"""pg_dumpall's output on its way into an artifact: watched, and mended where its own server would refuse it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from hq_backups.engine import process
from hq_backups.engine.errors import HQBackupsError, PreflightFailed, ProducerFailed, ProducerTruncated
from hq_backups.engine.postgres.dump import Mender, Scanner
from hq_backups.engine.postgres.psql import Server, explain

PROGRAM = "pg_dumpall"
_BATCH = 256 << 10
"""Bytes that are mended at once: a pipe gives as little as a page."""
_LITTLE, _PAUSE = 128 << 10, 0.001
"""pg_dump writes a page at a time: a reader that lets so many seconds pass before the next look is woken a tenth as
often, and the pipe, which holds more than comes meanwhile, makes nobody wait."""


class DumpStream:
    """pg_dumpall's output, watched."""

    def __init__(
        self, producer: process.Producer, server: Server, source: Mapping[str, Any], *, mend: bool
    ) -> None:
        self._producer, self._server, self._source = producer, server, source
        self._scanner = Scanner(int(source["version_num"]) // 10000)
        self._mender = Mender(self._scanner) if mend else None
        self._ready: bytes | None = b""

    def readinto(self, buffer: memoryview) -> int:
        """Fill ``buffer``, to its end but for the stream's; 0 only when pg_dumpall has ended well."""
        if self._mender is not None:
            return self._mended(self._mender, buffer)
        count = 0
        while count < len(buffer) and (more := self._take(buffer[count:])):
            count += more
            if more < _LITTLE and self._producer.roomy:
                time.sleep(_PAUSE)
        # Scanned where it lies, and much at once: each copy of all that passes is felt.
        self._scanner.feed(buffer[:count])
        return count

    def _take(self, buffer: memoryview | bytearray) -> int:
        try:
            return self._producer.readinto(buffer)
        except ProducerFailed as error:
            raise self._explain(error) from error

    def _mended(self, mender: Mender, buffer: memoryview) -> int:
        """Fill ``buffer`` with what the scanner is past; 0 only when nothing is kept back any more."""
        while not self._ready:
            if self._ready is None:
                return 0
            piece = bytearray(_BATCH)
            count = self._take(piece)
            self._ready = mender.feed(bytes(piece[:count])) if count else mender.end() or None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _explain(self, error: ProducerFailed) -> HQBackupsError:
        explained = explain(str(error.facts["stderr"]), self._server)
        if not isinstance(explained, PreflightFailed):
            error.hint = "Look at the server's log, then repeat the command; the last good backup is kept."
            return error
        if not self._scanner.databases:
            return explained
        error.hint = explained.hint
        return error

    def finish(self) -> Mapping[str, Any]:
        """Check that the whole cluster passed, its completion line included; return the rows of each table."""
        problem = self._scanner.problem()
        if problem is not None:
            raise ProducerTruncated(problem, program=PROGRAM)
        missing = set(self._source["contents"]) - set(self._scanner.databases)
        if missing:
            raise ProducerTruncated(f"database {min(missing)!r} did not come", program=PROGRAM)
        return {"rows": self._scanner.rows()}
