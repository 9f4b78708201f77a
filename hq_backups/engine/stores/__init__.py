"""The stores, one file each; a new one is a file here and its variables."""

from __future__ import annotations

from hq_backups.engine.config import Config
from hq_backups.engine.errors import NotBuiltYet, UsageError
from hq_backups.engine.stores.base import SnapshotStore, StreamStore
from hq_backups.engine.stores.blobdb import BlobDB
from hq_backups.engine.stores.couch import Couch
from hq_backups.engine.stores.elasticsearch import Elasticsearch
from hq_backups.engine.stores.postgres_dump import PostgresDump
from hq_backups.engine.stores.postgres_plain import PostgresPlain

STREAMS: dict[tuple[str, str], type[StreamStore]] = {
    (store.name, store.mode): store for store in (PostgresPlain, PostgresDump, Couch, BlobDB)
}
SNAPSHOTS: dict[tuple[str, str], type[SnapshotStore]] = {
    (store.name, store.mode): store for store in (Elasticsearch,)
}
REGISTRY: dict[tuple[str, str], type[StreamStore] | type[SnapshotStore]] = {**STREAMS, **SNAPSHOTS}


def open_store(config: Config, name: str, mode: str | None = None) -> StreamStore | SnapshotStore:
    """Return the store ``name`` in the configured ``mode`` (or the one that an artifact has)."""
    settings = config.store(name)
    wanted = mode or settings.mode
    try:
        return REGISTRY[name, wanted](config, settings)
    except KeyError:
        raise NotBuiltYet(
            f"store {name} in mode {wanted} is not built yet in this release",
            hint="Built so far: " + ", ".join(f"{store} ({mode})" for store, mode in sorted(REGISTRY)),
        ) from None


def open_stream(config: Config, name: str, mode: str | None = None) -> StreamStore:
    """Return a store whose backups are files; raises UsageError for one whose server keeps them."""
    store = open_store(config, name, mode)
    if isinstance(store, SnapshotStore):
        raise UsageError(f"backups of {name} are kept by its own server, not in files")
    return store


def modes_of(name: str) -> list[type[StreamStore]]:
    """Return the store ``name``, whose backups are files, in each of its modes."""
    return [store for (each, _), store in STREAMS.items() if each == name]
