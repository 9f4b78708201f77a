"""What a server's repository should hold by the manifests, compared with what it does hold: one pure function."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hq_backups.engine.manifest import Manifest

if TYPE_CHECKING:
    from hq_backups.engine.stores.base import Kept


@dataclass(frozen=True)
class Listed:
    """One snapshot: what is recorded of it, what the repository says, and what is wrong between the two."""

    name: str
    manifest: Manifest | None = None
    kept: Kept | None = None
    problem: str | None = None


def compare(manifests: Iterable[Manifest], kept: Iterable[Kept]) -> list[Listed]:
    """Pair manifests with snapshots by name and identity; whatever has no partner is listed by itself."""
    by_name = {each.name: each for each in kept}
    listed, paired = [], set()
    known: set[tuple[str, str]] = set()
    for manifest in manifests:
        identity = str(manifest.source.get("uuid") or "")
        if (manifest.name, identity) in known:
            continue
        known.add((manifest.name, identity))
        there = by_name.get(manifest.name)
        if there is None:
            problem: str | None = "it is missing in the repository, which should have it"
        elif there.identity != identity:
            there, problem = None, "it is missing in the repository, where another snapshot has its name"
        else:
            problem = there.problem
            paired.add(manifest.name)
        listed.append(Listed(manifest.name, manifest, there, problem))
    rest = [Listed(e.name, None, e, e.problem) for e in by_name.values() if e.name not in paired]
    return [*listed, *rest]
