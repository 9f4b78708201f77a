"""What lies where in a data directory of CouchDB 2 and 3, and in which order it can be copied.

docs.couchdb.org, config/couchdb and cluster/sharding: what concerns the node alone is at the top, every shard of a
database below ``shards``, its views below ``.shards``. A view that is newer than its database is never mended, a map
that is older than its shards lacks them: so views are first, then shards, then the top with the maps last.
"""

from __future__ import annotations

import re
from enum import IntEnum
from pathlib import PurePosixPath

DBS = "_dbs.couch"
"""The shard maps."""
NODES = "_nodes.couch"
"""The nodes of the cluster: a copy that keeps it calls on them."""
SHARDS, VIEWS, DELETED = "shards", ".shards", ".delete"
VIEWS_FIRST = "views, shards, maps"
"""How the manifest calls the order."""

_LEFTOVER = re.compile(r"\.compact(\.|\Z)")


class Kind(IntEnum):
    """What a file is, in the order in which files are copied."""

    VIEW = 1
    SHARD = 2
    TOP = 3
    MAPS = 4


def kind(path: str) -> Kind | None:
    """Return what the file at a path relative to the data directory is; None for what no copy needs."""
    parts = PurePosixPath(path).parts
    if not parts or _LEFTOVER.search(parts[-1]):
        return None
    if path == DBS:
        return Kind.MAPS
    if parts[-1].endswith(".couch"):
        if len(parts) == 1:
            return Kind.TOP
        return Kind.SHARD if parts[0] == SHARDS and len(parts) > 2 else None
    if parts[-1].endswith(".view") and parts[0] == VIEWS and len(parts) > 2:
        return Kind.VIEW
    return None


def is_transient(path: str) -> bool:
    """Tell whether CouchDB itself throws it away: what it deletes, and what a compaction has begun."""
    parts = PurePosixPath(path).parts
    return bool(parts) and (parts[0] == DELETED or _LEFTOVER.search(parts[-1]) is not None)


def order(path: str) -> tuple[int, str]:
    """Return the key by which files are sorted into the order of a copy."""
    return (kind(path) or 0, path)
