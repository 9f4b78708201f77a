"""Several nodes' parts of one cluster, made into the data directory of one node.

The union of their trees is what a single node can serve (seen on real nodes): each shard with its own views, the
shard maps of any of them, every node's name in the maps replaced by the one. Where two nodes have copies of a shard,
one whole copy is kept, for files cannot be merged: the one that has seen more changes.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from hq_backups.engine.config import to_plain
from hq_backups.engine.couch import layout, unpacked
from hq_backups.engine.couch.contents import Contents, listed
from hq_backups.engine.couch.headers import Header
from hq_backups.engine.errors import BadManifest, CorruptBackup, UsageError
from hq_backups.engine.events import Events
from hq_backups.engine.manifest import Manifest

PARTS = "parts"


@dataclass(frozen=True)
class Choice:
    """Which part gives what, by the parts' numbers."""

    maps: int
    shards: Mapping[str, int]
    doubled: int
    """Shards of which there were several copies."""


def choose(parts: Sequence[Contents]) -> Choice:
    """Choose the maps with most databases, and of each shard the copy with most changes."""
    newest = max(range(len(parts)), key=lambda n: (len(parts[n].maps), _seq(parts[n], layout.DBS), -n))
    best: dict[str, int] = {}
    doubled = 0
    for number, part in enumerate(parts):
        for path, header in part.headers.items():
            if layout.kind(path) is not layout.Kind.SHARD or header is None:
                continue
            if path in best:
                doubled += 1
                if _rank(header) <= _rank(parts[best[path]].headers[path]):
                    continue
            best[path] = number
    return Choice(newest, best, doubled)


def _seq(part: Contents, path: str) -> int:
    header = part.headers.get(path)
    return header.update_seq if header is not None else 0


def _rank(header: Header | None) -> tuple[int, int]:
    return (header.update_seq, header.doc_count) if header is not None else (-1, -1)


def contents(parts: Sequence[Contents], choice: Choice, name: str) -> Contents:
    """Return what the union holds; raises CorruptBackup for a range that no part has."""
    chosen = parts[choice.maps]
    headers: dict[str, Header | None] = {
        path: header
        for path, header in chosen.headers.items()
        if layout.kind(path) is not layout.Kind.SHARD and path != layout.NODES
    }
    headers |= {path: parts[number].headers[path] for path, number in choice.shards.items()}
    whole = Contents(chosen.maps, headers)
    if missing := whole.missing():
        raise CorruptBackup(
            f"together they lack {listed(missing)}",
            name=name,
            hint="Name a backup of that node too (--also), or others of about the same time.",
        )
    return whole


def unite(manifests: Sequence[Manifest], locations: Sequence[Mapping[str, Any]]) -> Manifest:
    """Return the manifest of several artifacts as one; raises CorruptBackup when a range is in none of them."""
    sums = [manifest.sha256 for manifest in manifests]
    if len(set(sums)) < len(sums):
        raise UsageError("one backup is named twice", hint="Name each node's backup once: NAME --also NAME …")
    for manifest in manifests:
        refuse_parts(manifest)
    first = manifests[0]
    name = " + ".join(manifest.name for manifest in manifests)
    name = name if len(name.encode()) <= 255 else f"{first.name[:150]} and {len(manifests) - 1} more"
    parts = [Contents.recorded(manifest.source, manifest.name) for manifest in manifests]
    whole = contents(parts, choose(parts), name)
    versions = sorted({str(manifest.source.get("version")) for manifest in manifests} - {"None"})
    source: dict[str, Any] = {
        **whole.to_source(),
        PARTS: [
            {"manifest": to_plain(manifest), "location": dict(location)}
            for manifest, location in zip(manifests, locations, strict=True)
        ],
    }
    if all(unpacked.has_safe_views(manifest) for manifest in manifests):
        source["order"] = layout.VIEWS_FIRST
    if versions:
        # The newest one's files must be readable.
        source["version"] = versions[-1]
    return replace(
        first,
        run=f"united-{first.run}"[:200],
        name=name,
        size=sum(manifest.size for manifest in manifests),
        plain_size=sum(manifest.plain_size for manifest in manifests),
        sha256=hashlib.sha256("".join(sums).encode()).hexdigest(),
        plain_sha256=hashlib.sha256("".join(m.plain_sha256 for m in manifests).encode()).hexdigest(),
        started_at=min(manifest.started_at for manifest in manifests),
        source=source,
        warnings=[],
    )


def refuse_parts(manifest: Manifest) -> None:
    """Refuse a single artifact's manifest that names others: it would decide what is read; raises BadManifest."""
    if PARTS in manifest.source:
        raise BadManifest("it speaks of parts, as only a restore of several does", name=manifest.name)


def join(tree: Path, trees: Sequence[Path], name: str, events: Events) -> None:
    """Move what was chosen out of the unpacked parts, which lie in ``tree``, and remove the rest."""
    parts = [unpacked.read(part, name) for part in trees]
    choice = choose(parts)
    whole = contents(parts, choice, name)
    for path, number in choice.shards.items():
        _move(trees[number], tree, path)
        views = _views(path)
        if (trees[number] / views).is_dir():
            _move(trees[number], tree, views)
    for path in whole.headers:
        if layout.kind(path) is not layout.Kind.SHARD:
            _move(trees[choice.maps], tree, path)
    for part in trees:
        shutil.rmtree(part)
    if choice.doubled:
        events.step(
            "unite",
            f"{choice.doubled} shards were in several backups: of each the copy with most changes was kept",
        )


def _views(shard: str) -> str:
    """Return the directory of a shard's views."""
    path = PurePosixPath(shard)
    return str(PurePosixPath(layout.VIEWS, *path.parts[1:-1], f"{path.name.removesuffix('.couch')}_design"))


def _move(source: Path, target: Path, path: str) -> None:
    (target / path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    (source / path).rename(target / path)
