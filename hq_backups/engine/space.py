"""Free space and filesystems: is there room, and can one directory be renamed to where another is."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from hq_backups.engine.errors import NotEnoughSpace

UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_OCTAL = re.compile(r"\\([0-7]{3})")


def human_bytes(n: float) -> str:
    """Return a size as people read it: ``512 B``, ``1.5 GiB``."""
    size, unit = float(n), 0
    while abs(size) >= 1023.95 and unit < len(UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:.0f} {UNITS[0]}" if unit == 0 else f"{size:.1f} {UNITS[unit]}"


def free_bytes(path: Path) -> int:
    """Return what an ordinary user may still write at ``path`` or, while it is missing, above it.

    Root could also take the reserved blocks: they are the host's last reserve, and no backup's.
    """
    stat = os.statvfs(existing(path))
    return stat.f_bavail * stat.f_frsize


def free_files(path: Path) -> int | None:
    """Return how many files may still be made there; None where the filesystem has no such limit."""
    stat = os.statvfs(existing(path))
    return stat.f_favail if stat.f_files else None


def require(path: Path, needed: int, what: str, hint: str | None = None, *, files: int = 0) -> None:
    """Raise NotEnoughSpace unless ``needed`` bytes (and ``files`` files) for ``what`` fit at ``path``."""
    free = free_bytes(path)
    if free < needed:
        raise NotEnoughSpace(
            hint=f"Free space there (`df -h {path}`), or choose another place." if hint is None else hint,
            path=path,
            free=human_bytes(free),
            needed=f"{human_bytes(needed)} for {what}",
        )
    inodes = free_files(path)
    if inodes is not None and inodes < files:
        raise NotEnoughSpace(
            hint=f"Free inodes there (`df -i {path}`), or choose another place." if hint is None else hint,
            path=path,
            free=f"{inodes} inodes",
            needed=f"{files} for {what}",
        )


@dataclass(frozen=True)
class Filesystem:
    """Where a path lies."""

    device: int
    mount_point: Path
    type: str


def filesystem_of(path: Path) -> Filesystem:
    """Return the filesystem of ``path`` or, when it is missing, of where it would be made."""
    real = existing(path)
    device = real.stat().st_dev
    mount, kind = Path("/"), "unknown"
    for point, fstype in _mounts():
        # A later line covers an earlier one of the same point.
        if (real == point or point in real.parents) and len(point.parts) >= len(mount.parts):
            mount, kind = point, fstype
    return Filesystem(device, mount, kind)


def same_filesystem(a: Path, b: Path) -> bool:
    """Tell whether a rename from ``a`` to ``b`` can work: two mounts of one device do not do."""
    ours, theirs = filesystem_of(a), filesystem_of(b)
    return (ours.device, ours.mount_point) == (theirs.device, theirs.mount_point)


def is_mount_point(path: Path) -> bool:
    """Tell whether something is mounted at ``path``, be it a directory of the same device."""
    try:
        real = path.resolve(strict=True)
    except OSError:
        return False
    return os.path.ismount(real) or any(point == real for point, _ in _mounts())


def existing(path: Path) -> Path:
    """Return ``path`` or its nearest parent that exists, resolved."""
    current = Path(os.path.abspath(path))
    while not current.exists() and current != current.parent:
        current = current.parent
    return current.resolve()


def _mounts() -> list[tuple[Path, str]]:
    """Read mount points and types, as in proc(5), /proc/[pid]/mountinfo."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        before, _, after = line.partition(" - ")
        point = _OCTAL.sub(lambda m: chr(int(m.group(1), 8)), before.split(" ")[4])
        found.append((Path(point), after.split(" ", 1)[0]))
    return found
