"""Restoring one index: asked for, watched, and judged by its primaries and its documents.

A failed shard is an answer of 200 and a red index: only what is there afterwards says how it went.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hq_backups.engine.elasticsearch import indices
from hq_backups.engine.elasticsearch.client import Cluster, segment
from hq_backups.engine.elasticsearch.snapshot import Patience
from hq_backups.engine.errors import CorruptBackup, ServiceError, Unanswered
from hq_backups.engine.events import Events

BLOCK = "index.blocks.read_only_allow_delete"
"""A full disk sets it; a snapshot keeps it, and nothing lifts it by itself in 6.x."""
SETTLED = 3


@dataclass(frozen=True)
class Expected:
    """What a snapshot must give of one index."""

    index: str
    shards: int = 0
    """0 when that is not recorded."""
    least: int | None = None
    """The fewest documents that it may have; None when nothing is recorded."""
    most: int | None = None

    def judge(self, found: int) -> str | None:
        """Say what is wrong with a number of documents; None when nothing is."""
        if self.least is None or self.most is None or self.least <= found <= self.most:
            return None
        asked = str(self.least) if self.least == self.most else f"{self.least} to {self.most}"
        return f"{self.index} has {found} documents, at its backup it had {asked}"


def body_of(index: str, target: str) -> dict[str, Any]:
    """Return what is asked for: as it was, or under another name and out of everybody's way."""
    body: dict[str, Any] = {
        "indices": index,
        "ignore_unavailable": False,
        "include_global_state": False,
        "include_aliases": index == target,
        "ignore_index_settings": [BLOCK],
    }
    if index != target:
        # An alias would let it answer for the live one; replicas would only take disk.
        body |= {
            "rename_pattern": "(?s)^.*$",
            "rename_replacement": target.replace("\\", "\\\\").replace("$", "\\$"),
            "index_settings": {"index.number_of_replicas": 0},
        }
    return body


def restore(
    cluster: Cluster,
    repository: str,
    snapshot: str,
    expected: Expected,
    target: str,
    patience: Patience,
    events: Events,
) -> int:
    """Restore an index as ``target``, which must be free or closed; return its documents.

    Raises CorruptBackup when what came is not what the snapshot should give; what came is left there.
    """
    path = f"/_snapshot/{segment(repository)}/{segment(snapshot)}/_restore"
    try:
        cluster.ask("POST", path, {"wait_for_completion": "false"}, body_of(expected.index, target))
    except Unanswered:
        _wait_begun(cluster, snapshot, target, patience)
    except ServiceError as error:
        if (
            error.facts.get("status") in (404, 500)
            and error.facts.get("type") != "snapshot_restore_exception"
        ):
            raise CorruptBackup(f"{expected.index}: {error.facts.get('reason')}", name=snapshot) from error
        if "snapshot does not exist" in str(error.facts.get("reason")):
            raise CorruptBackup("the repository does not have it", name=snapshot) from error
        raise
    _watch(cluster, snapshot, target, patience, events)
    return judge(cluster, snapshot, expected, target)


def judge(cluster: Cluster, snapshot: str, expected: Expected, target: str) -> int:
    """Return a restored index's documents; raises CorruptBackup for what is missing."""
    started, reasons = indices.primaries(cluster, target)
    if reasons or not started or (expected.shards and started != expected.shards):
        why = "; ".join(reasons[:3]) or f"{started} shards of {expected.shards}"
        raise CorruptBackup(f"{expected.index} could not be restored whole: {why}", name=snapshot)
    found = indices.count(cluster, target)
    if (problem := expected.judge(found)) is not None:
        raise CorruptBackup(problem, name=snapshot)
    return found


def _in_progress(cluster: Cluster, snapshot: str, target: str) -> bool:
    answer = cluster.get("/_cluster/state/customs", filter_path="restore") or {}
    for each in (answer.get("restore") or {}).get("snapshots") or ():
        names = {_index_name(shard) for shard in each.get("shards") or ()} | set(each.get("indices") or ())
        if each.get("snapshot") == snapshot and (target in names or not names):
            return True
    return False


def _index_name(shard: Mapping[str, Any]) -> str:
    index = shard.get("index")
    return str(index.get("index_name") if isinstance(index, dict) else index)


def _wait_begun(cluster: Cluster, snapshot: str, target: str, patience: Patience) -> None:
    """Wait until a restore whose request was not answered is to be seen."""
    deadline = time.monotonic() + patience.accepted
    while time.monotonic() < deadline:
        try:
            found = indices.indices(cluster).get(target)
            if _in_progress(cluster, snapshot, target) or (found is not None and found.open):
                return
        except ServiceError:
            pass
        time.sleep(patience.poll)
    raise ServiceError(f"the restore of {target} was asked for, and never begun", hint="Repeat the command.")


def _watch(cluster: Cluster, snapshot: str, target: str, patience: Patience, events: Events) -> None:
    """Wait until the restore is over, well or not."""
    moved, last, pause, calm = time.monotonic(), -1, min(0.05, patience.poll), 0
    while True:
        try:
            runs = _in_progress(cluster, snapshot, target)
            done, total, pending = _progress(cluster, target)
        except ServiceError as error:
            if time.monotonic() - moved > patience.no_progress:
                raise ServiceError(f"nothing is heard of the restore of {target}: {error.message}") from error
        else:
            if not runs and not pending:
                return
            # An index that waits for a node after a restart is in no restore any more, and never comes.
            calm = calm + 1 if not runs else 0
            if calm > SETTLED and time.monotonic() - moved > patience.poll * SETTLED:
                return
            if done > last:
                moved, last = time.monotonic(), done
                events.progress("restore", done, total or None)
            if time.monotonic() - moved > patience.no_progress:
                raise ServiceError(
                    f"the restore of {target} has not moved for {patience.no_progress:.0f} seconds",
                    hint="See why: GET _cluster/allocation/explain; deleting that index cancels it.\n"
                    "Where one large file takes longer: es_stall_minutes",
                )
        time.sleep(pause)
        pause = min(pause * 1.5, patience.poll)


def _progress(cluster: Cluster, target: str) -> tuple[int, int, bool]:
    """Return bytes restored, bytes in all, and whether a primary is on its way."""
    answer = cluster.find(f"/{segment(target)}/_recovery") or {}
    done = total = 0
    pending = False
    for shard in (answer.get(target) or {}).get("shards") or ():
        size = (shard.get("index") or {}).get("size") or {}
        done += int(size.get("recovered_in_bytes") or 0) + int(size.get("reused_in_bytes") or 0)
        total += int(size.get("total_in_bytes") or 0)
        pending |= bool(shard.get("primary")) and shard.get("stage") != "DONE"
    return done, total, pending
