"""A restore's data work: an artifact unpacked into an empty directory, every byte checked."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hq_backups.engine.config import Config
from hq_backups.engine.errors import Exit
from hq_backups.engine.events import Events
from hq_backups.engine.manifest import Manifest, load_manifest
from hq_backups.engine.requests import LoadRequest, UnpackRequest
from hq_backups.engine.source import compare, opened
from hq_backups.engine.stores import open_stream
from hq_backups.engine.stores.base import Destination, Part, StreamStore


def unpack(config: Config, request: UnpackRequest, events: Events) -> Exit:
    """Unpack, compare with the manifest, let the store check its tree; raises CorruptBackup."""
    manifest = load_manifest(json.dumps(dict(request.manifest)).encode(), "the job's manifest")
    store = open_stream(config, manifest.store, manifest.mode)
    spot = Destination(request.target, request.outer, request.replaces, request.only)
    if parts := store.parts(manifest):
        trees = [
            _unpack_part(store, part, request.target / f".part-{n}", events) for n, part in enumerate(parts)
        ]
        store.join(request.target, trees, manifest, events)
    else:
        _unpack(store, manifest, request.location, spot, events)
    # The new files must be on disk before the old ones are set aside: begun here, it costs no downtime.
    with ThreadPoolExecutor(1, "hqb-sync") as pool:
        pool.submit(os.sync)
        store.check_unpacked(request.target, manifest, events)
    return Exit.OK


def load(config: Config, request: LoadRequest, events: Events) -> Exit:
    """Load into live data, compare with the manifest; raises CorruptBackup."""
    manifest = load_manifest(json.dumps(dict(request.manifest)).encode(), "the job's manifest")
    store = open_stream(config, manifest.store, manifest.mode)
    with opened(store, request.location, manifest, events, hash_plain=False) as plain:
        store.load_in_place(plain, manifest, request.restore, events)
        compare(plain.digest(), manifest)
    return Exit.OK


def _unpack_part(store: StreamStore, part: Part, tree: Path, events: Events) -> Path:
    tree.mkdir(mode=0o700)
    events.step("unpack", f"unpacking {part.manifest.name}")
    _unpack(store, part.manifest, part.location, Destination(tree), events)
    store.check_unpacked(tree, part.manifest, events)
    return tree


def _unpack(
    store: StreamStore, manifest: Manifest, location: Mapping[str, Any], spot: Destination, events: Events
) -> None:
    with opened(store, location, manifest, events, hash_plain=False) as plain:
        store.unpack(plain, spot, manifest, events)
        digest = plain.digest()
    compare(digest, manifest)
    said = "as they were when it was read for the plan" if manifest.surveyed else "as the manifest says"
    events.emit("check", name="sha256", ok=True, message=f"size and sha256 are {said}")
