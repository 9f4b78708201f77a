"""The journalled swap of a data directory: old aside, new in, and back again from wherever a kill left it.

Nothing is ever deleted here. What lies where is told by inode numbers, which renames keep, not by names or
the phase alone: a kill may fall between a rename and the line in the journal that tells of it.
"""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from hq_backups.engine.errors import PreflightFailed, RestoreNeedsHands
from hq_backups.engine.journal import (
    OPEN,
    Journal,
    fsync_directory,
    journal_path,
    read_journal,
    write_journal,
)
from hq_backups.engine.space import is_mount_point, same_filesystem


class Swap:
    """One exchange of ``target`` for ``staging``; both are directories of one filesystem."""

    def __init__(
        self,
        target: Path,
        staging: Path,
        run: str,
        *,
        store: str,
        artifact: str,
        owner: tuple[int, int] | None = None,
        mode: int | None = None,
    ) -> None:
        """Describe it; ``owner`` and ``mode`` of the new directory are the old one's unless given."""
        self.target, self.staging = target.resolve(), Path(os.path.abspath(staging))
        self._run, self._store, self._artifact = run, store, artifact
        self._owner, self._mode = owner, mode
        self._journal: Journal | None = None

    @classmethod
    def load(cls, target: Path) -> Self:
        """Return the swap that the journal beside ``target`` tells of."""
        journal = read_journal(target.resolve())
        if journal is None:
            raise PreflightFailed(
                f"there is no restore of {target} to undo: {journal_path(target.resolve())} does not exist",
                hint="Directories that a restore left are beside it, named .before-… and .failed-…",
            )
        swap = cls(target, journal.staging, journal.run, store=journal.store, artifact=journal.artifact)
        swap._journal = journal
        return swap

    @property
    def journal(self) -> Journal:
        """Return what is written down so far."""
        if self._journal is None:
            raise RuntimeError("the swap has not begun")
        return self._journal

    def check(self) -> None:
        """Raise PreflightFailed when the swap could not be done, or would cover an unfinished one."""
        self._check_target()
        self._check_staging()
        before = read_journal(self.target)
        if before is not None and before.phase in OPEN:
            raise PreflightFailed(
                f"the restore {before.run} of {self.target} was interrupted ({before.phase})",
                hint=f"Put the old data back first: restore_backup {before.store} --undo",
            )

    def begin(
        self,
        *,
        service: Mapping[str, Any] | None = None,
        was_running: bool = False,
        watched: Sequence[str] = (),
    ) -> None:
        """Check everything, bring the new data to disk and write the plan down; nothing else changes."""
        self.check()
        # The new files must not be what a power cut empties after the old ones were set aside.
        os.sync()
        self._journal = Journal(
            target=self.target,
            staging=self.staging,
            old_inode=inode(self.target),
            new_inode=self.staging.stat().st_ino,
            was_running=was_running,
            watched=list(watched),
            service=service or {},
            run=self._run,
            store=self._store,
            artifact=self._artifact,
        )
        for path in (self.journal.old, self.journal.failed):
            if os.path.lexists(path):
                raise PreflightFailed(
                    f"{path} is already there", hint="Move it away; it is an earlier restore's."
                )
        self.mark("planned")

    def mark(self, phase: str, **changes: Any) -> None:
        """Write down that ``phase`` has been reached."""
        journal = self.journal.at(phase, **changes)
        write_journal(journal)
        self._journal = journal

    def swap_in(self) -> None:
        """Set the old directory aside and put the new one in its place."""
        journal = self.journal
        if inode(self.staging) != journal.new_inode or inode(self.target) != journal.old_inode:
            raise PreflightFailed(f"{self.target} or {self.staging} is another directory than it was")
        self._carry_over()
        if journal.old_inode is not None:
            self._rename(self.target, journal.old)
        self.mark("old_aside")
        self._rename(self.staging, self.target)
        self.mark("new_in")

    def is_in(self) -> bool:
        """Tell whether the restored data are what lies at the target."""
        return inode(self.target) == self.journal.new_inode

    def put_back(self) -> None:
        """Bring the old state of the target back from whatever is there; may be killed and repeated."""
        for source, destination in self.moves_back():
            self._rename(source, destination)

    def moves_back(self) -> list[tuple[Path, Path]]:
        """Return the renames that bring the old state back; none when it is there.

        Raises RestoreNeedsHands when what is there is not what the journal knows.
        """
        journal, here = self.journal, inode(self.target)
        if here == journal.old_inode:
            return []
        moves = []
        if journal.old_inode is not None and inode(journal.old) != journal.old_inode:
            raise RestoreNeedsHands(f"the old data are not where they were put. {self.where()}")
        if here is not None:
            if here != journal.new_inode and not _is_empty(self.target):
                raise RestoreNeedsHands(
                    f"{self.target} holds neither the old nor the restored data. {self.where()}",
                    hint="Move it away if it is not wanted, then repeat: "
                    f"restore_backup {journal.store} --undo",
                )
            moves.append((self.target, _free_name(journal.failed)))
        if journal.old_inode is not None:
            moves.append((journal.old, self.target))
        return moves

    def earlier(self) -> list[Path]:
        """Return what other restores set aside beside the target."""
        found = self.target.parent.glob(f"{glob.escape(self.target.name)}.before-*")
        return sorted(path for path in found if path != self.journal.old)

    def where(self) -> str:
        """Say where everything lies now."""
        journal = self.journal
        places = [self.target, journal.old, journal.staging, *_failed_names(journal.failed)]
        found = {inode(place): place for place in places}
        old = "there were none" if journal.old_inode is None else found.get(journal.old_inode, "not found")
        new = found.get(journal.new_inode, "not found")
        return (
            f"Old data: {old}. Restored data: {new}. Journal: {journal_path(self.target)} ({journal.phase})."
        )

    def _check_target(self) -> None:
        if self.target == self.target.parent:
            raise PreflightFailed("the root directory cannot be exchanged")
        if os.path.lexists(self.target) and not self.target.is_dir():
            raise PreflightFailed(f"{self.target} is not a directory")
        if not self.target.parent.is_dir():
            raise PreflightFailed(f"{self.target.parent} does not exist", hint="Make it, or mount its disk.")
        if is_mount_point(self.target):
            raise PreflightFailed(
                f"{self.target} is a mount point: it cannot be renamed, so nothing could be put back",
                hint="Keep the data in a directory below it, or use --target-dir and move the data by hand.",
            )

    def _check_staging(self) -> None:
        if self.staging.is_symlink() or not self.staging.is_dir():
            raise PreflightFailed(f"{self.staging} is not a directory")
        nested = self.staging == self.target or self.staging in self.target.parents
        if nested or self.target in self.staging.resolve().parents:
            raise PreflightFailed(f"{self.staging} and {self.target} lie one within the other")
        if is_mount_point(self.staging) or not same_filesystem(self.staging, self.target.parent):
            raise PreflightFailed(
                f"{self.staging} is on another filesystem than {self.target}: it cannot be renamed there",
                hint=f"Choose a --staging-dir on the filesystem of {self.target.parent}.",
            )

    def _carry_over(self) -> None:
        """Give the new directory the owner and mode that are wanted."""
        now = self.staging.stat()
        model = self.target.stat() if self.journal.old_inode is not None else now
        owner = self._owner or (model.st_uid, model.st_gid)
        if owner != (now.st_uid, now.st_gid):
            os.chown(self.staging, *owner)
        os.chmod(self.staging, stat.S_IMODE(model.st_mode) if self._mode is None else self._mode)

    def _rename(self, source: Path, destination: Path) -> None:
        # rename(2) would silently replace an empty directory.
        if os.path.lexists(destination):
            raise FileExistsError(f"{destination} is already there")
        os.rename(source, destination)
        for parent in {source.parent, destination.parent}:
            fsync_directory(parent)


def inode(path: Path) -> int | None:
    """Return the inode number of what lies at ``path``, a link itself included; None of nothing."""
    try:
        return os.lstat(path).st_ino
    except FileNotFoundError:
        return None


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def _failed_names(first: Path) -> list[Path]:
    return [first, *(first.with_name(f"{first.name}.{n}") for n in range(2, 100))]


def _free_name(first: Path) -> Path:
    return next(path for path in _failed_names(first) if not os.path.lexists(path))
