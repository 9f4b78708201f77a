"""Making a started node serve what was restored: its shard maps rewritten, every database opened and counted.

docs.couchdb.org, cluster/sharding: maps are changed through the running node, which takes them at once. That it is up
and lists its databases proves nothing: only a database's own address does.
"""

from __future__ import annotations

import time
from collections.abc import Container, Mapping
from typing import Any

from hq_backups.engine.couch.node import Node, view_to_read
from hq_backups.engine.couch.shardmaps import renamed
from hq_backups.engine.errors import ServiceError
from hq_backups.engine.events import Events

ANSWER_SECONDS = 120.0
"""How long a started node may take until it answers."""
OPEN_SECONDS = 60.0
"""How long a database may take until it can be opened under its new map."""
VIEW_SECONDS = 60.0
"""How long a view is waited for: one that has to be built anew may take hours, and builds on by itself."""
_POLL_SECONDS = 0.2
_SYSTEM = "_"


def await_answer(node: Node) -> None:
    """Wait until a node takes requests and knows its admin; raises ServiceError."""
    deadline = time.monotonic() + ANSWER_SECONDS
    while True:
        try:
            node.membership()
            return
        except ServiceError as error:
            if error.facts.get("status") in (401, 403) or time.monotonic() >= deadline:
                raise
        time.sleep(_POLL_SECONDS)


def require_alone(node: Node, wanted: str | None) -> str:
    """Return the node's name; raises ServiceError when it is not the one wanted, or in a cluster with others."""
    name = node.name()
    if wanted is not None and name != wanted:
        raise ServiceError(
            f"the node calls itself {name}, not {wanted}",
            hint=f"Set `-name {wanted}` in its vm.args, or leave --new-node out.",
        )
    membership = node.membership()
    others = sorted({*membership["all_nodes"], *membership["cluster_nodes"]} - {name})
    if others:
        raise ServiceError(
            f"the started node has joined others: {', '.join(others)}",
            hint="Give it a cookie of its own (-setcookie in vm.args) or keep it off their network, then repeat.",
        )
    return name


def adopt(node: Node, name: str, events: Events, but: Container[str] = ()) -> None:
    """Give every shard map to the one node, system databases' too, and read each back; raises ServiceError.

    ``but`` are databases that it does not get: it cannot open them.
    """
    docs = {db: doc for db, doc in node.shard_docs().items() if db not in but}
    for db, doc in sorted(docs.items()):
        wanted = _renamed(doc, name, db)
        if wanted != doc:
            node.put_shard_doc(wanted)
    after = node.shard_docs()
    for db, doc in docs.items():
        wanted = _renamed(doc, name, db)
        if _content(after.get(db)) != _content(wanted):
            raise ServiceError(f"the node did not keep the shard map of {db!r} that was written to it")
    events.step("adopt", f"{len(docs)} databases are mapped to {name}")


def _renamed(doc: Mapping[str, Any], name: str, db: str) -> dict[str, Any]:
    try:
        return renamed(doc, name)
    except ValueError as error:
        raise ServiceError(f"the node's shard map of {db!r} makes no sense: {error}") from error


def _content(doc: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    return None if doc is None else {key: value for key, value in doc.items() if key != "_rev"}


def open_all(node: Node, but: Container[str] = ()) -> dict[str, tuple[int, int]]:
    """Open every database and return its counts; raises ServiceError for one that cannot be."""
    deadline = time.monotonic() + OPEN_SECONDS
    return {db: _opened(node, db, deadline) for db in node.databases() if db not in but}


def _opened(node: Node, db: str, deadline: float) -> tuple[int, int]:
    while True:
        try:
            return node.counts(db)
        except ServiceError as error:
            if error.facts.get("status") != 500 or time.monotonic() >= deadline:
                raise
        time.sleep(_POLL_SECONDS)


def compare(found: Mapping[str, tuple[int, int]], recorded: Mapping[str, Any], events: Events) -> None:
    """Compare counts with the ones of the backup; raises ServiceError when anything is missing.

    More than was there is no loss: a node writes into its own databases as soon as it starts, and a client may.
    """
    if lost := sorted(set(recorded) - set(found)):
        raise ServiceError(f"the node does not have database {', '.join(lost)}")
    for db, told in sorted(recorded.items()):
        if "doc_count" not in told:
            continue
        wanted = (int(told["doc_count"]), int(told["doc_del_count"]))
        if found[db] == wanted:
            continue
        message = (
            f"database {db!r} has {found[db][0]} documents and {found[db][1]} deleted ones, "
            f"{wanted[0]} and {wanted[1]} were in the backup"
        )
        if sum(found[db]) <= sum(wanted):
            raise ServiceError(message)
        if not db.startswith(_SYSTEM):
            events.warning("written-meanwhile", f"{message}: something has written to it already")


def read_views(node: Node, events: Events, but: Container[str] = ()) -> int:
    """Read a view of every design document; return how many were read. Raises ServiceError for one that fails."""
    count, building = 0, []
    for db in node.databases():
        if db in but:
            continue
        for ddoc in node.design_docs(db):
            view = view_to_read(ddoc)
            if view is None:
                continue
            try:
                node.read_view(db, ddoc["_id"], view, timeout=VIEW_SECONDS)
                count += 1
            except ServiceError as error:
                if error.facts.get("status") or not node.is_up():
                    raise
                building.append(f"{db}/{ddoc['_id']}")
    if building:
        events.warning(
            "views-building",
            f"the node builds indexes anew and has not finished after {VIEW_SECONDS:.0f} seconds: "
            f"{', '.join(building)}. See GET /_active_tasks; HQ is slow until they are done",
        )
    return count
