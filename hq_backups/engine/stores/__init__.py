"""The stores, one file each; a new one is a file here and its variables.

One is imported when it is asked for: a backup of blobs need not wait for what PostgreSQL, CouchDB and HTTP take.
"""

from __future__ import annotations

import pkgutil

from hq_backups.engine.config import Config
from hq_backups.engine.errors import NotBuiltYet, UsageError
from hq_backups.engine.stores.base import SnapshotStore, StreamStore

STREAMS = {
    ("postgres", "plain"): "postgres_plain:PostgresPlain",
    ("postgres", "dump"): "postgres_dump:PostgresDump",
    ("couch", "tar"): "couch:Couch",
    ("blobdb", "tar"): "blobdb:BlobDB",
}
"""What has backups that are files, by name and mode."""
SNAPSHOTS = {("elasticsearch", "snapshot"): "elasticsearch:Elasticsearch"}
"""What keeps its backups itself."""
REGISTRY = {**STREAMS, **SNAPSHOTS}


def open_store(config: Config, name: str, mode: str | None = None) -> StreamStore | SnapshotStore:
    """Return the store ``name`` in the configured ``mode`` (or the one that an artifact has)."""
    settings = config.store(name)
    wanted = mode or settings.mode
    if (where := REGISTRY.get((name, wanted))) is None:
        raise NotBuiltYet(
            f"store {name} in mode {wanted} is not built yet in this release",
            hint="Built so far: " + ", ".join(f"{store} ({mode})" for store, mode in sorted(REGISTRY)),
        )
    made: StreamStore | SnapshotStore = _load(where)(config, settings)
    return made


def open_stream(config: Config, name: str, mode: str | None = None) -> StreamStore:
    """Return a store whose backups are files; raises UsageError for one whose server keeps them."""
    store = open_store(config, name, mode)
    if isinstance(store, SnapshotStore):
        raise UsageError(f"backups of {name} are kept by its own server, not in files")
    return store


def modes_of(name: str) -> list[type[StreamStore]]:
    """Return the store ``name``, whose backups are files, in each of its modes."""
    return [_load(where) for (each, _), where in STREAMS.items() if each == name]


def _load(where: str) -> type:
    loaded: type = pkgutil.resolve_name(f"{__name__}.{where}")
    return loaded
