"""An archive of CouchDB, read once from its beginning to its end: what is in it, and whether it is whole.

Archives of old scripts have the paths of their day in front of the members' names, absolute or not: the data
directory is found in them by its shard maps, never by a number of directories.
"""

from __future__ import annotations

import hashlib
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import IO, Any

from hq_backups.engine import archive
from hq_backups.engine.couch import layout
from hq_backups.engine.couch.contents import Contents, listed, needs_header
from hq_backups.engine.couch.headers import Header, HeaderWatch
from hq_backups.engine.errors import BadManifest, CorruptBackup, UnsafeArchive
from hq_backups.engine.events import Events
from hq_backups.engine.manifest import Manifest
from hq_backups.engine.streams import PlainReader

MOST_FILES = 1 << 18
"""Database files that are remembered: what bounds memory."""
MOST_MAPS = 4
"""Copies of the shard maps that one archive may hold."""
_IN_MEMORY = 8 << 20


class Passed:
    """What passed of an archive; close it."""

    def __init__(self) -> None:
        self.members = 0
        self.headers: dict[str, Header | None] = {}
        """By the whole name in the archive."""
        self.maps: dict[str, IO[bytes]] = {}
        self.strange: list[str] = []
        self.views = 0

    def close(self) -> None:
        """Let go of the copies of shard maps."""
        for file in self.maps.values():
            file.close()


def walk_ours(plain: PlainReader, manifest: Manifest, events: Events) -> dict[str, Any]:
    """Compare every file of an archive with the manifest, and what is in them; raises CorruptBackup."""
    promised = recorded_files(manifest)
    seen: set[str] = set()

    def check(path: str, size: int, sha256: str) -> None:
        if path not in promised:
            raise CorruptBackup(f"{path} is in it, and not in its manifest", name=plain.name)
        if promised[path] != (size, sha256):
            raise CorruptBackup(f"{path} is not what its manifest says", name=plain.name)
        seen.add(path)

    passed = Passed()
    try:
        _pass(plain, passed, events, check)
        if lost := sorted(promised.keys() - seen):
            raise CorruptBackup(f"{listed(lost)} is in its manifest, and not in it", name=plain.name)
        contents = _contents(passed, "", plain.name)
        if problems := contents.problems(_told_node(manifest)):
            raise CorruptBackup(listed(problems), name=plain.name)
        return {"members": passed.members, "files": len(seen), "databases": len(contents.maps)}
    finally:
        passed.close()


def walk_old(plain: PlainReader, events: Events) -> dict[str, Any]:
    """Find out what an archive without a manifest is; raises CorruptBackup."""
    passed = Passed()
    try:
        _pass(plain, passed, events, None)
        # Whether the stream itself ends well comes first: what is missing may be missing for that.
        while plain.chunk():
            pass
        root = _root(passed, plain.name)
        if inside := [path for path in passed.strange if _below(root, path)]:
            raise UnsafeArchive(f"{inside[0]} is neither file nor directory", name=plain.name)
        contents = _contents(passed, root, plain.name)
        if problems := contents.problems():
            raise CorruptBackup(listed(problems), name=plain.name)
        events.warning(
            "unchecked",
            f"{plain.name} was not made by hq_backups: its files were read while CouchDB wrote, each at another "
            "moment; whether one was cut short cannot be seen, only that each has a header; its views are left out",
        )
        source = {"root": root, **contents.to_source()}
        return {"members": passed.members, "databases": len(contents.maps), "source": source}
    finally:
        passed.close()


def _pass(plain: PlainReader, passed: Passed, events: Events, check: Any) -> None:
    """Read the members, in whatever order they come."""
    for member in archive.members(plain):
        passed.members += 1
        if check is None:
            # tar -P of the old scripts stored the slash; what is unpacked goes below the target all the same.
            member.name = member.name.lstrip("/")
        path = archive.safe_path(member, plain.name)
        if path is not None and not member.isdir():
            if member.isreg():
                _take(plain, passed, member, path, check)
            elif check is not None:
                raise UnsafeArchive(f"{member.name!r} is neither file nor directory", name=plain.name)
            else:
                passed.strange.append(str(path))
        if len(passed.headers) + len(passed.strange) > MOST_FILES:
            raise CorruptBackup(f"it holds more than {MOST_FILES} databases' files", name=plain.name)
        events.progress("verify", plain.tell())


def _take(
    plain: PlainReader, passed: Passed, member: tarfile.TarInfo, path: PurePosixPath, check: Any
) -> None:
    name = str(path)
    is_database = path.suffix == ".couch" and (check is None or needs_header(name))
    passed.views += path.suffix == ".view"
    maps = None
    if path.name == layout.DBS:
        if len(passed.maps) >= MOST_MAPS:
            raise CorruptBackup("it holds the shard maps of too many nodes", name=plain.name)
        maps = passed.maps[name] = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115
    if not is_database and check is None:
        return
    watch, sha = HeaderWatch(), hashlib.sha256()
    for piece in plain.pieces(member.size):
        if is_database:
            watch.feed(piece)
        if check is not None:
            sha.update(piece)
        if maps is not None:
            maps.write(piece)
    if is_database:
        passed.headers[name] = watch.header()
    if check is not None:
        check(name, member.size, sha.hexdigest())


def _root(passed: Passed, name: str) -> str:
    """Return the data directory's path in an old archive; raises CorruptBackup for what is none."""
    if passed.maps:
        return min(
            (_parent(path) for path in passed.maps), key=lambda root: (len(PurePosixPath(root).parts), root)
        )
    if passed.headers:
        raise CorruptBackup(
            f"it is of CouchDB 1: it has databases, and no {layout.DBS}",
            name=name,
            hint="Unpack it for a CouchDB 1.6 and replicate from there; CouchDB 2 and 3 cannot serve these files.",
        )
    if passed.strange and passed.members <= len(passed.strange) + 1:
        raise CorruptBackup(
            f"it holds the symbolic link {passed.strange[0]} and nothing that it points to",
            name=name,
            hint="The data directory was a link when the script ran. Choose another backup: list_backups couch",
        )
    raise CorruptBackup(f"no data directory of CouchDB is in it: {layout.DBS} is missing", name=name)


def _contents(passed: Passed, root: str, name: str) -> Contents:
    maps = passed.maps.get(f"{root}/{layout.DBS}" if root else layout.DBS)
    if maps is None:
        raise CorruptBackup(f"{layout.DBS} is not in it", name=name)
    below = {_inside(root, path): header for path, header in passed.headers.items() if _below(root, path)}
    headers = {path: header for path, header in below.items() if needs_header(path)}
    return Contents.read(maps, headers, name)  # type: ignore[arg-type]


def _parent(path: str) -> str:
    parent = str(PurePosixPath(path).parent)
    return "" if parent == "." else parent


def _below(root: str, path: str) -> bool:
    return not root or path.startswith(f"{root}/")


def _inside(root: str, path: str) -> str:
    return path.removeprefix(f"{root}/") if root else path


def recorded_files(manifest: Manifest) -> Mapping[str, tuple[int, str]]:
    """Return the size and sha256 of each file, as a manifest of ours recorded them; raises BadManifest."""
    try:
        recorded = {
            str(path): (int(told["size"]), str(told["sha256"]))
            for path, told in manifest.source["files"].items()
        }
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise BadManifest(f"its list of files makes no sense ({error!r})", name=manifest.name) from error
    if strange := [path for path in recorded if layout.kind(path) is None]:
        raise BadManifest(f"{listed(strange)} is no file of CouchDB's", name=manifest.name)
    return recorded


def _told_node(manifest: Manifest) -> str | None:
    told = manifest.source.get("of_node")
    return told if isinstance(told, str) else None
