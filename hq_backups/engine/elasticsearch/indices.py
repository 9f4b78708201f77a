"""What a cluster holds: its indices, which are open, whole and alive, and how many documents they have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hq_backups.engine.elasticsearch.client import Cluster, grouped, segment
from hq_backups.engine.errors import ServiceError

SCRATCH = "hqb-scratch-"
"""How the indices begin that a drill or a trial restores into: no backup holds them."""
_STATE = (
    "metadata.indices.*.state,metadata.indices.*.aliases,"
    "metadata.indices.*.settings.index.number_of_shards,metadata.indices.*.settings.index.number_of_replicas"
)
_STATS = "_shards,indices.*.primaries"


@dataclass(frozen=True)
class Index:
    """One index of a cluster."""

    name: str
    open: bool
    aliases: tuple[str, ...]
    shards: int
    health: str | None = None
    """None for a closed one, of which 6.x says nothing."""
    replicas: int = 0

    @property
    def is_scratch(self) -> bool:
        """Tell whether a drill or a trial made it."""
        return self.name.startswith(SCRATCH)


@dataclass(frozen=True)
class Stats:
    """What an index held at one moment: documents as Lucene counts them, nested ones too."""

    docs: int
    size: int
    """Bytes of the primaries."""
    operations: int
    """Documents written and deleted since its shards began: equal means that nothing was."""


def indices(cluster: Cluster) -> dict[str, Index]:
    """Return every index, closed ones too, by name."""
    state = cluster.get("/_cluster/state/metadata", filter_path=_STATE) or {}
    health = cluster.get("/_cluster/health", level="indices", filter_path="indices.*.status") or {}
    statuses = health.get("indices") or {}
    found = {}
    for name, body in ((state.get("metadata") or {}).get("indices") or {}).items():
        is_open = body.get("state") == "open"
        settings = (body.get("settings") or {}).get("index") or {}
        found[name] = Index(
            name,
            is_open,
            tuple(body.get("aliases") or ()),
            int(settings.get("number_of_shards") or 0),
            (statuses.get(name) or {}).get("status") if is_open else None,
            int(settings.get("number_of_replicas") or 0),
        )
    return found


def scratch_name(prefix: str, index: str) -> str:
    """Return a name for a trial; Elasticsearch takes 255 bytes at most."""
    return (prefix + index).encode()[:255].decode("utf-8", "ignore")


def aliases(found: Mapping[str, Index]) -> dict[str, list[str]]:
    """Return which indices each alias names."""
    named: dict[str, list[str]] = {}
    for index in found.values():
        for alias in index.aliases:
            named.setdefault(alias, []).append(index.name)
    return named


def stats(cluster: Cluster, names: Iterable[str]) -> dict[str, Stats]:
    """Make what was written visible, and count; an index that is gone or closed is left out."""
    wanted = set(names)
    # By name: one index without primaries would keep a refresh of all waiting for a minute.
    for some in grouped(sorted(wanted)):
        cluster.ask("POST", f"/{some}/_refresh")
    answer = cluster.get("/_stats/docs,store,indexing", filter_path=_STATS) or {}
    return {name: _stats(body) for name, body in (answer.get("indices") or {}).items() if name in wanted}


def count(cluster: Cluster, index: str) -> int:
    """Return how many documents a restored index has; raises ServiceError unless every shard answered."""
    name = segment(index)
    cluster.ask("POST", f"/{name}/_refresh")
    answer = cluster.get(f"/{name}/_stats/docs", filter_path=_STATS) or {}
    shards, bodies = answer.get("_shards") or {}, answer.get("indices") or {}
    if shards.get("failed") or not shards.get("successful") or index not in bodies:
        raise ServiceError(f"the shards of {index} did not all answer: {shards}")
    return _stats(bodies[index]).docs


def _stats(body: Mapping[str, Any]) -> Stats:
    primaries = body.get("primaries") or {}
    writing = primaries.get("indexing") or {}
    return Stats(
        int((primaries.get("docs") or {}).get("count") or 0),
        int((primaries.get("store") or {}).get("size_in_bytes") or 0),
        int(writing.get("index_total") or 0) + int(writing.get("delete_total") or 0),
    )


def documents(before: Stats | None, after: Stats | None) -> dict[str, Any]:
    """Return how many documents a snapshot may hold that was taken between two moments."""
    known = [each for each in (before, after) if each is not None]
    if not known:
        return {}
    counts = [each.docs for each in known]
    # Writers that worked meanwhile may have been caught at any point; without them the number is exact.
    operations = [each.operations for each in known]
    churn = max(operations) - min(operations) if len(known) == 2 else max(counts)
    return {
        "documents": counts[-1],
        "least_documents": max(0, min(counts) - churn),
        "most_documents": max(counts) + churn,
        "quiet": churn == 0,
    }


def delete(cluster: Cluster, name: str) -> None:
    """Delete one index, by its exact name; one that is not there is as wished."""
    if not name or any(sign in name for sign in "*,?") or name == "_all":
        raise ValueError(f"{name!r} is not the name of one index")
    try:
        cluster.ask("DELETE", f"/{segment(name)}")
    except ServiceError as error:
        if error.facts.get("status") != 404:
            raise


def close(cluster: Cluster, name: str) -> None:
    """Close one index."""
    cluster.ask("POST", f"/{segment(name)}/_close")


def reopen(cluster: Cluster, name: str) -> None:
    """Open one index."""
    cluster.ask("POST", f"/{segment(name)}/_open")


def primaries(cluster: Cluster, name: str) -> tuple[int, list[str]]:
    """Return how many primaries of an index are started, and why others are not."""
    fields = "shard,prirep,state,unassigned.reason,unassigned.details"
    rows = cluster.get(f"/_cat/shards/{segment(name)}", format="json", h=fields) or []
    started, reasons = 0, []
    for row in rows:
        if row.get("prirep") != "p":
            continue
        if row.get("state") in ("STARTED", "RELOCATING"):
            started += 1
        else:
            why = row.get("unassigned.details") or row.get("unassigned.reason") or row.get("state")
            reasons.append(f"shard {row.get('shard')}: {why}")
    return started, reasons
