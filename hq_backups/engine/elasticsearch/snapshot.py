"""Taking a snapshot: begun, watched, and accepted only when every shard of every index is in it.

Its state comes from ``GET /_snapshot/R/S`` and nothing else: ``_status`` says SUCCESS of a PARTIAL one, and a
request that was not answered says nothing at all.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hq_backups.engine.elasticsearch.client import Cluster, segment
from hq_backups.engine.elasticsearch.faults import clean, hint_for
from hq_backups.engine.errors import Locked, NameInUse, PreflightFailed, ServiceError, Unanswered
from hq_backups.engine.events import Events

RUNNING = ("IN_PROGRESS", "STARTED", "INIT")
CREATE = {"ignore_unavailable": False, "include_global_state": False, "partial": False}


@dataclass(frozen=True)
class Patience:
    """How long things may take, in seconds."""

    foreign: float = 3600.0
    """A snapshot of somebody else's that runs; it is waited for and never touched."""
    no_progress: float = 3600.0
    """A snapshot or restore of ours that does not move, or of which nothing is heard: a large file takes a while."""
    accepted: float = 300.0
    """A request that was not answered, and of which nothing is to be seen."""
    poll: float = 1.0


@dataclass(frozen=True)
class Snapshot:
    """One snapshot as its repository describes it."""

    name: str
    uuid: str
    state: str
    indices: tuple[str, ...]
    started: int = 0
    """Milliseconds since 1970; 0 when only the repository's own list was read."""
    ended: int = 0
    version: str = ""
    shards: int = 0
    failed: int = 0
    failures: tuple[str, ...] = ()
    reason: str = ""

    @property
    def runs(self) -> bool:
        """Tell whether it is not over."""
        return self.state in RUNNING

    def problem(self, expected: Sequence[str] | None = None) -> str | None:
        """Say why it is no whole snapshot of the ``expected`` indices; None when it is one."""
        if self.state != "SUCCESS":
            return (
                f"its state is {self.state}" + (f" ({self.reason})" if self.reason else "") + self._failures
            )
        if self.failures or self.failed:
            return f"{self.failed or len(self.failures)} of its shards failed{self._failures}"
        if self.shards <= 0:
            return "it holds nothing"
        if expected is not None and set(expected) != set(self.indices):
            other = sorted(set(expected) ^ set(self.indices))
            return f"it does not hold the indices that it should: {', '.join(other[:5])}"
        return None

    @property
    def met_its_name(self) -> bool:
        """Tell whether a shard still holds what a snapshot of this name left that could not be deleted there."""
        return any("Duplicate snapshot name" in text for text in self.failures)

    @property
    def _failures(self) -> str:
        return "".join(f"; {text}" for text in self.failures[:3])


def read(body: Mapping[str, Any]) -> Snapshot:
    """Read an entry of an answer."""
    shards = body.get("shards") or {}
    failures = [
        clean(f"{f.get('index')}[{f.get('shard_id')}]: {f.get('reason')}")[:500]
        for f in body.get("failures") or ()
    ]
    return Snapshot(
        str(body.get("snapshot")),
        str(body.get("uuid") or ""),
        str(body.get("state")),
        tuple(sorted(body.get("indices") or ())),
        int(body.get("start_time_in_millis") or 0),
        int(body.get("end_time_in_millis") or 0),
        str(body.get("version") or ""),
        int(shards.get("total") or 0),
        int(shards.get("failed") or 0),
        tuple(failures),
        clean(str(body.get("reason") or "")),
    )


def find(cluster: Cluster, repository: str, name: str) -> Snapshot | None:
    """Return one snapshot; None when the repository has none of that name."""
    answer = cluster.find(f"/_snapshot/{segment(repository)}/{segment(name)}")
    found = [read(body) for body in (answer or {}).get("snapshots") or ()]
    return next((s for s in found if s.name == name), None)


def running(cluster: Cluster) -> list[str]:
    """Return what runs in the cluster now, in any repository, as ``repository/snapshot``."""
    answer = cluster.get("/_snapshot/_status") or {}
    return [f"{s.get('repository')}/{s.get('snapshot')}" for s in answer.get("snapshots") or ()]


def wait_for_others(cluster: Cluster, patience: Patience, events: Events) -> None:
    """Wait until nobody's snapshot runs; raises Locked when that takes too long."""
    deadline, said = time.monotonic() + patience.foreign, ""
    while others := running(cluster):
        if others[0] != said:
            said = others[0]
            events.step("wait", f"waiting for snapshot {said}, which is not ours and runs")
        if time.monotonic() > deadline:
            raise Locked(
                path=f"the cluster {cluster.url}",
                holder=f"snapshot {said}",
                hint=f"Look at it: curl -sS {cluster.url}/_snapshot/_status\nTo wait for it longer: es_wait_minutes",
            )
        time.sleep(patience.poll)


def take(
    cluster: Cluster,
    repository: str,
    name: str,
    indices: Sequence[str],
    patience: Patience,
    events: Events,
) -> Snapshot:
    """Take a snapshot of open indices; raises when it is not whole, and then leaves none of that name.

    ``name`` must be free; raises NameInUse when some shard still knows it. When the run is interrupted, the snapshot
    is aborted.
    """
    try:
        answered = _create(cluster, repository, name, indices, patience, events)
        done = _watch(cluster, repository, name, patience, events, answered=answered)
    except BaseException:
        abort(cluster, repository, name)
        raise
    if (problem := done.problem(indices)) is not None:
        abort(cluster, repository, name)
        raise (NameInUse if done.met_its_name else ServiceError)(
            f"snapshot {name} is not whole: {problem}",
            hint=hint_for(problem, cluster.url)
            or "Look at Elasticsearch's log, mend the cause, then run it again.",
        )
    return done


def _create(
    cluster: Cluster,
    repository: str,
    name: str,
    indices: Sequence[str],
    patience: Patience,
    events: Events,
) -> bool:
    """Ask for the snapshot; tell whether that was answered."""
    path = f"/_snapshot/{segment(repository)}/{segment(name)}"
    deadline = time.monotonic() + patience.foreign
    while True:
        try:
            cluster.ask(
                "PUT", path, {"wait_for_completion": "false"}, {"indices": ",".join(indices), **CREATE}
            )
        except Unanswered:
            # On a small node this request itself waits for a thread: it goes on without us.
            return False
        except ServiceError as error:
            if error.facts.get("type") != "concurrent_snapshot_execution_exception":
                raise
            if time.monotonic() > deadline:
                raise Locked(
                    path=f"the cluster {cluster.url}", holder="another snapshot or its deletion"
                ) from error
            wait_for_others(cluster, patience, events)
            time.sleep(patience.poll)
        else:
            return True


def _watch(
    cluster: Cluster, repository: str, name: str, patience: Patience, events: Events, *, answered: bool
) -> Snapshot:
    """Ask until it is over; raises when it vanished, or has not moved for too long."""
    moved, last, seen, pause = time.monotonic(), -1, answered, min(0.05, patience.poll)
    while True:
        found, trouble = None, None
        try:
            found = find(cluster, repository, name)
        except ServiceError as error:
            # While the storage is away this fails, and the snapshot may yet come to a good end.
            trouble = error
        else:
            if found is not None:
                seen = True
                if not found.runs:
                    return found
            elif seen:
                raise ServiceError(
                    f"snapshot {name} vanished while it was taken",
                    hint="A node died, or its storage failed: look at Elasticsearch's log, then run it again.",
                )
        done, total = _bytes(cluster, repository, name)
        if done > last and found is not None:
            moved, last = time.monotonic(), done
            events.progress("snapshot", done, total or None)
        quiet = time.monotonic() - moved
        if quiet > (patience.no_progress if seen else patience.accepted):
            raise _stuck(name, quiet, trouble, cluster)
        time.sleep(pause)
        pause = min(pause * 1.5, patience.poll)


def _stuck(name: str, quiet: float, trouble: ServiceError | None, cluster: Cluster) -> ServiceError:
    why = f": {trouble.message}" if trouble is not None else ""
    hint = trouble.hint if trouble is not None else ""
    pools = f"See the nodes' disks and pools: curl -sS '{cluster.url}/_cat/thread_pool/snapshot?v'"
    return ServiceError(
        f"snapshot {name} has not moved for {quiet:.0f} seconds and was aborted{why}",
        hint=hint or f"{pools}\nWhere one large file takes longer: es_stall_minutes",
    )


def _bytes(cluster: Cluster, repository: str, name: str) -> tuple[int, int]:
    """Return how many bytes are copied, and of how many."""
    with contextlib.suppress(ServiceError):
        answer = cluster.get(f"/_snapshot/{segment(repository)}/{segment(name)}/_status")
        for body in (answer or {}).get("snapshots") or ():
            stats = body.get("stats") or {}
            done = (stats.get("processed") or {}).get(
                "size_in_bytes", stats.get("processed_size_in_bytes", 0)
            )
            shards = (body.get("shards_stats") or {}).get("done", 0)
            # Shards without anything new move no bytes.
            return int(done or 0) + int(shards or 0), int(
                (stats.get("incremental") or {}).get("size_in_bytes") or 0
            )
    return 0, 0


def abort(cluster: Cluster, repository: str, name: str) -> None:
    """Stop our own snapshot if it runs, and remove what there is of it; what fails is left to the next run."""
    with contextlib.suppress(ServiceError):
        cluster.ask("DELETE", f"/_snapshot/{segment(repository)}/{segment(name)}", seconds=120)


def delete(cluster: Cluster, repository: str, name: str) -> None:
    """Delete one snapshot, by its exact name; raises ServiceError."""
    if any(sign in name for sign in "*,?") or name in ("", "_all"):
        raise ValueError(f"{name!r} is not the name of one snapshot")
    # One call may wait for the deletion of many files.
    cluster.ask("DELETE", f"/_snapshot/{segment(repository)}/{segment(name)}", seconds=3600)


def listed(cluster: Cluster, repository: str) -> list[Snapshot]:
    """Return the repository's own list: names, states and indices, whatever else of them is damaged."""
    answer = cluster.get(f"/_snapshot/{segment(repository)}/_all", verbose="false") or {}
    return [read(body) for body in answer.get("snapshots") or ()]


def described(cluster: Cluster, repository: str) -> list[Snapshot]:
    """Return every snapshot with its times; raises ServiceError when one of them cannot be read."""
    answer = cluster.get(f"/_snapshot/{segment(repository)}/_all") or {}
    return [read(body) for body in answer.get("snapshots") or ()]


def sizes(cluster: Cluster, repository: str, name: str) -> tuple[int, int, dict[str, int]]:
    """Read all metadata of a snapshot; return its bytes, the new ones of them, and each index's bytes."""
    answer = cluster.get(f"/_snapshot/{segment(repository)}/{segment(name)}/_status") or {}
    for body in answer.get("snapshots") or ():
        per_index = {n: _size(b, "total") for n, b in (body.get("indices") or {}).items()}
        return _size(body, "total"), _size(body, "incremental"), per_index
    raise ServiceError(f"the repository says nothing of snapshot {name}", status=404)


def _size(body: Mapping[str, Any], which: str) -> int:
    stats = body.get("stats") or {}
    return int((stats.get(which) or {}).get("size_in_bytes") or 0)


def require_whole(primaries: Mapping[str, str | None]) -> None:
    """Refuse while an index lacks a primary: its snapshot would fail, or hang."""
    red = sorted(name for name, health in primaries.items() if health == "red")
    if red:
        raise PreflightFailed(
            f"these indices are red, a part of them is missing: {', '.join(red[:10])}",
            hint="Bring the node with that part back, or restore or delete the index; why it is red: "
            "GET _cluster/allocation/explain",
        )
