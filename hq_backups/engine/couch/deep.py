"""A deep check without a server: every document of every database of an unpacked copy is read."""

from __future__ import annotations

from pathlib import Path

from hq_backups.engine.couch import layout, unpacked
from hq_backups.engine.couch.contents import listed
from hq_backups.engine.couch.couchfile import CouchFile, has_header
from hq_backups.engine.couch.shardmaps import ShardMap, shard_file
from hq_backups.engine.events import Events
from hq_backups.engine.manifest import Manifest

UNCHECKED = "what is in attachments, what is in views, and whether a node serves it all"


def read_everything(tree: Path, manifest: Manifest, events: Events) -> None:
    """Read all documents, and say what cannot be checked this way; raises CorruptBackup."""
    contents = unpacked.read(tree, manifest.name)
    documents = 0
    for each in contents.maps:
        count = sum(_documents(tree, each, span) for span in each.by_range)
        events.step("count", f"database {each.name!r}: {count} documents read")
        documents += count
    message = f"{len(contents.maps)} databases, {documents} documents, each read"
    events.emit("check", name="contents", ok=True, message=message)
    _check_views(tree, events)
    events.warning(
        "not-served",
        f"not checked, for no node was started on the copy: {UNCHECKED}",
    )


def _documents(tree: Path, each: ShardMap, span: str) -> int:
    """Read one shard and return how many documents it has, deleted ones too; its root's counts must be right."""
    path = shard_file(span, each.name, each.suffix)
    if not (tree / path).exists():
        # Of another node of the cluster: what must be here has been checked.
        return 0
    with (tree / path).open("rb") as file, CouchFile(file, path) as couch:
        return sum(1 for _ in couch.docs(bodies=True, deleted=True))


def _check_views(tree: Path, events: Events) -> None:
    """Tell of views that a node will build anew: they can be lost, documents cannot."""
    bare = []
    for path in unpacked.paths(tree):
        if layout.kind(path) is layout.Kind.VIEW:
            with (tree / path).open("rb") as file:
                if not has_header(file):
                    bare.append(path)
    if bare:
        events.warning("views-begun", f"without a header, so a node builds them anew: {listed(bare)}")
