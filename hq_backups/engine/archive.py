"""Tar archives: unpacked safely, and watched while they pass.

Archives are untrusted: no absolute paths, no ``..``, no links, no devices, nothing outside the directory that
they are unpacked into; the bytes are bounded by the reader. Formats are read by the standard library's
``tarfile``; which members are let through is decided here (its ``data`` filter drops owners that some stores
need).
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from hq_backups.engine.errors import CorruptBackup, UnsafeArchive
from hq_backups.engine.streams import PlainReader, write_file

BLOCK = tarfile.BLOCKSIZE
MAX_DEPTH = 64
"""Directories below each other: deeper than any store's, and less than what removing a tree can take."""
MAX_PART = 255


_USTAR = slice(257, 262)
"""Where a tar's first header says that it is one (POSIX.1-2001, ustar)."""


def is_tar(head: bytes) -> bool:
    """Tell by its first block whether a stream is a tar archive."""
    return head[_USTAR] == b"ustar"


def members(plain: PlainReader) -> Iterator[tarfile.TarInfo]:
    """Yield an archive's members as they come; raises CorruptBackup when it is cut short.

    The consumer may read the member's data with ``plain.pieces(member.size)``; what it leaves is skipped.
    """
    try:
        # A forward-only object with tell() and seek() lets the data be read past tarfile's own copying.
        with tarfile.open(fileobj=plain, mode="r:", errorlevel=2) as tar:  # type: ignore[call-overload]
            while (member := tar.next()) is not None:
                # A size below zero sends tarfile back for ever (CVE-2025-8194); a sparse file's is not its data's.
                if member.size < 0 or member.issparse():
                    raise CorruptBackup(
                        f"the size of {member.name!r} is not that of its data", name=plain.name
                    )
                yield member
                plain.seek(tar.offset)
                # A million members must not be held.
                tar.members = []
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise CorruptBackup(f"its archive cannot be read ({error})", name=plain.name) from error


def safe_path(member: tarfile.TarInfo, archive: str, strip: tuple[str, ...] = ()) -> PurePosixPath | None:
    """Return a member's path inside the tree; None for the tree's own top, and for what is outside ``strip``.

    With the directories of ``strip``, which an old archive has in front, a leading slash is one of them.
    Raises UnsafeArchive for a path that leaves the tree.
    """
    name = member.name.lstrip("/") if strip else member.name
    if name.startswith("/") or "\x00" in name:
        raise UnsafeArchive(f"absolute path {member.name!r}", name=archive)
    parts = PurePosixPath(name).parts
    if ".." in parts:
        raise UnsafeArchive(f"path {member.name!r} leaves the tree", name=archive)
    if len(parts) > MAX_DEPTH or any(len(os.fsencode(part)) > MAX_PART for part in parts):
        raise UnsafeArchive(f"path {member.name[:80]!r}… is too deep or too long", name=archive)
    if strip:
        parts = parts[len(strip) :] if parts[: len(strip)] == strip else ()
    return PurePosixPath(*parts) if parts else None


def extract(
    plain: PlainReader,
    target: Path,
    strip: tuple[str, ...] = (),
    outer: Mapping[PurePosixPath, Path] | None = None,
    skip: frozenset[str] = frozenset(),
    wanted: Callable[[str], bool] | None = None,
) -> int:
    """Unpack regular files and directories into the empty directory ``target``; return how many files.

    Only what is below the directories of ``strip``, and without them. What is below a path of ``outer`` goes into
    the empty directory that is named there. The members of ``skip`` are passed over; and so are those that are not
    ``wanted``, by their path, a directory's with a slash behind it.

    Owners are the caller's; modes are kept, without set-id and world bits. Raises UnsafeArchive, CorruptBackup
    and DiskFull.
    """
    count = 0
    made: dict[Path, set[PurePosixPath]] = {}
    for member in members(plain):
        path = safe_path(member, plain.name, strip)
        if path is None or str(path) in skip:
            continue
        if wanted is not None and not wanted(f"{path}/" if member.isdir() else str(path)):
            continue
        root, below = _route(path, target, outer or {})
        ours = made.setdefault(root, set())
        if member.isdir():
            _make_directories(root, below, ours)
            if below.parts:
                os.chmod(root / below, 0o700 | member.mode & 0o070)
        elif member.isreg():
            if not below.parts:
                raise UnsafeArchive(f"{member.name!r} must be a directory", name=plain.name)
            _make_directories(root, below.parent, ours)
            _write_file(plain, member, root / below)
            count += 1
        else:
            raise UnsafeArchive(f"{member.name!r} is neither file nor directory", name=plain.name)
    return count


def _route(
    path: PurePosixPath, target: Path, outer: Mapping[PurePosixPath, Path]
) -> tuple[Path, PurePosixPath]:
    """Return the directory that a member belongs to, and its path in there."""
    for above, place in outer.items():
        if path.is_relative_to(above):
            return place, path.relative_to(above)
    return target, path


def _make_directories(target: Path, path: PurePosixPath, made: set[PurePosixPath]) -> None:
    """Create each missing directory; only ones that we made ourselves are walked through."""
    for parent in (*reversed(path.parents), path):
        if parent in made or parent == PurePosixPath("."):
            continue
        try:
            os.mkdir(target / parent, 0o700)
        except FileExistsError:
            raise UnsafeArchive(f"{str(parent)!r} is both file and directory", name=str(target)) from None
        made.add(parent)


def _write_file(plain: PlainReader, member: tarfile.TarInfo, path: Path) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(path, flags, 0o600)
    except FileExistsError:
        raise UnsafeArchive(f"{member.name!r} is there twice", name=plain.name) from None
    try:
        # Not left to the umask: a cluster with group access must keep it.
        os.fchmod(fd, 0o600 | member.mode & 0o070)
        write_file(fd, plain.pieces(member.size), path)
    finally:
        os.close(fd)


class TarWatch:
    """Looks at the headers of a ustar stream that passes by in pieces, as pg_basebackup writes it.

    Knows which of the ``wanted`` members passed, keeps the contents of the small ones in ``keep``, and whether
    the two zero blocks of the archive's end were seen.
    """

    max_kept = 1 << 20

    def __init__(self, keep: frozenset[str] = frozenset()) -> None:
        """Remember the contents of the members named in ``keep``."""
        self.names: set[str] = set()
        self.kept: dict[str, bytes] = {}
        self.files = 0
        self._keep = keep
        self._header = bytearray()
        self._skip = 0
        self._current: tuple[str, bytearray, int] | None = None
        self._zero_blocks = 0

    @property
    def ended(self) -> bool:
        """Return whether the end of the archive passed."""
        return self._zero_blocks >= 2 and self._skip == 0 and not self._header

    def feed(self, data: memoryview) -> None:
        """Take the next bytes of the stream."""
        position, end = 0, len(data)
        while position < end:
            if self._skip:
                step = min(self._skip, end - position)
                self._collect(data[position : position + step])
                self._skip -= step
                position += step
                continue
            step = min(BLOCK - len(self._header), end - position)
            self._header += data[position : position + step]
            position += step
            if len(self._header) == BLOCK:
                self._take_header(bytes(self._header))
                self._header.clear()

    def _take_header(self, block: bytes) -> None:
        self._finish_member()
        if not any(block):
            self._zero_blocks += 1
            return
        if self._zero_blocks:
            raise CorruptBackup("something follows the end of the archive", name="the base backup")
        try:
            member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise CorruptBackup(f"a header is not readable ({error})", name="the base backup") from error
        name = member.name.removeprefix("./")
        if self._notable(name):
            self.names.add(name)
        if member.isreg():
            self.files += 1
        size = member.size if member.isreg() else 0
        self._skip = -(-size // BLOCK) * BLOCK
        if name in self._keep and size <= self.max_kept:
            self._current = (name, bytearray(), size)

    @staticmethod
    def _notable(name: str) -> bool:
        """Bound what is remembered: top-level names, global/ and WAL segments."""
        head, _, rest = name.partition("/")
        return not rest or head in ("global", "pg_wal")

    def _collect(self, data: memoryview) -> None:
        if self._current is not None:
            _, content, size = self._current
            content += data[: size - len(content)]

    def _finish_member(self) -> None:
        if self._current is not None:
            name, content, _ = self._current
            self.kept[name] = bytes(content)
            self._current = None
