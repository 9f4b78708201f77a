"""A run's and an artifact's own page: what is known, and the command that restores it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hq_backups import console
from hq_backups.commandline import typed
from hq_backups.conf import Resolved
from hq_backups.models import Artifact, BackupRun

STEPS = 200
"""As many of the last stages are shown."""


@dataclass(frozen=True)
class Stage:
    """One stage of a run."""

    at: str
    name: str
    message: str


@dataclass(frozen=True)
class Place:
    """Where a copy lies."""

    kind: str
    address: str


def stages(run: BackupRun) -> list[Stage]:
    """Return the last stages; what else stands in the column is passed over."""
    rows = run.steps if isinstance(run.steps, list) else []
    rows = [row for row in rows if isinstance(row, Mapping)][-STEPS:]
    return [Stage(*(str(row.get(name) or "") for name in ("at", "name", "message"))) for row in rows]


def warnings(run: BackupRun) -> list[str]:
    """Return what it was warned of."""
    return [str(text) for text in run.warnings] if isinstance(run.warnings, list) else []


def made_by(run: BackupRun) -> Artifact | None:
    """Return the artifact that a run made, read or put back, where this database knows it."""
    if not run.artifact:
        return None
    named = Artifact.objects.filter(store=run.store, name=run.artifact)
    if run.verb == "backup":
        named = named.filter(run=run.run)
    return named.order_by("-taken_at", "-pk").first()


def places(artifact: Artifact) -> list[Place]:
    """Return where its copies lie."""
    rows = artifact.locations if isinstance(artifact.locations, list) else []
    return [_place(row) for row in rows if isinstance(row, Mapping)]


def pretty(data: object) -> str:
    """Return JSON for people; nothing when there is nothing."""
    return json.dumps(data, indent=2, ensure_ascii=False, default=str) if data else ""


def restore_command(artifact: Artifact, resolved: Resolved) -> str:
    """Return what puts it back, to be copied into a shell; nothing when there is no copy left."""
    if artifact.gone_at is not None:
        return ""
    words = ["restore_backup", artifact.store]
    kinds = {place.kind for place in places(artifact)}
    if kinds == {"s3"}:
        words += ["--source", "s3"]
    if artifact.host:
        words += ["--host", artifact.host]
    if artifact.env and artifact.env != resolved["deploy_env"]:
        words += ["--from-env", artifact.env]
    # A name that begins like an option is none.
    words += ["--", artifact.name] if artifact.name.startswith("-") else [artifact.name]
    return typed(resolved, *words, host=artifact.host)


def _place(row: Mapping[str, Any]) -> Place:
    return Place(str(row.get("medium") or row.get("kind") or "?"), console.place(row))
