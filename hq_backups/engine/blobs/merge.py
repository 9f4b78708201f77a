"""Adding to a live blob directory what an archive has and it lacks; nothing that is there is ever changed.

Each file is written under a directory of our own at the top and then linked to its place: it appears whole, or not
at all, and link(2) never replaces anything. No symbolic link is followed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path

from hq_backups.engine import accounts
from hq_backups.engine.blobs.headers import DIRECTORY, Member
from hq_backups.engine.blobs.judge import Noted
from hq_backups.engine.blobs.stream import OWN
from hq_backups.engine.blobs.unpack import Root, blobs, directory_mode, file_mode
from hq_backups.engine.errors import PreflightFailed
from hq_backups.engine.events import Events
from hq_backups.engine.streams import PlainReader, write_file

_BATCH_FILES = 1000
_BATCH_BYTES = 256 << 20
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass
class Missing:
    """How much of an archive is not in the live directory."""

    files: int = 0
    bytes: int = 0


def missing(plain: PlainReader, root: Root, target: Path) -> Missing:
    """Read an archive to its end; return what of it the directory lacks."""
    found, top = Missing(), os.fsencode(target)
    for key, member in blobs(plain, root):
        if member.kind != DIRECTORY and not os.path.lexists(os.path.join(top, key)):
            found.files += 1
            found.bytes += member.size
    return found


def merge(plain: PlainReader, root: Root, target: Path, events: Events) -> None:
    """Add what is missing; tell what was there, the same or another."""
    _clean(target)
    top = os.open(target, _DIRECTORY)
    apart = target / f"{OWN}merge-{secrets.token_hex(4)}"
    try:
        try:
            apart.mkdir(mode=0o700)
        except PermissionError as error:
            raise PreflightFailed(
                f"user {accounts.me()} cannot write into {target}",
                hint="Nothing was changed. blobdb_restore_owner and blobdb_restore_group name who merges.",
            ) from error
        _Merge(plain, root, top, apart, events).run()
    finally:
        os.close(top)
        shutil.rmtree(apart, ignore_errors=True)


def _clean(target: Path) -> None:
    """Remove what a merge that was killed has left. Only under the store's lock."""
    for entry in list(os.scandir(target)):
        if entry.name.startswith(f"{OWN}merge-") and entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)


class _Merge:
    """One merge on its way."""

    def __init__(self, plain: PlainReader, root: Root, top: int, apart: Path, events: Events) -> None:
        self.plain, self.root, self.top, self.events = plain, root, top, events
        self.apart = apart
        self.added = self.same = self.added_bytes = 0
        self.other, self.blocked = Noted(), Noted()
        self._waiting: list[tuple[str, bytes]] = []
        self._waiting_bytes = self._number = 0

    def run(self) -> None:
        """Go through the archive."""
        for key, member in blobs(self.plain, self.root):
            if key.startswith(OWN.encode()):
                continue
            try:
                if member.kind == DIRECTORY:
                    if key:
                        os.close(self._directory(key, directory_mode(member.mode)))
                else:
                    self._file(key, member)
            except (NotADirectoryError, _InTheWay):
                self.blocked.add(ascii(os.fsdecode(key)))
            self.events.progress("merge", self.plain.tell())
        self._place()
        self._tell()

    def _file(self, key: bytes, member: Member) -> None:
        parent, _, leaf = key.rpartition(b"/")
        directory = self._directory(parent, 0o755)
        try:
            there = _look(leaf, directory)
            if there is None:
                self._write(key, member)
            elif not stat.S_ISREG(there.st_mode):
                raise _InTheWay
            elif there.st_size == member.size and self._is_same(leaf, directory, member):
                self.same += 1
            else:
                self.other.add(ascii(os.fsdecode(key)))
        finally:
            os.close(directory)

    def _directory(self, key: bytes, mode: int) -> int:
        """Open a directory below the top, made where it is missing, no link followed."""
        current = os.dup(self.top)
        try:
            for part in key.split(b"/") if key else ():
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, mode, dir_fd=current)
                    # Not left to the umask.
                    os.chmod(part, mode, dir_fd=current)
                try:
                    below = os.open(part, _DIRECTORY, dir_fd=current)
                except OSError as error:
                    if error.errno in (errno.ELOOP, errno.ENOTDIR):
                        raise _InTheWay from error
                    raise
                os.close(current)
                current = below
        except BaseException:
            os.close(current)
            raise
        return current

    def _write(self, key: bytes, member: Member) -> None:
        """Write a file apart; it is put in its place together with others."""
        self._number += 1
        name = str(self.apart / str(self._number))
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            write_file(fd, self.plain.pieces(member.size), self.apart)
            os.fchmod(fd, file_mode(member.mode))
            os.utime(fd, (member.mtime, member.mtime))
        finally:
            os.close(fd)
        self._waiting.append((name, key))
        self._waiting_bytes += member.size
        if len(self._waiting) >= _BATCH_FILES or self._waiting_bytes >= _BATCH_BYTES:
            self._place()

    def _place(self) -> None:
        """Link what was written to its place, once it is on the disk."""
        if self._waiting:
            os.sync()
        for name, key in self._waiting:
            parent, _, leaf = key.rpartition(b"/")
            try:
                directory = self._directory(parent, 0o755)
                try:
                    os.link(name, leaf, dst_dir_fd=directory, follow_symlinks=False)
                    self.added += 1
                finally:
                    os.close(directory)
            except FileExistsError:
                # HQ was quicker.
                self.other.add(ascii(os.fsdecode(key)))
            except (NotADirectoryError, _InTheWay):
                self.blocked.add(ascii(os.fsdecode(key)))
            os.unlink(name)
        self._waiting.clear()
        self._waiting_bytes = 0

    def _is_same(self, leaf: bytes, directory: int, member: Member) -> bool:
        """Compare a file with the archive's."""
        try:
            fd = os.open(leaf, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        except PermissionError:
            return False
        same = True
        with os.fdopen(fd, "rb", buffering=0) as file:
            for piece in self.plain.pieces(member.size):
                same = same and _read(file.fileno(), len(piece)) == piece
        return same

    def _tell(self) -> None:
        os.sync()
        self.events.step("merge", f"{self.added} blobs were added, {self.same} were there already, the same")
        if self.other.count:
            self.events.warning(
                "not-overwritten",
                f"{self.other.count} blobs are there with another content, and were left as they are: "
                f"{self.other.listed()}",
            )
        if self.blocked.count:
            self.events.warning(
                "in-the-way",
                f"{self.blocked.count} could not be put in their place, something else is there: "
                f"{self.blocked.listed()}",
            )
        self.events.emit(
            "data", added=self.added, same=self.same, other=self.other.count, in_the_way=self.blocked.count
        )


class _InTheWay(Exception):
    """Something that is no directory, or no file, has the name."""


def _look(leaf: bytes, directory: int) -> os.stat_result | None:
    try:
        return os.stat(leaf, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _read(fd: int, size: int) -> bytes:
    """Read so many bytes, fewer at the end only."""
    parts = []
    while size and (data := os.read(fd, size)):
        parts.append(data)
        size -= len(data)
    return b"".join(parts)
