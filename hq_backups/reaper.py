"""Runs whose process is gone: their rows say so, and what was due is made again."""

from __future__ import annotations

import logging
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from hq_backups.claims import PICK_UP, Claim
from hq_backups.clock import aware
from hq_backups.engine.errors import Exit
from hq_backups.process_id import ProcessId

if TYPE_CHECKING:
    from hq_backups.models import BackupRun, DueRun

logger = logging.getLogger(__name__)

KILLED = "the run was killed"
"""The error of a run that was found dead: nobody there could tell anybody."""
UNSEEN = timedelta(days=2)
"""After so long a run counts as dead whose process cannot be seen from here, being another container's."""


def reap(host: str, now: datetime) -> list[str]:
    """Mark what ended on ``host``, which must be this one, and could not say so; return the runs that were killed."""
    from hq_backups.models import BackupRun, DueRun

    running = BackupRun.objects.filter(host=host, status=BackupRun.Status.RUNNING)
    killed = [run.run for run in running if is_dead(run, now) and _mark(run, now)]
    for row in DueRun.objects.filter(host=host, state=DueRun.State.RUNNING):
        code = _ended(row, now)
        if code is not None:
            Claim.of(row).end(code)
    return killed


def is_dead(run: BackupRun, now: datetime) -> bool:
    """Tell whether the process of a run that never ended is gone, as far as this host sees it."""
    process = ProcessId.parse(run.process)
    alive = process.is_alive if process is not None else None
    return now - aware(run.started_at) > UNSEEN if alive is None else not alive


def _mark(run: BackupRun, now: datetime) -> bool:
    """Write that a run was killed, unless it has ended by itself meanwhile."""
    status = type(run).Status
    rows = type(run).objects.filter(pk=run.pk, status=status.RUNNING)
    killed = {"status": status.FAILED, "exit_code": int(Exit.ERROR), "error": KILLED, "hint": _hint(run)}
    if not rows.update(finished_at=now, **killed):
        return False
    logger.error("%s of %s: %s (%s)", run.verb, run.store, KILLED, run.run)
    return True


def _hint(run: BackupRun) -> str:
    if run.verb == "restore":
        return f"Finish or undo it: restore_backup {run.store} --undo"
    why = "The kernel says whether memory ran out: journalctl -k."
    return f"{why} Again: run_backup {run.store} --type {run.type}" if run.verb == "backup" else why


def _ended(row: DueRun, now: datetime) -> Exit | None:
    """Return how the run of a row ended; None while it goes on."""
    from hq_backups.models import BackupRun

    run = BackupRun.objects.filter(run=row.run).first() if row.run else None
    if run is None:
        # It died before it could write anything, or the history could not be written.
        return Exit.ERROR if row.started_at is None or now - aware(row.started_at) > PICK_UP else None
    if run.status == BackupRun.Status.RUNNING:
        return None
    if run.status in (BackupRun.Status.OK, BackupRun.Status.WARNING):
        return Exit.OK
    known = [code for code in Exit if code != Exit.OK and code == run.exit_code]
    return known[0] if known else Exit.ERROR
