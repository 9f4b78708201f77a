"""What a restore will do: found out, and shown, before it does anything."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hq_backups.engine import accounts, crons, outer, space
from hq_backups.engine.config import to_plain
from hq_backups.engine.errors import PreflightFailed
from hq_backups.engine.events import Events
from hq_backups.engine.manifest import Manifest
from hq_backups.engine.requests import RestoreRequest
from hq_backups.engine.stores.base import Store, StreamStore

MARGIN = 64 << 20
"""Bytes that stay free beside what is unpacked."""


@dataclass(frozen=True)
class Plan:
    """What a restore will do, shown before it does anything."""

    store: str
    env: str
    name: str
    run: str
    sha256: str
    from_env: str
    from_host: str
    taken_at: str
    size: int
    plain_size: int
    source: str
    """Where the artifact is read from."""
    target: str
    staging: str | None
    set_aside: str | None
    """Where the data of now will be kept; None when there is none."""
    owner: str
    free: int
    needed: int
    facts: Mapping[str, Any]
    next_steps: tuple[str, ...]
    outer: Mapping[str, Path]
    """A new directory for each one that lay outside the data directory, by id."""
    surveyed: Mapping[str, Any] | None
    """What stands for the manifest of an artifact that has none."""

    @property
    def connections(self) -> list[str]:
        """Return the clients that are connected to the server of now."""
        return list(self.facts.get("connections", ()))


def plan_swap(
    request: RestoreRequest,
    location: Mapping[str, Any],
    manifest: Manifest,
    store: StreamStore,
    target: Path,
    run_id: str,
    events: Events,
) -> Plan:
    """Plan to unpack beside the data directory and exchange the two; raises PreflightFailed."""
    if space.is_mount_point(target):
        raise PreflightFailed(
            f"{target} is a mount point: it cannot be renamed, and so not be put back if anything fails",
            hint="Keep the data in a directory below it, or restore with --target-dir and move the data by hand.",
        )
    owner = store.owner()
    account = accounts.find(owner)
    if os.geteuid() != 0 and not account.is_me:
        raise PreflightFailed(
            f"the data belongs to user {owner}, and only root can restore it",
            hint="Run the same command as root (sudo).",
        )
    facts = dict(store.check_restore(manifest, request, events))
    if (old := crons.collision(store.name)) is not None:
        facts["old_cron"] = old
    parent = space.existing(request.staging_dir or target.parent)
    if not space.same_filesystem(parent, space.existing(target.parent)):
        raise PreflightFailed(
            f"{parent} is on another filesystem than {target.parent}",
            hint="Leave --staging-dir out, or choose a directory on the same filesystem.",
        )
    needed = store.unpacked_size(manifest) + MARGIN
    directories = store.outer(manifest)
    places = outer.places(directories, target, run_id, account.uid)
    outer.require_space(directories, places, parent, needed)
    staging = (request.staging_dir or target.parent) / f"{staging_prefix(target)}{run_id}"
    return Plan(
        **about(store, manifest, location),
        target=str(target),
        staging=str(staging),
        set_aside=str(target.with_name(f"{target.name}.before-{run_id}"))
        if os.path.lexists(target)
        else None,
        owner=owner,
        free=space.free_bytes(parent),
        needed=needed,
        facts=facts,
        next_steps=tuple(store.next_steps(manifest)),
        outer=places,
    )


def plan_beside(
    request: RestoreRequest,
    location: Mapping[str, Any],
    manifest: Manifest,
    store: StreamStore,
    events: Events,
) -> Plan:
    """Plan to unpack into a directory of the operator's; raises PreflightFailed."""
    target = Path(str(request.target_dir)).absolute()
    target = target.resolve() if target.is_symlink() else target
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise PreflightFailed(
            f"{target} is not an empty directory", hint="Name another one with --target-dir."
        )
    facts = store.check_restore(manifest, request, events)
    needed = MARGIN if request.only else store.unpacked_size(manifest)
    directories, parent = store.outer(manifest), beside(target)
    places = outer.inside(directories, parent)
    if directories:
        outer.require_empty(parent)
        outer.require_space(directories, places, space.existing(target), needed)
    else:
        space.require(space.existing(target), needed, "the unpacked data", "Name a place with more room.")
    return Plan(
        **about(store, manifest, location),
        target=str(target),
        staging=None,
        set_aside=None,
        owner=store.owner() if os.geteuid() == 0 else accounts.me(),
        free=space.free_bytes(space.existing(target)),
        needed=needed,
        facts=facts,
        next_steps=(),
        outer=places,
    )


def beside(target: Path) -> Path:
    """Return the directory for what lies outside the data directory of a copy that replaces nothing."""
    return target.with_name(f"{target.name}.outer")


def plan_in_place(
    request: RestoreRequest,
    location: Mapping[str, Any],
    manifest: Manifest,
    store: StreamStore,
    events: Events,
) -> Plan:
    """Plan to load into the running server; raises PreflightFailed."""
    facts = store.check_in_place(manifest, request, events)
    return Plan(
        **about(store, manifest, location),
        target=str(facts.get("server", "")),
        staging=None,
        set_aside=None,
        owner=accounts.me(),
        free=0,
        needed=0,
        facts=facts,
        next_steps=tuple(store.next_steps(manifest)),
        outer={},
    )


def about(store: Store, manifest: Manifest, location: Mapping[str, Any]) -> dict[str, Any]:
    """Return what every plan says of the artifact."""
    return {
        "store": store.name,
        "env": store.config.env,
        "name": manifest.name,
        "run": manifest.run,
        "sha256": manifest.sha256,
        "from_env": manifest.env,
        "from_host": manifest.host,
        "taken_at": manifest.started_at,
        "size": manifest.size,
        "plain_size": manifest.plain_size,
        "source": where(location),
        "surveyed": to_plain(manifest) if manifest.surveyed else None,
    }


def staging_prefix(target: Path) -> str:
    """Return how the names of the directories begin that restores of ``target`` unpack into."""
    return f".{target.name}.hq_backups-staging-"


def where(location: Mapping[str, Any]) -> str:
    """Return a location as an operator would write it."""
    if location["kind"] == "local":
        return str(location["path"])
    if location["kind"] == "snapshot":
        place = location.get("bucket") or location.get("path")
        return f"snapshot repository {location['repository']} ({place})"
    version = f" (version {location['version_id']})" if location.get("version_id") else ""
    return f"s3://{location['bucket']}/{location['key']}{version}"
