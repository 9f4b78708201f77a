"""Tablespaces: directories of a cluster that lie elsewhere, linked to from ``pg_tblspc/<oid>``.

A ``tablespace_map`` that is there when a server starts from a base backup has it link to the *original's*
directories, and write there: it is never unpacked, and the links are made here, to places of our own.
Facts: postgresql.org/docs/current/storage-file-layout.html, and continuous-archiving.html on tablespace_map.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from hq_backups.engine.errors import BadManifest, CorruptBackup, ProducerTruncated, UnsafeArchive

LINKS = "pg_tblspc"
MAP = "tablespace_map"
_MAX_OID = 1 << 32


@dataclass(frozen=True)
class Tablespace:
    """One tablespace as a manifest tells of it."""

    oid: str
    name: str
    location: Path
    size: int


def recorded(source: Mapping[str, Any], name: str) -> list[Tablespace]:
    """Return the tablespaces of a manifest's ``source``, which is untrusted; raises BadManifest."""
    found: dict[str, Tablespace] = {}
    try:
        for each in source.get("tablespaces") or ():
            oid, size, location = each["oid"], each.get("size") or 0, each["location"]
            known = all(type(number) is int and number >= 0 for number in (oid, size))
            if not known or oid >= _MAX_OID or str(oid) in found or type(location) is not str:
                raise ValueError(f"{oid!r}, {size!r}, {location!r}")
            found[str(oid)] = Tablespace(str(oid), str(each["name"]), Path(location), size)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadManifest(f"what it says of tablespaces makes no sense ({error})", name=name) from error
    return list(found.values())


def mapped(content: bytes) -> dict[str, str]:
    """Return where each tablespace of a ``tablespace_map`` lies, by oid; raises ProducerTruncated."""
    found = {}
    # A backslash stands before a newline that belongs to a name (src/backend/access/transam/xlogrecovery.c).
    for line in re.findall(rb"(?:\\.|[^\n\\])+", content, re.DOTALL):
        oid, _, place = re.sub(rb"\\(.)", rb"\1", line, flags=re.DOTALL).partition(b" ")
        if not oid.isdigit() or not place:
            raise ProducerTruncated(f"a line of {MAP} is {line!r}", program="pg_basebackup")
        found[oid.decode()] = place.decode("utf-8", "surrogateescape")
    return found


def routes(outer: Mapping[str, Path]) -> dict[PurePosixPath, Path]:
    """Return where the members below each ``pg_tblspc/<oid>`` are unpacked to."""
    return {PurePosixPath(LINKS, oid): place for oid, place in outer.items()}


def link(tree: Path, outer: Mapping[str, Path], major: int, name: str) -> None:
    """Make a new cluster's links to its tablespaces' new places; raises CorruptBackup.

    What was unpacked is not trusted: a tablespace holds nothing but the directory of its version.
    """
    version = re.compile(rf"PG_{major}_[0-9]+\Z")
    links = tree / LINKS
    unknown = sorted(os.listdir(links)) if links.is_dir() else []
    if unknown:
        raise UnsafeArchive(f"{LINKS}/{unknown[0]} is of no tablespace that its manifest knows", name=name)
    if outer and not links.is_dir():
        raise CorruptBackup(f"{LINKS} is not in it", name=name)
    for oid, place in outer.items():
        held = sorted(os.listdir(place))
        if not held:
            raise CorruptBackup(f"tablespace {oid} is not in it", name=name)
        strange = [each for each in held if not version.match(each) or not (place / each).is_dir()]
        if strange:
            raise UnsafeArchive(f"{LINKS}/{oid}/{strange[0]} is not of a tablespace", name=name)
        os.symlink(place, links / oid)
    require_own(tree, outer.values(), name)


def require_own(tree: Path, places: Iterable[Path], name: str) -> None:
    """Refuse a tree that would reach beyond itself and ``places`` when a server starts on it."""
    if os.path.lexists(tree / MAP):
        raise UnsafeArchive(f"it has a {MAP}: a server would write where that says", name=name)
    own = [place.resolve() for place in (tree, *places)]
    for place in linked(tree):
        if not any(place.resolve().is_relative_to(each) for each in own):
            raise UnsafeArchive(f"a tablespace of it is {place}: another cluster's, it may be", name=name)


def linked(tree: Path) -> list[Path]:
    """Return the directories outside a data directory that its tablespaces are in."""
    found = []
    try:
        with os.scandir(tree / LINKS) as entries:
            for entry in sorted(entries, key=lambda e: e.name):
                if entry.is_symlink():
                    found.append(Path(tree / LINKS, os.readlink(entry.path)))
    except OSError:
        pass
    return found
