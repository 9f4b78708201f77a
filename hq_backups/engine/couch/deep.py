"""A deep check: every document of an unpacked copy is read; a node serves it, where there is one to start."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path

from hq_backups.engine.couch import layout, scratch, serving, unpacked
from hq_backups.engine.couch.contents import Contents, listed
from hq_backups.engine.couch.couchfile import CouchFile, has_header
from hq_backups.engine.couch.node import Node
from hq_backups.engine.couch.release import Release
from hq_backups.engine.couch.shardmaps import ShardMap, shard_file
from hq_backups.engine.errors import CorruptBackup, ServiceError
from hq_backups.engine.events import Events
from hq_backups.engine.manifest import Manifest

UNSERVED = (
    "not checked, for no node was started on the copy: what is in attachments, what is in views, and whether a node "
    "serves it all. Set couchdb_release_dir to have one started"
)
_REPLICATOR = "_replicator"


def read_everything(tree: Path, manifest: Manifest, events: Events) -> None:
    """Read all documents with our own reader; raises CorruptBackup."""
    contents = unpacked.read(tree, manifest.name)
    documents = 0
    for each in contents.maps:
        count = sum(_documents(tree, each, span) for span in each.by_range)
        events.step("count", f"database {each.name!r}: {count} documents read")
        documents += count
    message = f"{len(contents.maps)} databases, {documents} documents, each read"
    events.emit("check", name="contents", ok=True, message=message)
    _check_views(tree, events)


def serve(tree: Path, release: Release, manifest: Manifest, events: Events) -> None:
    """Have a node of our own serve the copy: open every database, compare counts, read its views.

    Raises CorruptBackup for what a node does not serve as it was recorded, ServiceError when there is no answer.
    """
    events.step("deep", f"starting CouchDB {release.version} on the unpacked copy")
    with scratch.running(tree, release) as node:
        try:
            _ask(node.client, node.name, manifest, events)
        except ServiceError as error:
            raise node.why(error) from error


def _ask(node: Node, name: str, manifest: Manifest, events: Events) -> None:
    serving.require_alone(node, name)
    if missing := Contents.recorded(manifest.source, manifest.name).missing():
        events.warning(
            "part-only",
            "one node's part of a cluster: the node that was started knows nothing of the other nodes' parts, so the "
            f"documents of their databases are not compared. It lacks {listed(missing)}",
        )
    # Opened, they would begin to replicate what they have written down: to and from where the original does.
    idle = {db for db in node.databases() if db.rpartition("/")[2] == _REPLICATOR}
    serving.adopt(node, name, events, idle)
    try:
        found = serving.open_all(node, idle)
    except ServiceError as error:
        if not error.facts.get("status"):
            raise
        raise CorruptBackup(f"a node cannot open all of it: {error.message}", name=manifest.name) from error
    recorded = {db: told for db, told in manifest.source.get("databases", {}).items() if db not in idle}
    try:
        serving.compare(found, recorded, events)
    except ServiceError as error:
        raise CorruptBackup(f"served by a node, {error.message}", name=manifest.name) from error
    views = _views(node, events, idle)
    documents = sum(present for present, _ in found.values())
    message = (
        f"a node serves {len(found)} databases with {documents} documents, {views} indexes answer; attachments were "
        f"not read{f', nor was {listed(sorted(idle))} opened: it would replicate' if idle else ''}"
    )
    events.emit("check", name="serving", ok=True, message=message)


def _views(node: Node, events: Events, idle: Container[str]) -> int:
    try:
        return serving.read_views(node, events, idle)
    except ServiceError as error:
        if not error.facts.get("status"):
            raise
        raise ServiceError(
            f"a view of the copy does not answer: {error.message}",
            hint="Read the same view of the original: where it fails too, its design document is at fault, and the "
            "backup holds what the original does.",
            **error.facts,
        ) from error


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
