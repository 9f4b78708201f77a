"""Directories that belong to a store's data and lie outside its data directory: where a restore puts them.

Nothing that lies in such a place is ever touched: a place that is taken, by the live cluster or anyone, gets a
sibling on the same filesystem, named by the run. So what was there before serves on, and ``--undo`` finds it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from hq_backups.engine import space
from hq_backups.engine.stores.base import Outer

# A manifest is untrusted: no directory is made below these on its word.
_SYSTEM = frozenset(
    ["bin", "boot", "dev", "etc", "lib", "lib32", "lib64", "proc", "root", "run", "sbin", "sys", "usr"]
)


def places(outer: Sequence[Outer], target: Path, run: str) -> dict[str, Path]:
    """Choose a directory for each of ``outer``; none of them exists with anything in it."""
    chosen: dict[str, Path] = {}
    taken: set[Path] = set()
    for each in outer:
        place = each.location
        if not _may_be(place, target):
            place = target.with_name(f"{target.name}.outer-{each.id}")
        if place in taken or not _is_free(place):
            place = place.with_name(f"{place.name}.{run}")
        chosen[each.id] = place
        taken.add(place)
    return chosen


def inside(outer: Iterable[Outer], parent: Path) -> dict[str, Path]:
    """Choose a directory below ``parent`` for each of ``outer``: for a copy that replaces nothing."""
    return {each.id: parent / each.id for each in outer}


def _may_be(place: Path, target: Path) -> bool:
    parts = place.parts
    return (
        place.is_absolute()
        and len(parts) > 2
        and ".." not in parts
        and parts[1] not in _SYSTEM
        and place != target
        and target not in place.parents
        and place not in target.parents
        and place.parent.is_dir()
    )


def _is_free(place: Path) -> bool:
    """Tell whether nothing, or only an empty directory, is there."""
    try:
        return not place.is_symlink() and not any(os.scandir(place))
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
    space.require(
        tree, max(needed - apart, 0), "unpack beside the target", "Free space there; nothing was changed."
    )
    for place, size in wanted.values():
        space.require(place, size + size // 50, "the tablespaces", "Free space there; nothing was changed.")


def remove(chosen: Mapping[str, Path], kept: Iterable[Path] = ()) -> None:
    """Remove what a failed restore made; a directory that was there before stays, empty."""
    before = set(kept)
    for place in chosen.values():
        shutil.rmtree(place, ignore_errors=True)
        if place in before:
            with contextlib.suppress(FileExistsError):
                place.mkdir(mode=0o700)
