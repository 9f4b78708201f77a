"""Room on the nodes' disks: what may be written before Elasticsearch itself makes its indices read-only."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hq_backups.engine.elasticsearch.client import Cluster
from hq_backups.engine.errors import ServiceError

_DISK = "*.cluster.routing.allocation.disk"
_UNITS = {
    "b": 0,
    "k": 10,
    "kb": 10,
    "m": 20,
    "mb": 20,
    "g": 30,
    "gb": 30,
    "t": 40,
    "tb": 40,
    "p": 50,
    "pb": 50,
}


@dataclass(frozen=True)
class Disks:
    """The disks of the data nodes, taken together."""

    free: int
    """Bytes that may be written until the flood stage."""
    nodes: int

    def copies(self, replicas: int) -> int:
        """Return how many copies of a shard there will be: two never lie on one node."""
        return 1 + max(0, min(replicas, self.nodes - 1))


def disks(cluster: Cluster) -> Disks | None:
    """Return the room of the data nodes; None when they do not say."""
    rows = cluster.get("/_cat/allocation", format="json", bytes="b", h="node,disk.avail,disk.total") or []
    told = [row for row in rows if str(row.get("disk.avail") or "").isdecimal()]
    if not told:
        return None
    stage = _flood_stage(cluster)
    free = (int(row["disk.avail"]) - kept_free(stage, int(row.get("disk.total") or 0)) for row in told)
    return Disks(sum(max(0, each) for each in free), len(told))


def kept_free(stage: str, total: int) -> int:
    """Return what a flood stage leaves of a disk: ``95%`` and ``0.95`` are what is used, ``10gb`` what is free."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*(%|[kmgtp]?b?)\s*", stage.lower())
    if match is None:
        return 0
    number, unit = float(match[1]), match[2]
    if unit in ("", "%"):
        used = number / 100 if unit else number
        return int(total * max(0.0, 1 - used))
    return int(number * (1 << _UNITS[unit]))


def _flood_stage(cluster: Cluster) -> str:
    answer = cluster.get("/_cluster/settings", include_defaults="true", filter_path=_DISK) or {}
    merged: dict[str, Any] = {}
    for source in ("defaults", "persistent", "transient"):
        merged |= _flat(
            (answer.get(source) or {}).get("cluster", {}).get("routing", {}).get("allocation", {})
        )
    if str(merged.get("disk.threshold_enabled", "true")).lower() == "false":
        return ""
    return str(merged.get("disk.watermark.flood_stage") or "")


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def shares_disk(cluster: Cluster, directory: Path) -> bool:
    """Tell whether a directory of this host lies on the disk that a node keeps its data on."""
    with contextlib.suppress(OSError, ServiceError):
        answer = cluster.get("/_nodes/stats/fs", filter_path="nodes.*.fs.data.path") or {}
        device = os.stat(directory).st_dev
        for node in (answer.get("nodes") or {}).values():
            for data in (node.get("fs") or {}).get("data") or ():
                with contextlib.suppress(OSError):
                    # The path says where it is on its own host: only there it is found.
                    if os.stat(data["path"]).st_dev == device:
                        return True
    return False
