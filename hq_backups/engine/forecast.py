"""What the last good backup says about the next one: the space that it takes, and whether the store shrank."""

from __future__ import annotations

from collections.abc import Mapping

from hq_backups.engine import space
from hq_backups.engine.catalog import good_local
from hq_backups.engine.errors import NotEnoughSpace, PreflightFailed
from hq_backups.engine.events import Events
from hq_backups.engine.manifest import Manifest
from hq_backups.engine.repository.local import LocalRepository
from hq_backups.engine.stores.base import Prepared, Store

SHRUNK = 0.25
"""A store with less than this part of what it held is not backed up over the last good backup unasked."""
SHRUNK_BYTES = 64 << 20
LOST_PARTS = 8
"""Fewer than this may go at any time, however few there were."""
HOPELESS, DOUBTFUL = 20, 3
"""How far a first backup may be expected to compress: beyond the one it fails, beyond the other it is warned of."""


def newest_good(store: Store) -> Manifest | None:
    """Return the manifest of the newest good local artifact of the store's mode."""
    fitting = [m for m in good_local(store) if m.mode == store.mode]
    return max(fitting, key=lambda m: m.started_at, default=None)


def require_space(
    repository: LocalRepository, last: Manifest | None, prepared: Prepared, events: Events
) -> None:
    """Judge by the last artifact's ratio when there is one; else only what is hopeless fails."""
    free = space.free_bytes(repository.directory)
    if last is not None and last.plain_size:
        # What tells nothing of its size is taken to be as large as it was.
        estimate = last.plain_size if prepared.unknown else prepared.estimate
        needed = int(estimate * last.size / last.plain_size * 1.1) + prepared.spool
    else:
        needed = prepared.estimate // HOPELESS + prepared.spool
        if free < prepared.estimate // DOUBTFUL:
            what = space.human_bytes(prepared.estimate)
            events.warning("space", f"{space.human_bytes(free)} are free for a backup of {what}")
    if free < needed:
        raise NotEnoughSpace(
            path=repository.directory,
            free=space.human_bytes(free),
            needed=space.human_bytes(needed),
            hint="Free space there, or see what may go: prune_backups --dry-run",
        )


def refuse_shrink(last: Manifest | None, prepared: Prepared) -> None:
    """Refuse a store that lost most of what it held: an empty server must not push out the last good backup."""
    if last is None or prepared.unknown or last.plain_size - prepared.estimate < SHRUNK_BYTES:
        return
    if prepared.estimate < last.plain_size * SHRUNK:
        raise _lost(last, space.human_bytes(prepared.estimate), space.human_bytes(last.plain_size))


def refuse_loss(store: Store, last: Manifest | None, plain_size: int, facts: Mapping[str, object]) -> None:
    """Refuse a backup that came out with most of what the last good one held missing; raises PreflightFailed.

    Some stores do not know what they hold before it was all read: this is the judgement on what came.
    """
    if last is None:
        return
    before, now = last.source.get(store.counted or ""), facts.get(store.counted or "")
    if isinstance(before, int) and isinstance(now, int):
        emptied = now == 0 and before > 0
        if emptied or (before - now >= LOST_PARTS and now < before * SHRUNK):
            raise _lost(last, f"{now} {store.counted}", f"{before}")
    if last.plain_size - plain_size >= SHRUNK_BYTES and plain_size < last.plain_size * SHRUNK:
        raise _lost(last, space.human_bytes(plain_size), space.human_bytes(last.plain_size))


def _lost(last: Manifest, now: str, before: str) -> PreflightFailed:
    return PreflightFailed(
        f"{last.store} holds {now}, at its last good backup ({last.name}) it held {before}",
        hint="Is it the right server or directory, and whole? If it is meant to be so small: --accept-shrink",
    )
