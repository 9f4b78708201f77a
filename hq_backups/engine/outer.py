"""Directories that belong to a store's data and lie outside its data directory: where a restore puts them.

Nothing that lies in such a place is ever touched: a place that is taken, by the live cluster or anyone, gets a
sibling on the same filesystem, named by the run. So what was there before serves on, and ``--undo`` finds it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from hq_backups.engine import space
from hq_backups.engine.errors import PreflightFailed
from hq_backups.engine.stores.base import Outer
from hq_backups.engine.swap import inode

# A manifest is untrusted: no directory is made below these on its word.
_SYSTEM = frozenset(
    ["bin", "boot", "dev", "etc", "lib", "lib32", "lib64", "proc", "root", "run", "sbin", "sys", "usr"]
)
_MAX_NAME = 200
"""Bytes of a name that leave room for a run's, which is added to it."""
_OF_A_RUN = re.compile(r"\.[0-9]{8}T[0-9]{6}Z-[A-Za-z0-9._-]+\Z")
_OF_A_VERSION = re.compile(r"PG_[0-9]")
_TRIED = 100
UNKNOWN = 0
"""Stands for the inode number of a directory that is about to be made: it can only be empty."""
_NOTHING_CHANGED = "Free space there; nothing was changed."


def places(outer: Sequence[Outer], target: Path, run: str, owner: int) -> dict[str, Path]:
    """Choose a directory for each of ``outer``; none of them exists, but for empty ones of user id ``owner``."""
    chosen: dict[str, Path] = {}
    for each in outer:
        ours = target.with_name(f"{target.name}.outer-{each.id}")
        candidates = itertools.chain([ours], _beside(ours, run))
        if _may_be(each.location, target, owner):
            # Below one of the others every name meets it: a few are tried.
            there = itertools.islice(_beside(each.location, run), _TRIED)
            candidates = itertools.chain([each.location], there, candidates)
        chosen[each.id] = next(p for p in candidates if _is_free(p, owner) and not _meets(p, chosen))
    return chosen


def inside(outer: Iterable[Outer], parent: Path) -> dict[str, Path]:
    """Choose a directory below ``parent`` for each of ``outer``: for a copy that replaces nothing."""
    return {each.id: parent / each.id for each in outer}


def _beside(place: Path, run: str) -> Iterator[Path]:
    """Yield names on the filesystem of ``place``, for when it is taken."""
    if space.is_mount_point(place):
        # Beside it would be on another disk; a tablespace's own directory in there has another name.
        first = place / f"restored.{run}"
    else:
        # A cluster that was restored before lies in such a place: names must not grow each time.
        first = place.with_name(f"{_OF_A_RUN.sub('', place.name)}.{run}")
    return itertools.chain([first], (first.with_name(f"{first.name}.{n}") for n in itertools.count(2)))


def _may_be(place: Path, target: Path, owner: int) -> bool:
    """Tell whether an untrusted manifest's word for a place can be followed."""
    try:
        parts = place.parts
        if not place.is_absolute() or len(parts) < 2 or ".." in parts or "\0" in str(place):
            return False
        # PostgreSQL takes no quote in a tablespace's location.
        if "'" in str(place):
            return False
        if any(
            p.startswith(".") or _OF_A_VERSION.match(p) or len(os.fsencode(p)) > _MAX_NAME for p in parts[1:]
        ):
            return False
        if len(parts) == 2 and not space.is_mount_point(place):
            return False
        real = place.parent.resolve(strict=True) / place.name
        return (
            real.parts[1] not in _SYSTEM
            and not _nested(real, target)
            and os.access(real.parent, os.W_OK | os.X_OK)
            and _is_trusted(real.parent, owner)
        )
    except (OSError, ValueError, RuntimeError):
        return False


def _is_trusted(directory: Path, owner: int) -> bool:
    """Tell whether nobody but root, we and ``owner`` could put something else there between now and then."""
    for depth, place in enumerate((directory, *directory.parents)):
        about = place.stat()
        # A sticky directory such as /tmp guards what lies in it, not names that are free.
        guarded = depth > 0 and about.st_mode & stat.S_ISVTX
        if about.st_uid not in (0, os.geteuid(), owner) or (about.st_mode & stat.S_IWOTH and not guarded):
            return False
    return directory.is_dir()


def _nested(a: Path, b: Path) -> bool:
    return a == b or a in b.parents or b in a.parents


def _meets(place: Path, chosen: Mapping[str, Path]) -> bool:
    return any(_nested(place, each) for each in chosen.values())


def _is_free(place: Path, owner: int) -> bool:
    """Tell whether nothing is there, or an empty directory that is the owner's already."""
    try:
        about = os.lstat(place)
        return stat.S_ISDIR(about.st_mode) and about.st_uid == owner and not os.listdir(place)
    except FileNotFoundError:
        return True
    except OSError:
        return False


def require_space(outer: Sequence[Outer], chosen: Mapping[str, Path], tree: Path, needed: int) -> None:
    """Check that everything fits, whatever shares a filesystem; ``needed`` is for all of it together."""
    apart = 0
    wanted: dict[int, tuple[Path, int]] = {}
    home = os.stat(tree).st_dev
    for each in outer:
        parent = space.existing(chosen[each.id])
        device = os.stat(parent).st_dev
        if device != home:
            apart += each.size
            wanted[device] = (parent, wanted.get(device, (parent, 0))[1] + each.size)
    space.require(tree, max(needed - apart, 0), "unpack beside the target", _NOTHING_CHANGED)
    for place, size in wanted.values():
        space.require(place, size + size // 50, "the tablespaces", _NOTHING_CHANGED)


def require_empty(parent: Path) -> None:
    """Refuse a place that a copy's outer directories cannot be made in; raises PreflightFailed."""
    if os.path.lexists(parent) and (parent.is_symlink() or not parent.is_dir() or any(parent.iterdir())):
        raise PreflightFailed(
            f"{parent}, where the tablespaces of the copy would go, is not an empty directory",
            hint="Move it away, or name another directory with --target-dir.",
        )


def remove(made: Mapping[Path, int], kept: Iterable[Path] = ()) -> None:
    """Remove what a failed restore made, known by inode number; one of ``kept``, there before, stays, empty."""
    before = set(kept)
    for place, number in made.items():
        if number == UNKNOWN and place not in before:
            with contextlib.suppress(OSError):
                place.rmdir()
        if number == UNKNOWN or inode(place) != number:
            continue
        if place not in before:
            shutil.rmtree(place, ignore_errors=True)
            continue
        with os.scandir(place) as entries:
            for entry in list(entries):
                shutil.rmtree(entry.path, ignore_errors=True)
