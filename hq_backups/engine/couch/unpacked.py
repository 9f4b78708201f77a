"""A data directory that was unpacked: what is let out of an archive, and whether it is all that was recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from hq_backups.engine.couch import layout
from hq_backups.engine.couch.contents import Contents, listed, needs_header
from hq_backups.engine.couch.headers import Header, header_of
from hq_backups.engine.couch.passing import recorded_files
from hq_backups.engine.errors import CorruptBackup
from hq_backups.engine.events import Events
from hq_backups.engine.manifest import Manifest


def has_safe_views(manifest: Manifest) -> bool:
    """Tell whether no view in an artifact can be newer than its database: a node never mends those."""
    return not manifest.surveyed and manifest.source.get("order") == layout.VIEWS_FIRST


def wrapper(manifest: Manifest) -> tuple[str, ...]:
    """Return the directories that an old archive has in front of the data directory."""
    return PurePosixPath(str(manifest.source.get("root") or "")).parts if manifest.surveyed else ()


def wanted(manifest: Manifest) -> Callable[[str], bool]:
    """Return which files of an artifact are unpacked: never the list of the old cluster's nodes.

    Asked for what the manifest does not name, it raises CorruptBackup.
    """
    views = has_safe_views(manifest)
    trees = (layout.SHARDS, layout.VIEWS) if views else (layout.SHARDS,)
    recorded = None if manifest.surveyed else recorded_files(manifest)

    def is_wanted(path: str) -> bool:
        if path.endswith("/"):
            return PurePosixPath(path).parts[0] in trees
        if recorded is not None and path not in recorded:
            raise CorruptBackup(f"{path} is in it, and not in its manifest", name=manifest.name)
        kind = layout.kind(path)
        if kind is None or path == layout.NODES:
            return False
        return views or kind is not layout.Kind.VIEW

    return is_wanted


def read(tree: Path, name: str) -> Contents:
    """Return what an unpacked directory holds; raises CorruptBackup."""
    headers: dict[str, Header | None] = {}
    for path in paths(tree):
        if needs_header(path):
            with (tree / path).open("rb") as file:
                headers[path] = header_of(file, path)
    if layout.DBS not in headers:
        raise CorruptBackup(f"{layout.DBS} is not in it", name=name)
    with (tree / layout.DBS).open("rb") as maps:
        return Contents.read(maps, headers, name)


def paths(tree: Path) -> Iterator[str]:
    """Yield the files of CouchDB below a directory, as paths relative to it."""
    for path in tree.rglob("*"):
        relative = str(path.relative_to(tree))
        if layout.kind(relative) is not None and path.is_file():
            yield relative


def check(tree: Path, manifest: Manifest, events: Events) -> Contents:
    """Check that everything recorded is there, and that no database would come up empty; raises CorruptBackup."""
    if not manifest.surveyed and "parts" not in manifest.source:
        _check_sizes(tree, manifest)
    contents = read(tree, manifest.name)
    told = manifest.source.get("of_node")
    if problems := contents.problems(told if isinstance(told, str) else None):
        raise CorruptBackup(listed(problems), name=manifest.name)
    before = Contents.recorded(manifest.source, manifest.name).databases()
    now = contents.databases()
    if before != now:
        differing = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
        raise CorruptBackup(
            f"database {listed(differing)} is not what was recorded of it", name=manifest.name
        )
    documents = sum(each.get("doc_count", 0) for each in now.values())
    message = f"{len(now)} databases, all their ranges, {documents} documents by their headers"
    events.emit("check", name="databases", ok=True, message=message)
    return contents


def _check_sizes(tree: Path, manifest: Manifest) -> None:
    is_wanted = wanted(manifest)
    for path, (size, _) in recorded_files(manifest).items():
        if not is_wanted(path):
            continue
        try:
            found = (tree / path).lstat().st_size
        except OSError:
            raise CorruptBackup(f"{path} is not in it", name=manifest.name) from None
        if found != size:
            raise CorruptBackup(f"{path} is of {found} bytes, not {size}", name=manifest.name)
