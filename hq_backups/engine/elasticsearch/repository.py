"""A snapshot repository: compared with what is wanted, registered when it is missing, never pointed elsewhere."""

from __future__ import annotations

import os.path
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hq_backups.engine.elasticsearch.client import Cluster, segment
from hq_backups.engine.elasticsearch.faults import PLUGIN
from hq_backups.engine.errors import PreflightFailed, ServiceError, Unanswered
from hq_backups.engine.events import Events

PLACE = ("location", "bucket", "base_path")
"""The settings that decide where a repository lies."""
PATH_STYLE_SINCE = (7, 4)


@dataclass(frozen=True)
class Wanted:
    """The repository that the settings ask for."""

    name: str
    type: str
    """``fs`` or ``s3``."""
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """Return the place in words."""
        if self.type == "s3":
            return f"bucket {self.settings.get('bucket')}"
        return f"directory {self.settings.get('location')}"


def s3_settings(
    bucket: str, endpoint: str | None, region: str | None, *, version: tuple[int, ...] = (6, 8)
) -> dict[str, str]:
    """Return the settings of an S3 repository; its keys are in the nodes' keystores, never here."""
    settings = {"bucket": bucket, "client": "default"}
    if endpoint is None:
        settings["server_side_encryption"] = "true"
        if region is not None:
            settings["endpoint"] = f"s3.{region}.amazonaws.com"
        return settings
    scheme, _, address = endpoint.rpartition("://")
    settings |= {"endpoint": address.rstrip("/"), "protocol": scheme or "https"}
    if version >= PATH_STYLE_SINCE:
        settings["path_style_access"] = "true"
    return settings


def registered(cluster: Cluster, name: str) -> Mapping[str, Any] | None:
    """Return a repository's registration; None when there is none."""
    answer = cluster.find(f"/_snapshot/{segment(name)}")
    found = answer.get(name) if isinstance(answer, dict) else None
    return found if isinstance(found, dict) else None


def require(cluster: Cluster, wanted: Wanted, *, writing: bool) -> bool:
    """Compare what is registered with what is wanted; tell whether it is there. Raises PreflightFailed."""
    found = registered(cluster, wanted.name)
    if found is None:
        return False
    settings = found.get("settings") or {}
    differing = [
        key
        for key in PLACE
        if str(settings.get(key) or "").strip("/") != str(wanted.settings.get(key) or "").strip("/")
    ]
    if found.get("type") != wanted.type or differing:
        there = settings.get("bucket") or settings.get("location") or "?"
        raise PreflightFailed(
            f"repository {wanted.name} is registered for another place ({found.get('type')} {there}), "
            f"not for {wanted.where}",
            hint="It is not pointed elsewhere: what it holds would be out of sight. Name it as it is "
            "(es_repository_location, es_snapshot_bucket), or take another es_repository_name.",
        )
    if writing and str(settings.get("readonly")).lower() == "true":
        raise PreflightFailed(
            f"repository {wanted.name} is registered read-only on this cluster",
            hint="Another cluster writes to it: back up there, or take another es_repository_name here.",
        )
    return True


def ensure(cluster: Cluster, wanted: Wanted, events: Events, *, readonly: bool = False) -> None:
    """Make sure that the repository is registered as wanted, and that every node can use it."""
    if not require(cluster, wanted, writing=not readonly):
        _register(cluster, wanted, events, readonly=readonly)
    elif not readonly:
        verify(cluster, wanted)


def verify(cluster: Cluster, wanted: Wanted) -> None:
    """Have every node write and read a small file there; it says nothing about the snapshots."""
    try:
        cluster.ask("POST", f"/_snapshot/{segment(wanted.name)}/_verify")
    except Unanswered:
        raise
    except ServiceError as error:
        raise _refused(wanted, error) from error


def seen_here(cluster: Cluster, wanted: Wanted) -> Path | None:
    """Return the directory of a repository, where this host has it too; None otherwise."""
    if wanted.type != "fs":
        return None
    answer = cluster.get("/_nodes/settings", filter_path="nodes.*.settings.path.repo") or {}
    for node in (answer.get("nodes") or {}).values():
        roots = ((node.get("settings") or {}).get("path") or {}).get("repo") or ""
        first = (roots.split(",") if isinstance(roots, str) else [str(root) for root in roots])[:1]
        # A relative location lies below the first of them; an absolute one is as it is.
        path = os.path.join(*first, wanted.settings["location"])
        if os.path.isabs(path) and os.path.isdir(path):
            return Path(path)
    return None


def _register(cluster: Cluster, wanted: Wanted, events: Events, *, readonly: bool) -> None:
    if wanted.type == "s3":
        _require_plugin(cluster, wanted)
    settings = {**wanted.settings, **({"readonly": "true"} if readonly else {})}
    events.step("repository", f"registering repository {wanted.name} for {wanted.where}")
    try:
        cluster.ask(
            "PUT", f"/_snapshot/{segment(wanted.name)}", body={"type": wanted.type, "settings": settings}
        )
        there = require(cluster, wanted, writing=not readonly)
    except ServiceError as error:
        # 6 and 7 store one that they could not verify; it was not there before, so it is ours.
        _forget(cluster, wanted.name)
        if isinstance(error, Unanswered):
            raise
        raise _refused(wanted, error) from error
    if not there:
        raise PreflightFailed(f"repository {wanted.name} was accepted, but is not there")


def _forget(cluster: Cluster, name: str) -> None:
    try:
        if registered(cluster, name) is not None:
            cluster.ask("DELETE", f"/_snapshot/{segment(name)}")
    except ServiceError:
        return  # the cause is already on its way to the operator


def _require_plugin(cluster: Cluster, wanted: Wanted) -> None:
    """Refuse while a node lacks the S3 plugin: the answer to a registration does not say which."""
    answer = cluster.get(
        "/_nodes/plugins", filter_path="nodes.*.name,nodes.*.plugins.name,nodes.*.modules.name"
    )
    nodes = (answer or {}).get("nodes") or {}
    lacking = [
        str(node.get("name"))
        for node in nodes.values()
        if not any(
            part.get("name") == "repository-s3"
            for part in (*node.get("plugins", ()), *node.get("modules", ()))
        )
    ]
    if lacking:
        raise PreflightFailed(
            f"repository {wanted.name} is of type s3, but these nodes lack the plugin repository-s3: "
            f"{', '.join(sorted(lacking)[:10])}",
            hint=PLUGIN,
        )


def _refused(wanted: Wanted, error: ServiceError) -> PreflightFailed:
    reason = error.facts.get("reason") or error.message
    return PreflightFailed(
        f"repository {wanted.name} cannot be used ({wanted.where}): {reason}", hint=error.hint
    )
