"""Who makes a backup that is due: one row for each, and every change of it made by one party alone.

Beat may tick twice, dispatchers meet, Redis hand a message out again: each change is one conditional UPDATE, and
who changed no row does nothing. A row's ``queued_at`` names its attempt, so that a late message of an older one
finds nothing to take.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from django.db.models import F, QuerySet

from hq_backups.clock import aware, stored
from hq_backups.engine.errors import Exit
from hq_backups.engine.events import utc_now
from hq_backups.schedule import COUNTS, Slot

if TYPE_CHECKING:
    from hq_backups.models import DueRun

MAX_ATTEMPTS = 3
RETRY_AFTER = timedelta(minutes=30)
"""Between the beginnings of two attempts, at least."""
PICK_UP = timedelta(minutes=30)
"""How long a worker or a process may need to take what it was handed."""
MADE = (Exit.OK, Exit.UPLOAD_FAILED)
"""Exit codes after which the backup is there: what is not uploaded is sent later, not made again."""


@dataclass(frozen=True)
class Claim:
    """One attempt at one row; it travels as text, in a message or on a command line."""

    pk: int
    queued_at: datetime

    def __str__(self) -> str:
        return f"{self.pk}@{self.queued_at.isoformat()}"

    @classmethod
    def parse(cls, text: str) -> Claim:
        """Return what was written; ValueError says that it was none."""
        pk, _, moment = text.partition("@")
        return cls(int(pk), datetime.fromisoformat(moment))

    @classmethod
    def of(cls, row: DueRun) -> Claim:
        """Return the attempt that a row stands for now."""
        return cls(row.pk, aware(row.queued_at))

    def row(self) -> DueRun | None:
        """Return the row while nobody has taken it."""
        from hq_backups.models import DueRun

        return self._rows(DueRun.State.QUEUED).first()

    def take(self, host: str) -> bool:
        """Begin the attempt on ``host``; False when somebody else did, or a newer one stands for it, or not here."""
        from hq_backups.models import DueRun

        rows = self._rows(DueRun.State.QUEUED).filter(host=host)
        row = rows.first()
        if row is None or is_superseded(row):
            return False
        running = DueRun.State.RUNNING
        return bool(rows.update(state=running, started_at=utc_now(), attempts=F("attempts") + 1, run=""))

    def name_run(self, run: str) -> None:
        """Note the attempt's run before it starts, so that one that dies is found."""
        self._rows().update(run=run)

    def end(self, code: Exit) -> None:
        """Note how the attempt went; one that only met another run was none."""
        from hq_backups.models import DueRun

        # Who looked for the dead may have come first.
        rows = self._rows(DueRun.State.RUNNING, DueRun.State.FAILED)
        if code in MADE:
            rows.update(state=DueRun.State.DONE)
        elif code == Exit.LOCKED:
            rows.update(state=DueRun.State.FAILED, attempts=F("attempts") - 1)
        else:
            rows.update(state=DueRun.State.FAILED)

    def give_back(self) -> None:
        """Note that it could not be handed over: that was no attempt, and the next tick tries again."""
        from hq_backups.models import DueRun

        self._rows(DueRun.State.QUEUED).update(state=DueRun.State.FAILED)

    def _rows(self, *states: str) -> QuerySet[DueRun]:
        from hq_backups.models import DueRun

        rows = DueRun.objects.filter(pk=self.pk, queued_at=self.queued_at)
        return rows.filter(state__in=states) if states else rows


def claim(slot: Slot, host: str, now: datetime) -> Claim | None:
    """Claim what is due on ``host``, or a further attempt at it; None when it is another's, or not to be tried."""
    from hq_backups.models import DueRun

    fresh = {"queued_at": now}
    row, made = DueRun.objects.get_or_create(
        host=host, store=slot.store, type=slot.type, due_at=slot.due, defaults=fresh
    )
    if made:
        return Claim.of(row)
    if counted(row, now) is not None:
        return None
    failed = DueRun.objects.filter(pk=row.pk, queued_at=row.queued_at, state=DueRun.State.FAILED)
    again = failed.update(state=DueRun.State.QUEUED, queued_at=now, started_at=None)
    return Claim(row.pk, now) if again else None


def counted(row: DueRun, now: datetime) -> Slot | None:
    """Return what a row counts as in the schedule; None when it failed and may be tried again now.

    One that is done, under way, or waits for its next attempt counts from its beginning, and so for every slot
    until then; one that failed for good, for its own.
    """
    due, started = aware(row.due_at), aware(row.started_at or row.queued_at)
    begun = Slot(row.store, row.type, max(due, started))
    if row.state != row.State.FAILED:
        return begun
    if row.attempts >= MAX_ATTEMPTS:
        return Slot(row.store, row.type, due)
    rested = row.started_at is None or now >= started + RETRY_AFTER
    return None if rested else begun


def is_superseded(row: DueRun) -> bool:
    """Tell whether something that is due later, and counts for a row, was claimed."""
    later = type(row).objects.filter(host=row.host, store=row.store, type__in=COUNTS[row.type])
    return later.filter(due_at__gt=row.due_at).exists()


def is_working(row: DueRun) -> bool:
    """Tell whether a row's host began anything since the row was queued."""
    return type(row).objects.filter(host=row.host, started_at__gt=row.queued_at).exists()


def not_picked_up(now: datetime) -> list[DueRun]:
    """Return what nobody took within half an hour, on hosts that are not busy with another one."""
    from hq_backups.models import DueRun

    busy = DueRun.objects.filter(state=DueRun.State.RUNNING).values("host")
    old = DueRun.objects.filter(state=DueRun.State.QUEUED, queued_at__lt=stored(now - PICK_UP))
    return list(old.exclude(host__in=busy))
