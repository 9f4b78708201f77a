"""Looks at a tar while tar writes it: counts what is in it, and takes out what is neither file nor directory."""

from __future__ import annotations

from hq_backups.engine.blobs.headers import (
    BLOCK,
    DIRECTORY,
    FILE,
    SYMLINK,
    ZERO,
    Heads,
    Member,
    inside,
    padded,
)
from hq_backups.engine.errors import CorruptBackup

_WHAT = "the stream of tar"
_KINDS = {SYMLINK: "symbolic links", b"3": "devices", b"4": "devices", b"6": "pipes"}
SHOWN = 20
"""Names that are kept of what a backup leaves out."""


class Watch:
    """Takes a stream in pieces; whatever it lets through ends between two headers, or within a file's data."""

    def __init__(self) -> None:
        """Begin at an archive's first byte."""
        self.files = self.directories = self.bytes = 0
        self.left_out: dict[str, int] = {}
        """How many of each kind were taken out."""
        self.left_out_names: list[str] = []
        self._heads = Heads(_WHAT)
        self._skip = 0
        self._zeros = 0

    @property
    def ended(self) -> bool:
        """Tell whether the archive's end has passed: two blocks of zeros."""
        return self._zeros >= 2 and not self._skip

    def take(self, buffer: bytearray | memoryview, filled: int) -> tuple[int, int]:
        """Look at the first ``filled`` bytes of ``buffer``; return what may be passed on, and from where to keep.

        The bytes up to the first number are whole; those from the second one on belong to a member whose headers
        are not all there: the caller puts them in front of what comes next. What lies between was taken out.
        """
        heads = self._heads
        position, out, moved = 0, 0, 0
        # Bytes from ``moved`` to ``position`` are to be kept, but still lie where they were read.
        with memoryview(buffer) as view:
            while position < filled:
                if self._skip:
                    step = min(self._skip, filled - position)
                    self._skip -= step
                    position += step
                    continue
                begin = position
                member, position = self._head(view, begin, filled)
                if member is None:
                    # Headers that are not whole, or zeros at the end.
                    if position < 0:
                        out = _keep(view, moved, begin, out)
                        return out, begin
                    continue
                if member.kind in (FILE, DIRECTORY):
                    self._count(member)
                else:
                    out = _keep(view, moved, begin, out)
                    moved = position
                    self._leave_out(member)
            out = _keep(view, moved, position, out)
        if heads.pending:
            raise CorruptBackup("headers were cut in two", name=_WHAT)
        return out, filled

    def _head(self, view: memoryview, position: int, filled: int) -> tuple[Member | None, int]:
        """Read a member's headers; none and -1 when they are not all there, none for a block of zeros."""
        extensions: list[tuple[bytes, bytes]] = []
        while position + BLOCK <= filled:
            block = bytes(view[position : position + BLOCK])
            position += BLOCK
            if not block[0] and block == ZERO:
                if extensions:
                    raise CorruptBackup("it ends in the middle of a header", name=_WHAT)
                self._zeros += 1
                return None, position
            if self._zeros:
                raise CorruptBackup("something follows the end of the archive", name=_WHAT)
            size = self._heads.extension(block)
            if size < 0:
                for header, data in extensions:
                    self._heads.extend(header, data)
                return self._heads.member(block), position
            extensions.append((block, bytes(view[position : position + size])))
            position += padded(size)
        return None, -1

    def _count(self, member: Member) -> None:
        # What could not be restored must not be called a backup.
        inside(member.name, _WHAT)
        if member.kind == FILE:
            self.files += 1
            self.bytes += member.size
            self._skip = padded(member.size)
        else:
            self.directories += 1

    def _leave_out(self, member: Member) -> None:
        self.note_left_out(_KINDS.get(member.kind, "others"), member.shown)
        self._skip = padded(member.size)
        if self._skip:
            raise CorruptBackup(f"{member.shown} is of an unknown kind", name=_WHAT)

    def note_left_out(self, kind: str, name: str) -> None:
        """Count something that is not in the archive."""
        self.left_out[kind] = self.left_out.get(kind, 0) + 1
        if len(self.left_out_names) < SHOWN:
            self.left_out_names.append(name)


def _keep(view: memoryview, begin: int, end: int, out: int) -> int:
    """Move what lies between two places to ``out``; return where it ends there."""
    size = end - begin
    if size and out != begin:
        view[out : out + size] = bytes(view[begin:end])
    return out + size
