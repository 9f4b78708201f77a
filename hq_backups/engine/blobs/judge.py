"""What was met while the blobs were read, and what that makes of the backup.

One rule, for each thing that can be met:

================= ========================================================================================
vanished          recorded; the backup is good: HQ deletes blobs while it runs
changed           a warning: the archive has as many bytes of the blob as it had when it was opened; of a
                  directory only recorded: HQ adds blobs while it runs
unreadable        a warning while it is at most one file in a thousand; beyond that, or for a directory,
                  the run fails
shrank, bad read  the run fails: nothing is put in place of the missing bytes
anything else     the run fails
================= ========================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hq_backups.engine.blobs import reading
from hq_backups.engine.errors import ProducerTruncated
from hq_backups.engine.events import Events

READER = "the reader of the blobs"
_UNREADABLE_PART = 1000
"""One file in so many may be unreadable: a single bad one must not end all backups, a wrong user must."""
_RIGHT = "Give the user of the backup (blobdb_backup_os_user) the right to read"
_BROKEN = {
    "shrank": (
        "{name} became shorter while it was read",
        "Blobs are written once: find out what truncates them, then run the backup again.",
    ),
    "unread": (
        "{name} cannot be read: {why}",
        "Look at the disk (`dmesg`) and at the directory, then run the backup again.",
    ),
    "deep": (
        "the path {name} is too deep or too long to be restored",
        "No key of HQ's is so long: find out what has put it there.",
    ),
}


class Noted(reading.Noted):
    """Files that one thing happened to, told to an operator."""

    def listed(self) -> str:
        """Say which, in few words."""
        more = self.count - min(3, len(self.names))
        return ", ".join(self.names[:3]) + (f" and {more} more" if more > 0 else "")


def require_unbroken(report: Mapping[str, Any]) -> None:
    """Raise ProducerTruncated when the archive could not be brought to a good end."""
    broken = report["broken"]
    if broken is not None:
        message, hint = _BROKEN[broken["what"]]
        raise ProducerTruncated(message.format(**broken), program=READER, hint=hint)


class Judge:
    """Judges a report of the program that reads the blobs (``reading.py``)."""

    def __init__(self, report: Mapping[str, Any]) -> None:
        """Take the report; raises LookupError and TypeError when it is none."""
        self.files: int = report["files"]
        self._counts = {name: report[name] for name in ("files", "directories", "bytes")}
        self._vanished = Noted(**report["vanished"])
        self._changed = Noted(**report["changed"])
        self._changed_directories = Noted(**report["changed_directories"])
        self._unreadable = Noted(**report["unreadable"])
        self._unreadable_directories = Noted(**report["unreadable_directories"])
        self._left_out: Mapping[str, Any] = report["left_out"]

    def require(self) -> None:
        """Raise ProducerTruncated unless what happened is little enough for the files that were read."""
        directories, files = self._unreadable_directories, self._unreadable
        if directories.count:
            raise ProducerTruncated(
                f"it may not read a directory, and what is in it would be missing: {directories.listed()}",
                program=READER,
                hint=f"{_RIGHT} it.",
            )
        met = self.files + files.count
        if files.count * _UNREADABLE_PART > met:
            raise ProducerTruncated(
                f"{files.count} of {met} files cannot be read: {files.listed()}",
                program=READER,
                hint=f"{_RIGHT} them.",
            )

    def facts(self) -> dict[str, Any]:
        """Return what is recorded in the manifest."""
        found = {
            "vanished": self._vanished,
            "changed": self._changed,
            "changed_directories": self._changed_directories,
            "unreadable": self._unreadable,
        }
        noted = {name: each.told() for name, each in found.items() if each.count}
        left_out = {"left_out": dict(self._left_out)} if self._left_out["count"] else {}
        return {**self._counts, **noted, **left_out}

    def tell(self, events: Events) -> None:
        """Tell what an operator should know."""
        vanished, changed, unreadable = self._vanished, self._changed, self._unreadable
        if vanished.count:
            events.step("backup", f"{vanished.count} files vanished while they were read")
        if changed.count:
            events.warning(
                "changed", f"{changed.count} files changed while they were read: {changed.listed()}"
            )
        if unreadable.count:
            events.warning(
                "unreadable",
                f"{unreadable.count} files could not be read and are not in the backup: {unreadable.listed()}",
            )
        if left_out := self._left_out["count"]:
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(left_out.items()))
            events.warning(
                "left-out",
                f"neither files nor directories, and left out: {kinds} ({self._left_out['names'][0]} …)",
            )
