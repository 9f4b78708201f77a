"""What the running node says of itself for a backup; one that does not answer costs facts, not the backup."""

from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from hq_backups.engine.couch.node import Node
from hq_backups.engine.errors import ServiceError
from hq_backups.engine.events import Events

AT_ONCE = 4
"""Requests at a time: the counts should be of one moment, and the node has other work."""


def identity(node: Node, events: Events) -> dict[str, Any]:
    """Return ``node``, ``version``, ``membership``; empty, with a warning, when it does not answer."""
    try:
        return {"version": node.version(), "node": node.name(), "membership": node.membership()}
    except ServiceError as error:
        events.warning(
            "node-silent",
            f"{error.message}. The files are good without it; its name, version and counts are not recorded",
        )
        return {}


def counts(node: Node, expected: Collection[str], events: Events) -> dict[str, tuple[int, int]]:
    """Return documents and deleted ones of every database, as the node counts them now."""
    try:
        there = node.databases()
        with ThreadPoolExecutor(AT_ONCE, "hqb-counts") as pool:
            found = dict(zip(there, pool.map(lambda name: _count(node, name), there), strict=True))
    except ServiceError as error:
        events.warning("counts-unknown", f"{error.message}: the node's own counts are not recorded")
        return {}
    if silent := sorted(name for name, counted in found.items() if counted is None):
        events.warning("database-silent", f"the node cannot open {', '.join(silent)}")
    if unknown := sorted(set(there) - set(expected)):
        events.warning(
            "other-databases",
            f"the node at {node.url} also has {', '.join(unknown)}: made this moment, or couch_data_dir is not its",
        )
    return {name: counted for name, counted in found.items() if counted is not None}


def _count(node: Node, name: str) -> tuple[int, int] | None:
    """Return the counts of one database; None when it cannot be opened."""
    try:
        return node.counts(name)
    except ServiceError as error:
        if not error.facts.get("status"):
            raise
        return None
