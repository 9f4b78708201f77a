"""GNU tar reads the blobs: at its speed, a million of them. Its stream is watched, and its words are judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hq_backups.engine.blobs.ahead import Ahead
from hq_backups.engine.blobs.judge import PROGRAM, Judge
from hq_backups.engine.blobs.watch import Watch
from hq_backups.engine.errors import ProducerTruncated
from hq_backups.engine.events import Events
from hq_backups.engine.process import Producer

LOST_FOUND = "lost+found"
"""Where a whole file system is the blob directory: root's alone, and no blob's."""
OWN = ".hq_backups-"
"""How our own directories begin, at the top of the blob directory: what a killed merge has left is no blob."""
_ROOMY = 256 << 10
"""Bytes of a buffer that takes whatever was kept of a member's headers, and more."""
_RECORD = 512 * 512
"""tar writes in such records, and fills the last one with zeros."""


class _Tar(Producer):
    """GNU tar; its exit status is judged together with all that it said."""

    def __init__(self, argv: Sequence[str | Path], judge: Judge) -> None:
        self._judge = judge
        super().__init__(argv, heard=judge.hear)

    def ended_well(self, status: int) -> bool:
        """Believe a status of 1 or 2 only when everything that was said explains it."""
        if status not in (0, 1, 2) or not self.has_said_all():
            return False
        self._judge.finish()
        return status == 0 or bool(
            not self._judge.found_nothing
            or self._judge.unknown.count
            or self._judge.padded.count
            or self._judge.directories.count
        )


class BlobStream:
    """The blob directory as a tar, watched and judged."""

    def __init__(self, directory: Path, events: Events, program: str = PROGRAM) -> None:
        """Start tar on ``directory``."""
        self._events = events
        self._judge = Judge(directory)
        self._watch = Watch()
        argv = [program, "--create", "--file=-", "--format=gnu", "--hard-dereference", "--quoting-style=c"]
        argv += [
            "--blocking-factor=512",
            "--anchored",
            f"--exclude=./{OWN}*",
            f"--exclude=./{LOST_FOUND}",
            f"--directory={directory}",
            ".",
        ]
        self._tar = _Tar(argv, self._judge)
        self._ahead = Ahead(directory, OWN)
        self._buffer = memoryview(bytearray(_ROOMY))
        self._ready = memoryview(b"")
        self._kept = b""
        self._size = 0

    def readinto(self, view: memoryview, /) -> int:
        """Fill some of ``view``; 0 only when tar has ended well."""
        if not self._ready and len(view) >= _ROOMY:
            return self._read(view)
        while not self._ready:
            count = self._read(self._buffer)
            if not count:
                return 0
            self._ready = self._buffer[:count]
        size = min(len(view), len(self._ready))
        view[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def _read(self, view: memoryview) -> int:
        """Fill some of ``view`` with what the watch lets through; 0 at the end."""
        while True:
            kept = len(self._kept)
            view[:kept] = self._kept
            count = self._tar.readinto(view[kept:])
            if not count:
                if kept or not self._watch.ended or self._size % _RECORD:
                    raise ProducerTruncated("the archive has no end", program=PROGRAM)
                return 0
            self._size += count
            out, begin = self._watch.take(view, kept + count)
            self._ahead.passed(self._watch.files, self._watch.bytes)
            self._kept = bytes(view[begin : kept + count])
            if out:
                return out

    def finish(self) -> Mapping[str, Any]:
        """Judge the whole; return the counts for the manifest."""
        watch, judge = self._watch, self._judge
        judge.require(watch.files)
        for name in judge.ignored.names:
            watch.note_left_out("sockets", name)
        if more := judge.ignored.count - len(judge.ignored.names):
            watch.left_out["sockets"] += more
        self._tell()
        facts = {
            "files": watch.files,
            "directories": watch.directories,
            "bytes": watch.bytes,
            **judge.facts(),
        }
        if watch.left_out:
            facts["left_out"] = {"count": watch.left_out, "names": watch.left_out_names}
        return facts

    def _tell(self) -> None:
        judge, watch = self._judge, self._watch
        if judge.vanished.count:
            self._events.step("backup", f"{judge.vanished.count} files vanished while they were read")
        if judge.changed.count:
            self._events.warning(
                "changed",
                f"{judge.changed.count} files changed while they were read: {judge.changed.listed()}",
            )
        if judge.unreadable.count:
            self._events.warning(
                "unreadable",
                f"{judge.unreadable.count} files could not be read and are not in the backup: "
                f"{judge.unreadable.listed()}",
            )
        if watch.left_out:
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(watch.left_out.items()))
            self._events.warning(
                "left-out",
                f"neither files nor directories, and left out: {kinds} ({watch.left_out_names[0]} …)",
            )

    def close(self) -> None:
        """End tar, if it still runs."""
        self._ahead.close()
        self._tar.close()
