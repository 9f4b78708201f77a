"""A backup of a running node: a snapshot that is whole, streamed, and proven to be what has passed."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hq_backups.engine.couch import layout, snapshot
from hq_backups.engine.couch.contents import Contents, listed, needs_header
from hq_backups.engine.couch.frozen import Frozen
from hq_backups.engine.couch.headers import header_of
from hq_backups.engine.couch.snapshot import Snapshot
from hq_backups.engine.couch.tarball import Tarball
from hq_backups.engine.errors import CorruptBackup, HQBackupsError, ProducerTruncated
from hq_backups.engine.events import Events

TRIES = 4
"""How often a snapshot is taken that lacks something: a database that is just being made is whole a moment later."""
PAUSE = 1.0
TAIL = 64 << 10
"""Bytes at a file's end that mostly have its last header."""

WHAT = "the data directory"


@contextmanager
def whole(root: Path, node: str | None, events: Events) -> Iterator[tuple[Snapshot, Contents]]:
    """Hold a snapshot in which nothing is missing; raises CorruptBackup when it stays incomplete."""
    for left in reversed(range(TRIES)):
        taken = snapshot.take(root)
        try:
            try:
                contents = read(taken)
                problems = contents.problems(node)
            except CorruptBackup as error:
                if not left:
                    raise
                problems = [str(error)]
            if not problems:
                yield taken, contents
                return
        finally:
            taken.close()
        if not left:
            raise incomplete(problems, root)
        events.step("snapshot", f"looking again, for {listed(problems)}")
        time.sleep(PAUSE)


def read(taken: Snapshot) -> Contents:
    """Return what a snapshot holds, by the last headers of its files."""
    databases = [file for file in taken.files if needs_header(file.path)]
    # All at once: a disk, or a network behind it, that is asked for one after another waits most of the time.
    for file in databases:
        file.ask(max(0, file.size - TAIL), TAIL)
    headers = {file.path: header_of(file.open(), file.path) for file in databases}
    maps = taken.find(layout.DBS)
    if maps is None:
        raise CorruptBackup(f"{layout.DBS} is not there", name=WHAT)
    return Contents.read(maps.open(), headers, WHAT)


def incomplete(problems: list[str], root: Path) -> HQBackupsError:
    """Return the error for a data directory from which a node would serve less than it should."""
    return HQBackupsError(
        f"{root} is not whole: {listed(problems)}",
        hint="A backup of it would hold empty databases in their place, so none was made, and the last good one is "
        "kept. Look at these files and at CouchDB's log; a database that is not wanted: DELETE it.",
    )


class CouchStream:
    """A snapshot's bytes, and afterwards what they were."""

    def __init__(self, taken: Snapshot, contents: Contents, told: Mapping[str, Any]) -> None:
        """Take what was found; ``told`` is what the node said of its databases at that moment."""
        self._snapshot, self._contents, self._told = taken, contents, told
        # By its shard maps and by each file's last header a node knows what is there.
        starts = {path: header.position for path, header in contents.headers.items() if header is not None}
        starts[layout.DBS] = 0
        self._endings = {f.path: _sum(f, starts[f.path]) for f in taken.files if f.path in starts}
        self._tarball = Tarball(taken, starts)

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill ``buffer``; 0 only after the end of the archive."""
        return self._tarball.readinto(buffer)

    def finish(self) -> Mapping[str, Any]:
        """Return files, databases and counts; raises when not everything has passed that was there."""
        sums = self._tarball.sums
        unread = [file.path for file in self._snapshot.files if file.path not in sums]
        if unread or not self._tarball.ended:
            raise ProducerTruncated(f"{listed(unread)} did not pass", program="the backup of CouchDB")
        # What was looked at is what passed, so what was found in it holds for the archive.
        if others := [path for path, end in self._endings.items() if self._tarball.endings[path] != end]:
            raise ProducerTruncated(
                f"{listed(others)} is another than when it began", program="the backup of CouchDB"
            )
        source = self._contents.to_source(self._told.get("node"))
        for name, counted in self._told.get("counts", {}).items():
            if name in source["databases"]:
                source["databases"][name]["counted_by_node"] = list(counted)
        return {
            "order": layout.VIEWS_FIRST,
            "files": sums,
            **source,
            "one_moment": self._snapshot.one_moment,
            "snapshot_seconds": round(self._snapshot.seconds, 4),
        }


def _sum(file: Frozen, start: int) -> str:
    """Return the sha256 of a file's end."""
    sha, buffer = hashlib.sha256(), memoryview(bytearray(TAIL))
    while count := file.read_into(buffer, start):
        sha.update(buffer[:count])
        start += count
    return sha.hexdigest()
