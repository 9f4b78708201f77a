"""The data directory of a running node as it was at one moment, without stopping it.

Every file is opened, then all sizes are taken, again and again until nothing grew in between: at the moment between
two such rounds all files had these sizes, whatever was appended before and after. Then the names are looked at again:
when compaction or a deletion has moved one meanwhile, everything begins anew.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hq_backups.engine.couch import layout, limits
from hq_backups.engine.couch.frozen import Frozen
from hq_backups.engine.errors import HQBackupsError, PreflightFailed

TRIES = 50
"""How often everything is opened anew before it is given up."""
PAUSE = 0.05
"""Seconds between two tries: a compaction moves two files within milliseconds, a node's smoosh one after another."""
ROUND_SECONDS = 2.0
"""How long to wait for a moment in which nothing grows."""


class Moved(Exception):
    """A file is no longer what it was a moment ago."""


@dataclass(frozen=True)
class Snapshot:
    """What was there at the moment; close it."""

    root: Path
    files: Sequence[Frozen]
    """In the order in which they are copied."""
    directories: Sequence[tuple[str, os.stat_result]]
    left_out: Sequence[str]
    """Names of what is neither CouchDB's nor transient."""
    seconds: float
    """What it took, from the first open to the last look."""
    one_moment: bool
    """Whether all sizes are of one moment; else each is of its own, within ``seconds``."""

    @property
    def size(self) -> int:
        """Return the bytes of all files."""
        return sum(file.size for file in self.files)

    def find(self, path: str) -> Frozen | None:
        """Return the file at a path."""
        return next((file for file in self.files if file.path == path), None)

    def close(self) -> None:
        """Let go of every file."""
        for file in self.files:
            os.close(file.fd)


@dataclass(frozen=True)
class Listing:
    """The names in a data directory."""

    files: tuple[str, ...]
    """In the order in which they are copied."""
    directories: tuple[str, ...]
    left_out: tuple[str, ...]


def take(root: Path, tries: int = TRIES) -> Snapshot:
    """Take a snapshot of a data directory; raises PreflightFailed, or an error when it never stands still."""
    for left in reversed(range(tries)):
        try:
            return _take(root)
        except Moved as moved:
            if not left:
                raise HQBackupsError(
                    f"the files of CouchDB move faster than they can be opened: {moved}, in {tries} tries",
                    hint="See what compacts or deletes there (GET /_active_tasks), then run the backup again.",
                ) from moved
            time.sleep(PAUSE)
    raise AssertionError("unreachable")


def _take(root: Path) -> Snapshot:
    began = time.monotonic()
    listing = listed(root)
    limits.allow(len(listing.files))
    fds: list[int] = []
    try:
        for path in listing.files:
            fds.append(_open(root, path))
        status, one_moment = _stand_still(fds)
        if listed(root).files != listing.files:
            raise Moved("a file came or went")
        for path, seen in zip(listing.files, status, strict=True):
            _require_same(root / path, seen)
        files = [
            Frozen(path, fd, seen.st_size, seen)
            for path, fd, seen in zip(listing.files, fds, status, strict=True)
        ]
        directories = [(path, _status(root / path)) for path in listing.directories]
        return Snapshot(root, files, directories, listing.left_out, time.monotonic() - began, one_moment)
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise


def _stand_still(fds: Sequence[int]) -> tuple[list[os.stat_result], bool]:
    """Look at all files until two rounds agree; tell whether they did."""
    deadline = time.monotonic() + ROUND_SECONDS
    before = [os.fstat(fd) for fd in fds]
    while True:
        again = [os.fstat(fd) for fd in fds]
        if all(a.st_size == b.st_size for a, b in zip(before, again, strict=True)):
            return again, True
        if time.monotonic() >= deadline:
            return again, False
        before = again


def _open(root: Path, path: str) -> int:
    try:
        fd = os.open(root / path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise Moved(f"{path} went away") from None
    except OSError as error:
        raise unreadable(root / path, error) from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise PreflightFailed(f"{root / path} is no regular file")
    return fd


def _require_same(path: Path, seen: os.stat_result) -> None:
    """Raise Moved unless a name still stands for the file that is held: its number is not reused meanwhile."""
    if not os.path.samestat(_status(path), seen):
        raise Moved(f"{path.name} was replaced")


def _status(path: Path) -> os.stat_result:
    try:
        return os.lstat(path)
    except FileNotFoundError:
        raise Moved(f"{path.name} went away") from None


def listed(root: Path) -> Listing:
    """Return the names that a copy needs; raises PreflightFailed for what cannot be read."""
    files, directories, left_out = [], ["."], []
    for path, is_directory in _entries(root):
        if is_directory:
            directories.append(path)
        elif layout.kind(path) is not None:
            files.append(path)
        elif not layout.is_transient(path):
            left_out.append(path)
    return Listing(
        tuple(sorted(files, key=layout.order)), tuple(sorted(directories)), tuple(sorted(left_out))
    )


def _entries(root: Path) -> Iterator[tuple[str, bool]]:
    """Yield what is in the data directory, as paths relative to it, and whether each is a directory."""
    waiting = [""]
    while waiting:
        below = waiting.pop()
        try:
            with os.scandir(root / below) as entries:
                found = [(entry.name, _is_directory(entry)) for entry in entries]
        except FileNotFoundError:
            raise Moved(f"{below} went away") from None
        except OSError as error:
            raise unreadable(root / below, error) from error
        for name, is_directory in found:
            path = f"{below}/{name}" if below else name
            ours = below or name in (layout.SHARDS, layout.VIEWS)
            if is_directory and ours:
                waiting.append(path)
            if not is_directory or ours:
                yield path, is_directory


def _is_directory(entry: os.DirEntry[str]) -> bool:
    # What a link points to may be on another disk, and would come back as a directory here.
    if entry.is_symlink() and entry.name in (layout.SHARDS, layout.VIEWS):
        raise PreflightFailed(
            f"{entry.path} is a symbolic link: a copy of the data directory would lack what it points to",
            hint="Move the files themselves there, or mount their disk at that place.",
        )
    return entry.is_dir(follow_symlinks=False)


def unreadable(path: Path, error: OSError) -> PreflightFailed:
    """Return the error for what the engine's user cannot read."""
    return PreflightFailed(
        f"{path} cannot be read: {error.strerror}",
        hint="Run the backup as the user that CouchDB runs as (couchdb_backup_os_user).",
    )
