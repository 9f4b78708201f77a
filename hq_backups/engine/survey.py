"""What an artifact is: its manifest, or for one without, what reading it tells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hq_backups.engine.catalog import Entry
from hq_backups.engine.config import Config
from hq_backups.engine.errors import NotBuiltYet
from hq_backups.engine.events import Events
from hq_backups.engine.manifest import Manifest


def describe(
    config: Config,
    entry: Entry,
    location: Mapping[str, Any],
    events: Events,
    known: Mapping[str, Any] | None = None,
) -> Manifest:
    """Return an artifact's manifest; without one, read it to its end and make one of what it holds.

    ``known`` is such a manifest from an earlier reading of the same artifact.
    """
    if entry.manifest is not None:
        return entry.manifest
    raise NotBuiltYet(
        f"{entry.name} has no manifest: archives of the old scripts cannot be read yet in this release",
        hint="Unpack it by hand with tar, or choose a managed backup: list_backups",
    )
