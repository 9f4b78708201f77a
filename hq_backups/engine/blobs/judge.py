"""What tar says while it reads the blobs, and what that makes of the backup.

One rule, for each thing that tar can meet:

================= ========================================================================================
vanished          recorded; the backup is good: HQ deletes blobs while it runs
changed           a warning: the archive has as many bytes of the blob as it had when tar looked at it; of a
                  directory only recorded: HQ adds blobs while it runs
unreadable        a warning while it is at most one file in a thousand; beyond that, or for a directory,
                  the run fails
shrank, bad read  the run fails: tar fills the missing bytes with zeros
anything else     the run fails
================= ========================================================================================

Facts: gnu.org/software/tar/manual/html_node/Synopsis.html (exit status), warnings.html. Words: tar 1.34.
"""

from __future__ import annotations

import ast
import os
import re
import stat
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hq_backups.engine.blobs.watch import SHOWN
from hq_backups.engine.errors import ProducerTruncated

PROGRAM = "tar"
_MAX_LINE = 64 << 10
_UNREADABLE_PART = 1000
"""One file in so many may be unreadable: a single bad one must not end all backups, a wrong user must."""

_TAR = rb"(?:[^:]*/)?tar: "
"""tar calls itself as it was called."""
_NAME = _TAR + rb'(?P<name>"(?:[^"\\]|\\.)*"): '
_VANISHED = re.compile(
    _NAME + rb"(?:(?:File|Directory) removed before we read it"
    rb"|Cannot (?:stat|open|access|savedir|read directory): No such file or directory)\Z"
)
_CHANGED = re.compile(_NAME + rb"file changed as we read it\Z")
_UNREADABLE = re.compile(
    _NAME + rb"Cannot (?:open|stat|access): (?:Permission denied|Operation not permitted)\Z"
)
_IGNORED = re.compile(_NAME + rb"(?P<kind>socket|door|Unknown file type; file) ignored\Z")
_PADDED = re.compile(
    _NAME + rb"(?:File shrank by \d+ bytes?; padding with zeros|Read error at byte .*|Cannot read.*)\Z"
)
_DELAYED = re.compile(_TAR + rb"Exiting with failure status due to (?:previous|delayed) errors\Z")


@dataclass
class Noted:
    """Some files that one thing happened to: how many, and the names of the first."""

    count: int = 0
    names: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        """Count one more."""
        self.count += 1
        if len(self.names) < SHOWN:
            self.names.append(name)

    def listed(self) -> str:
        """Say which, in few words."""
        more = self.count - min(3, len(self.names))
        return ", ".join(self.names[:3]) + (f" and {more} more" if more > 0 else "")


class Judge:
    """Hears what tar says, line by line, in bounded memory."""

    def __init__(self, directory: Path) -> None:
        """Judge a backup of ``directory``."""
        self.directory = directory
        self.vanished, self.changed, self.unreadable = Noted(), Noted(), Noted()
        self.directories, self.padded, self.unknown, self.ignored = Noted(), Noted(), Noted(), Noted()
        self.changed_directories = Noted()
        self._rest = b""
        self._lock = threading.Lock()

    def hear(self, said: bytes) -> None:
        """Take more of what tar says."""
        with self._lock:
            *lines, self._rest = (self._rest + said).split(b"\n")
            for line in lines:
                self._take(line)
            if len(self._rest) > _MAX_LINE:
                self.unknown.add(self._rest[:200].decode("ascii", "replace"))
                self._rest = b""

    def finish(self) -> None:
        """Take what is left without a line's end."""
        with self._lock:
            rest, self._rest = self._rest, b""
            if rest:
                self._take(rest)

    @property
    def found_nothing(self) -> bool:
        """Tell whether tar said nothing that would explain an exit status."""
        explained = (self.vanished, self.changed, self.changed_directories, self.unreadable)
        return not any(noted.count for noted in explained)

    def _take(self, line: bytes) -> None:
        if match := _VANISHED.match(line):
            self.vanished.add(_name(match))
        elif match := _CHANGED.match(line):
            (self.changed_directories if self._is_directory(match) else self.changed).add(_name(match))
        elif match := _UNREADABLE.match(line):
            self._unreadable(match)
        elif match := _PADDED.match(line):
            self.padded.add(line.decode("ascii", "replace").removeprefix("tar: "))
        elif match := _IGNORED.match(line):
            self.ignored.add(_name(match))
        elif not _DELAYED.match(line):
            self.unknown.add(line[:200].decode("ascii", "replace"))

    def _unreadable(self, match: re.Match[bytes]) -> None:
        (self.directories if self._is_directory(match) else self.unreadable).add(_name(match))

    def _is_directory(self, match: re.Match[bytes]) -> bool:
        path = os.path.join(os.fsencode(self.directory), _raw(match))
        try:
            return stat.S_ISDIR(os.lstat(path).st_mode)
        except OSError:
            return False

    def require(self, files: int) -> None:
        """Raise ProducerTruncated unless what happened is little enough for ``files`` that were read."""
        if self.unknown.count:
            raise ProducerTruncated(
                f"it said something that is not understood: {self.unknown.names[0]}",
                program=PROGRAM,
                hint="Look at the disk (`dmesg`) and at the directory, then run the backup again.",
            )
        if self.padded.count:
            raise ProducerTruncated(
                f"bytes were missing while they were read, and zeros were put in their place: {self.padded.listed()}",
                program=PROGRAM,
                hint="Blobs are written once: find out what truncates them, or look at the disk (`dmesg`).",
            )
        if self.directories.count:
            raise ProducerTruncated(
                f"it may not read a directory, and what is in it would be missing: {self.directories.listed()}",
                program=PROGRAM,
                hint="Give the user of the backup (blobdb_backup_os_user) the right to read it.",
            )
        if self.unreadable.count * _UNREADABLE_PART > files + self.unreadable.count:
            raise ProducerTruncated(
                f"{self.unreadable.count} of {files + self.unreadable.count} files cannot be read: "
                + self.unreadable.listed(),
                program=PROGRAM,
                hint="Give the user of the backup (blobdb_backup_os_user) the right to read them.",
            )

    def facts(self) -> dict[str, Any]:
        """Return what is recorded in the manifest."""
        found = {
            "vanished": self.vanished,
            "changed": self.changed,
            "changed_directories": self.changed_directories,
            "unreadable": self.unreadable,
        }
        return {k: {"count": v.count, "names": v.names} for k, v in found.items() if v.count}


def _raw(match: re.Match[bytes]) -> bytes:
    """Return a name as it is, out of C's quotes."""
    try:
        return bytes(ast.literal_eval("b" + match["name"].decode("ascii")))
    except (ValueError, SyntaxError):
        return match["name"][1:-1]


def _name(match: re.Match[bytes]) -> str:
    return ascii(_raw(match).decode("utf-8", "surrogateescape").removeprefix("./"))
