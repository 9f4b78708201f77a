"""What a restore makes before it changes anything, written down so that the next one removes it after a kill.

A record lies beside the data directory for as long as its restore unpacks. It is only believed while the unpacked
tree still lies where it was unpacked to: once it was moved, to serve or by hand, what belongs to it is kept.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from hq_backups.engine import outer
from hq_backups.engine.config import from_plain, to_plain
from hq_backups.engine.errors import UsageError
from hq_backups.engine.journal import MAX_BYTES, write_own
from hq_backups.engine.swap import inode

_SUFFIX = ".unfinished.json"


@dataclass(frozen=True)
class Unfinished:
    """One restore that has made directories and changed nothing yet."""

    run: str
    target: Path
    staging: Path
    inode: int
    """The unpacked tree's, which renames keep."""
    outer: Mapping[str, int]
    """The inode number of each directory that was made elsewhere, by path."""
    kept: tuple[Path, ...] = ()
    """Those of ``outer`` that were there before, empty."""

    @property
    def path(self) -> Path:
        """Return where the record lies."""
        return self.target.with_name(f"{_prefix(self.target)}{self.run}{_SUFFIX}")

    def write(self) -> None:
        """Put the record on disk, whole, before there is anything in what was made."""
        write_own(self.path, json.dumps(to_plain(self)).encode())

    def forget(self) -> None:
        """Remove the record: what it tells of is in use, or gone."""
        self.path.unlink(missing_ok=True)

    def is_unused(self) -> bool:
        """Tell whether the tree lies where it was unpacked to, so that nothing can be using it."""
        return inode(self.staging) == self.inode

    def remove(self) -> None:
        """Remove everything that was made, the tree last: while it is there this can be repeated."""
        outer.remove({Path(place): number for place, number in self.outer.items()}, self.kept)
        shutil.rmtree(self.staging, ignore_errors=True)
        self.forget()


def left(target: Path) -> Iterator[Unfinished]:
    """Yield what restores of ``target`` that died have written down; only ours, and about this target."""
    with os.scandir(target.parent) as entries:
        listed = sorted(entry.name for entry in entries)
    for name in listed:
        if name.startswith(_prefix(target)) and name.endswith((_SUFFIX, f"{_SUFFIX}.new")):
            path = target.with_name(name)
            found = _read(path)
            if name.endswith(".new"):
                path.unlink(missing_ok=True)
            elif found is not None and (found.target, found.path) == (target, path):
                yield found


def _prefix(target: Path) -> str:
    return f".{target.name}.hq_backups-"


def _read(path: Path) -> Unfinished | None:
    """Read a record; None of one that others could have written: what it says is done with our rights."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    with os.fdopen(fd, "rb") as file:
        about = os.fstat(fd)
        if not stat.S_ISREG(about.st_mode) or about.st_mode & 0o022 or about.st_uid != os.geteuid():
            return None
        try:
            return from_plain(Unfinished, json.loads(file.read(MAX_BYTES)))
        except (ValueError, RecursionError, UsageError):
            return None
