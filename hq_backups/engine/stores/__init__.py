"""The stores, one file each; a new one is a file here and its variables."""

from __future__ import annotations

from hq_backups.engine.config import Config
from hq_backups.engine.errors import NotBuiltYet
from hq_backups.engine.stores.base import Store
from hq_backups.engine.stores.blobdb import BlobDB
from hq_backups.engine.stores.couch import Couch
from hq_backups.engine.stores.postgres_dump import PostgresDump
from hq_backups.engine.stores.postgres_plain import PostgresPlain

REGISTRY: dict[tuple[str, str], type[Store]] = {
    (store.name, store.mode): store for store in (PostgresPlain, PostgresDump, Couch, BlobDB)
}


def open_store(config: Config, name: str, mode: str | None = None) -> Store:
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


def modes_of(name: str) -> list[type[Store]]:
    """Return the store ``name`` in each of its modes."""
    return [store for (each, _), store in REGISTRY.items() if each == name]
