"""The blob directory as a tar: written by a program of its own, whose report is judged."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hq_backups.engine.blobs import reading
from hq_backups.engine.blobs.ahead import Ahead
from hq_backups.engine.blobs.judge import READER, Judge, require_unbroken
from hq_backups.engine.errors import ProducerTruncated
from hq_backups.engine.events import Events
from hq_backups.engine.process import Producer

PROGRAM: Sequence[str] = (sys.executable, "-I", "-S", reading.__file__)
LOST_FOUND = "lost+found"
"""Where a whole file system is the blob directory: root's alone, and no blob's."""
OWN = ".hq_backups-"
"""How our own directories begin, at the top of the blob directory: what a killed merge has left is no blob."""


class _Reader(Producer):
    """The program, and the report that it leaves in memory that both share."""

    def __init__(self, directory: Path, told: int) -> None:
        self._report = os.memfd_create("report")
        try:
            argv = [*PROGRAM, str(directory), str(self._report), str(told), f"{OWN}*", LOST_FOUND]
            super().__init__(argv, fds=[fd for fd in (self._report, told) if fd >= 0])
        except BaseException:
            os.close(self._report)
            raise
        self.program = READER

    def ended_well(self, status: int) -> bool:
        """Believe a status of 0; say what is in the report of another one."""
        if status != 0 and os.fstat(self._report).st_size:
            require_unbroken(self.report())
        return status == 0

    def report(self) -> Mapping[str, Any]:
        """Return what was met; raises ProducerTruncated when that was not told."""
        try:
            found: Mapping[str, Any] = json.loads(os.pread(self._report, os.fstat(self._report).st_size, 0))
        except ValueError:
            raise ProducerTruncated("it has not told what it met", program=READER) from None
        return found

    def close(self) -> None:
        """End it, if it still runs."""
        super().close()
        if self._report >= 0:
            os.close(self._report)
            self._report = -1


class BlobStream:
    """The blob directory as a tar, judged."""

    def __init__(self, directory: Path, events: Events) -> None:
        """Start to read ``directory``."""
        self._events = events
        self._size = 0
        self._ahead = Ahead(directory, OWN)
        try:
            self._reader = _Reader(directory, self._ahead.listens)
        except BaseException:
            self._ahead.close()
            raise
        # It ends when nobody is left who tells it anything.
        self._ahead.hand_over()

    def readinto(self, view: memoryview, /) -> int:
        """Fill some of ``view``; 0 only when all of the archive has come."""
        count = self._reader.readinto(view)
        self._size += count
        if not count and self._reader.report().get("written") != self._size:
            raise ProducerTruncated("not all of the archive has come", program=READER)
        return count

    def finish(self) -> Mapping[str, Any]:
        """Judge the whole; return the counts for the manifest."""
        judge = Judge(self._reader.report())
        judge.require()
        judge.tell(self._events)
        return judge.facts()

    def close(self) -> None:
        """End the reader, if it still runs."""
        self._ahead.close()
        self._reader.close()
