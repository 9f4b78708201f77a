"""Whether this host's node can take the place of the one that a backup is of, before anything is touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hq_backups.engine.couch import layout, neighbours
from hq_backups.engine.couch.contents import Contents, listed
from hq_backups.engine.couch.couchfile import CouchFile
from hq_backups.engine.couch.node import Node
from hq_backups.engine.couch.unpacked import has_safe_views
from hq_backups.engine.errors import CorruptBackup, PreflightFailed, ServiceError, WrongVersion
from hq_backups.engine.manifest import Manifest
from hq_backups.engine.requests import RestoreRequest


def about(manifest: Manifest) -> dict[str, Any]:
    """Return what a plan says of an artifact."""
    contents = Contents.recorded(manifest.source, manifest.name)
    databases = contents.databases()
    return {
        "version": str(manifest.source.get("version") or "unknown"),
        "from_nodes": contents.nodes,
        "databases": len(databases),
        "documents": sum(each.get("doc_count", 0) for each in databases.values()),
        "views": "kept"
        if has_safe_views(manifest)
        else "built anew: they could be newer than their databases",
    }


def require_whole(manifest: Manifest) -> None:
    """Refuse one node's part of a cluster, restored alone; raises PreflightFailed."""
    contents = Contents.recorded(manifest.source, manifest.name)
    missing = contents.missing()
    if not missing:
        return
    others = sorted({node for each in missing for node in each.nodes})
    raise PreflightFailed(
        f"{manifest.name} is one node's part of a cluster: it lacks {listed(missing)}",
        hint=f"Name the archives of {', '.join(others)} too, taken at about the same time: --also NAME …",
    )


def find(
    node: Node, data_dir: Path, manifest: Manifest, request: RestoreRequest, configured: str | None
) -> dict[str, Any]:
    """Return facts of the node that is to serve; raises PreflightFailed when it must not."""
    known: dict[str, Any] = {}
    try:
        known = {"node": node.name(), "node_version": node.version()}
        membership = node.membership()
        members = {*membership["all_nodes"], *membership["cluster_nodes"]} - {known["node"]}
    except ServiceError as error:
        if error.facts.get("status") in (401, 403):
            # Nothing could be rewritten or checked after the swap.
            raise PreflightFailed(error.message, hint=error.hint) from error
        listed_there = _listed_nodes(data_dir)
        members = set(listed_there) if len(listed_there) > 1 else set()
    if members:
        raise PreflightFailed(
            f"this node is in a cluster with {', '.join(sorted(members))}: a restore is for a single node",
            hint="Restore on a fresh node that stands alone, and let the cluster replicate from it. A member that is "
            "long gone is forgotten by DELETE /_node/_local/_nodes/NAME?rev=….",
        )
    _require_version(str(known.get("node_version") or configured or ""), manifest)
    ours = request.new_node or known.get("node")
    neighbours.require_apart(Contents.recorded(manifest.source, manifest.name).nodes, ours)
    return {**known, "new_node": ours or "whatever it calls itself when it has started"}


def _require_version(ours: str, manifest: Manifest) -> None:
    theirs = str(manifest.source.get("version") or "")
    majors = [int(text.split(".")[0]) for text in (ours, theirs) if text.split(".")[0].isdigit()]
    if len(majors) == 2 and majors[0] < majors[1]:
        raise WrongVersion(
            f"the backup is of CouchDB {theirs}, here is {ours}, which cannot read its files",
            hint="Install the newer one, or unpack only: restore_backup couch … --target-dir DIR",
        )


def _listed_nodes(data_dir: Path) -> list[str]:
    """Return the nodes that the data directory of a stopped node lists; none when that cannot be read."""
    try:
        with CouchFile(data_dir / layout.NODES) as nodes:
            return [doc.id for doc in nodes.docs()]
    except (OSError, CorruptBackup):
        return []
