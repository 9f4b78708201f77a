"""What a restore wrote down beside the data directory, so that another process can undo a killed one."""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hq_backups.engine.config import from_plain, to_plain
from hq_backups.engine.errors import PreflightFailed, UsageError
from hq_backups.engine.events import format_utc, utc_now

VERSION = 1
MAX_BYTES = 1 << 20

UNTOUCHED = ("planned",)
"""Nothing has been changed yet."""
OPEN = ("stopping", "stopped", "old_aside", "new_in", "starting", "undoing")
"""A process was, or is, at work."""
CLOSED = ("done", "undone", "rolled_back")

_RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\Z")


@dataclass(frozen=True)
class Journal:
    """One restore into one target; directories are known by inode number, which renames keep."""

    run: str
    store: str
    artifact: str
    target: Path
    staging: Path
    old_inode: int | None
    """None when there was no target."""
    new_inode: int
    phase: str = "planned"
    was_running: bool = False
    start_after_undo: bool = False
    watched: list[str] = field(default_factory=list)
    """What a monitor watched before it was told to look away."""
    service: Mapping[str, Any] = field(default_factory=dict)
    """How the server is stopped and started, as plain data."""
    history: list[list[str]] = field(default_factory=list)
    """Each phase with its time, UTC."""
    version: int = VERSION

    @property
    def old(self) -> Path:
        """Return where the old data wait."""
        return self.target.parent / f"{self.target.name}.before-{self.run}"

    @property
    def failed(self) -> Path:
        """Return where new data go that did not serve."""
        return self.target.parent / f"{self.target.name}.failed-{self.run}"

    def at(self, phase: str, **changes: Any) -> Journal:
        """Return the journal one phase on."""
        return replace(self, phase=phase, history=[*self.history, [phase, format_utc(utc_now())]], **changes)


def journal_path(target: Path) -> Path:
    """Return where the journal of a resolved ``target`` lies."""
    return target.parent / f".{target.name}.hq_backups-restore.json"


def write_journal(journal: Journal) -> None:
    """Put the journal in its place, whole and on disk, or leave the one that is there."""
    write_own(journal_path(journal.target), json.dumps(to_plain(journal), indent=1).encode() + b"\n")


def write_own(path: Path, content: bytes) -> None:
    """Put a small file that only its owner may change in its place, whole and on disk, or leave what is there."""
    fresh = path.with_name(path.name + ".new")
    fresh.unlink(missing_ok=True)
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.rename(fresh, path)
    except BaseException:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def read_journal(target: Path) -> Journal | None:
    """Return the journal of a resolved ``target``; None without one; raises PreflightFailed when unusable.

    It is only believed from who runs us: what it says is done with our rights.
    """
    path = journal_path(target)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unusable(path, error.strerror or "it cannot be opened") from error
    with os.fdopen(fd, "rb") as file:
        about = os.fstat(fd)
        if not stat.S_ISREG(about.st_mode) or about.st_mode & 0o022:
            raise _unusable(path, "others could have written it")
        if about.st_uid != os.geteuid():
            raise _unusable(path, f"it belongs to user id {about.st_uid}, this is {os.geteuid()}")
        raw = file.read(MAX_BYTES)
    try:
        journal = from_plain(Journal, json.loads(raw))
    except (ValueError, RecursionError, UsageError) as error:
        raise _unusable(path, str(error)) from error
    if journal.version != VERSION:
        raise _unusable(path, f"it is of version {journal.version}, this hq_backups knows {VERSION}")
    if journal.target != target or not _RUN.match(journal.run):
        raise _unusable(path, "it is not about this directory")
    if journal.phase not in UNTOUCHED + OPEN + CLOSED:
        raise _unusable(path, "its phase is unknown")
    return journal


def fsync_directory(path: Path) -> None:
    """Make renames in a directory last."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _unusable(path: Path, why: str) -> PreflightFailed:
    return PreflightFailed(
        f"the restore journal {path} cannot be used: {why}",
        hint="Look at it and the directories beside it; move it away only when the right data are in place.",
    )
