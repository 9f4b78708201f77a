"""What a backup or a restore would meet: what is live, what is in the way, and the room that it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hq_backups.engine import space
from hq_backups.engine.elasticsearch import indices, repository, room
from hq_backups.engine.elasticsearch.client import Cluster
from hq_backups.engine.elasticsearch.indices import Index, Stats
from hq_backups.engine.elasticsearch.repository import Wanted
from hq_backups.engine.errors import PreflightFailed, UsageError
from hq_backups.engine.manifest import Manifest
from hq_backups.engine.requests import RestoreRequest
from hq_backups.engine.stores.base import Situation
from hq_backups.engine.stores.elasticsearch_holdings import Holdings

SHOWN = 20
"""Indices that a message names."""
_FULL = (
    "A full repository cannot even delete its snapshots. Let old ones go while it can (prune_backups elasticsearch), "
    "keep fewer (elasticsearch_backup_days), or enlarge it: df -h {path}"
)


@dataclass(frozen=True)
class Outlook:
    """One cluster and its repository, looked at before anything is changed."""

    cluster: Cluster
    wanted: Wanted
    holdings: Holdings

    def require_repository(self, live: Mapping[str, int]) -> tuple[Path | None, int]:
        """Refuse a snapshot of ``live`` indices that could fill the repository: a full one can delete nothing.

        Returns where this host sees the repository, and the bytes that the snapshot may add.
        """
        path = repository.seen_here(self.cluster, self.wanted)
        if path is None or not live:
            return path, 0
        needed = added(live, self.holdings.stored(live))
        what = "what a snapshot may add"
        space.require(path, needed, what, _FULL.format(path=path))
        return path, needed

    def situation(
        self, manifest: Manifest, request: RestoreRequest, sizes: Mapping[str, int], *, saves: bool
    ) -> Situation:
        """Look at what is live, what stands in the way, and the disks of the nodes and of the repository."""
        wanted = tuple(request.indices or sizes)
        if unknown := sorted(set(wanted) - set(sizes)):
            raise UsageError(
                f"{manifest.name} does not hold {', '.join(unknown[:5])}",
                hint=f"It holds: {', '.join(sorted(sizes)[:SHOWN])}",
            )
        found = indices.indices(self.cluster)
        named = indices.aliases(found)
        prefix = request.rename_prefix or ""
        for index in wanted:
            _require_name(prefix + index, found, named, renamed=bool(prefix))
        there = [found[n] for n in wanted if n in found] if not prefix else []
        if closed := [i.name for i in there if not i.open]:
            raise PreflightFailed(
                f"these indices are closed, and so cannot be saved first: {', '.join(closed[:SHOWN])}",
                hint="Open them, or delete them when they are of no use, then repeat the command.",
            )
        live = tuple(i.name for i in there if i.health != "red")
        now = indices.stats(self.cluster, live)
        disks = room.disks(self.cluster)
        kept = manifest.source.get("indices") or {}
        growth = 0
        for name in wanted:
            copies = disks.copies(_replicas(name, found, kept)) if disks is not None else 1
            growth += copies * max(0, sizes[name] - (now[name].size if name in now else 0))
        largest = max((sizes[n] for n in wanted), default=0)
        needed = growth + (0 if prefix else largest)
        facts: dict[str, Any] = {
            "indices": {prefix + n: _fate(n, found, now, prefix) for n in wanted},
            "aliases": {a: n for a, n in named.items() if set(n) & set(wanted)} if not prefix else {},
        }
        if saves and live:
            path, adds = self.require_repository({name: now[name].size for name in live})
            if path is not None:
                facts["repository_needed"] = adds
                # One disk has to hold both.
                needed += adds if room.shares_disk(self.cluster, path) else 0
        return Situation(
            wanted,
            live,
            tuple(i.name for i in there if i.health == "red"),
            facts,
            -1 if disks is None else disks.free,
            needed,
            largest,
        )


def added(live: Mapping[str, int], stored: Mapping[str, int] | None) -> int:
    """Return the bytes that a snapshot of ``live`` indices may add to those that are ``stored``.

    All that no snapshot holds, and no less than the largest index: a merge makes every byte of one new.
    """
    largest = max(live.values(), default=0)
    if stored is None:
        return largest
    return max(largest, sum(max(0, size - stored.get(name, 0)) for name, size in live.items()))


def _require_name(
    target: str, found: Mapping[str, Index], named: Mapping[str, list[str]], *, renamed: bool
) -> None:
    if target in named:
        raise PreflightFailed(
            f"{target} is an alias of {', '.join(named[target][:5])}: no index can take its name",
            hint="Remove the alias first, or restore with --rename-prefix.",
        )
    if renamed and target in found:
        raise PreflightFailed(
            f"index {target} is there already", hint="Take another --rename-prefix, or delete it."
        )


def _replicas(name: str, found: Mapping[str, Index], kept: Mapping[str, Any]) -> int:
    """Return how many replicas a restored index will have, by its backup or by what is live."""
    told = (kept.get(name) or {}).get("replicas")
    if told is None:
        return found[name].replicas if name in found else 0
    return int(told)


def _fate(name: str, found: Mapping[str, Index], now: Mapping[str, Stats], prefix: str) -> str:
    if prefix or name not in found:
        return "made anew"
    if name not in now:
        return "replaced; it is red and cannot be saved first"
    return f"replaced, with its {now[name].docs} documents; saved first"
