"""The table of stores, which names them without importing them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hq_backups.engine import stores
from hq_backups.engine.config import STORES
from hq_backups.engine.stores.base import SnapshotStore, StreamStore


@pytest.mark.parametrize("kind", [StreamStore, SnapshotStore])
def test_each_is_what_the_table_says(kind: type) -> None:
    table = stores.STREAMS if kind is StreamStore else stores.SNAPSHOTS
    for (name, mode), where in table.items():
        store = stores._load(where)
        assert issubclass(store, kind)
        assert (store.name, store.mode) == (name, mode)


def test_every_store_of_the_settings_is_there() -> None:
    assert {name for name, _ in stores.REGISTRY} == set(STORES)
    assert [store.mode for store in stores.modes_of("postgres")] == ["plain", "dump"]


def test_none_is_imported_before_it_is_asked_for() -> None:
    code = "import sys, hq_backups.engine.backup; print([m for m in sys.modules if '.stores.' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['hq_backups.engine.stores.base']"
