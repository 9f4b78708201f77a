"""The verb prune: local artifacts that retention no longer asks for are removed, each with its reason."""

from __future__ import annotations

from datetime import UTC, date, datetime

from hq_backups.engine import names, retention
from hq_backups.engine.config import Config
from hq_backups.engine.errors import Exit, HQBackupsError
from hq_backups.engine.events import Events, utc_now
from hq_backups.engine.locks import StoreLock
from hq_backups.engine.repository.local import LocalArtifact, LocalRepository
from hq_backups.engine.requests import PruneRequest
from hq_backups.engine.snapshots import prune as snapshots
from hq_backups.engine.stores import open_store
from hq_backups.engine.stores.base import SnapshotStore, StreamStore
from hq_backups.engine.when import local_time


def prune_verb(config: Config, request: PruneRequest, run_id: str, events: Events) -> Exit:
    """Prune one store's directory, by itself."""
    store = open_store(config, request.store)
    if isinstance(store, SnapshotStore):
        return snapshots.prune_verb(store, request, run_id, events)
    repository = LocalRepository(store.settings.backup_dir)
    repository.prepare(events)
    with StoreLock(repository.directory, run_id, "prune"):
        repository.recover(events)
        prune(store, repository, events, manual_older_than=request.manual_older_than, dry_run=request.dry_run)
    return Exit.OK


def prune(
    store: StreamStore,
    repository: LocalRepository,
    events: Events,
    *,
    extra_days: int = 0,
    manual_older_than: int | None = None,
    dry_run: bool = False,
) -> None:
    """Decide by retention's rules and remove; a file that cannot be removed is a warning."""
    now = utc_now()
    local = local_time(now, store.config.timezone)
    artifacts = [a for f in repository.found() if (a := _artifact(f, store)) is not None]
    decisions = retention.decide(
        artifacts,
        store.settings.retention,
        today=local.date(),
        now=now,
        extra_days=extra_days,
        manual_older_than=manual_older_than,
    )
    for decision in decisions:
        name = decision.artifact.name
        if decision.keep:
            events.emit("kept", name=name, reason=decision.reason)
            continue
        if not dry_run:
            try:
                repository.remove(name)
            except (OSError, HQBackupsError) as error:
                events.warning("prune", f"{name} could not be removed: {error}")
                continue
        events.emit("pruned", name=name, reason=decision.reason, dry_run=dry_run)


def _artifact(found: LocalArtifact, store: StreamStore) -> retention.Artifact | None:
    """Return what retention needs to know of a file; None for one that is not this store's."""
    manifest = found.manifest
    if manifest is not None:
        if manifest.store != store.name:
            return None
        return retention.Artifact(
            name=found.path.name,
            type=manifest.type,
            local_date=date.fromisoformat(manifest.local_date),
            taken_at=manifest.taken_at,
            good=found.problem is None,
            managed=True,
            host=manifest.host,
            env=manifest.env,
            store=manifest.store,
        )
    parsed = names.parse_name(found.path.name)
    if parsed is None or parsed.store != store.name:
        return None
    modified = datetime.fromtimestamp(found.mtime, UTC)
    return retention.Artifact(
        name=found.path.name,
        type=parsed.type,
        local_date=local_time(modified, store.config.timezone).date(),
        taken_at=modified,
        good=False,
        managed=False,
        host=store.config.host,
        env=parsed.env or store.config.env,
        store=store.name,
    )
