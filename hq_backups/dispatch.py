"""Starts what is due, each thing once: looks at the clock and the records, claims, and hands over."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import datetime, timedelta

from hq_backups import claims, detached, reaper
from hq_backups.claims import Claim
from hq_backups.clock import aware
from hq_backups.conf import Resolved
from hq_backups.engine.errors import Exit, HQBackupsError
from hq_backups.models import Artifact, BackupRun, DueRun
from hq_backups.schedule import Slot, due, timetable

logger = logging.getLogger(__name__)

TICK = timedelta(minutes=10)
SEND_AGAIN = timedelta(hours=1)
"""How often what nobody takes is handed over again: Redis may have lost it, or a process not started."""
REMEMBERED = timedelta(days=9)
"""How far back the records matter: the newest weekly slot is at most seven days old."""
BLOCKS = timedelta(days=1)
"""How long a run that never ended stands in the way of the next one; then only the lock of the store does."""
BLOCKING = ("backup", "restore")
"""Verbs that hold the lock of a store for as long as they run."""
DETACHED, QUEUE = "detached", "queue"


def dispatch(resolved: Resolved, now: datetime) -> list[Claim]:
    """Start what is due on the hosts that this environment's settings name; return what was handed over."""
    me = resolved["backup_host_name"]
    reaper.reap(me, now)
    _let_others_reap(me)
    _hand_over_again(resolved, now)
    handed = []
    for store in stores(resolved):
        try:
            resolved.require(store)
            table = timetable(resolved, store)
        except HQBackupsError as error:
            logger.error("%s is not scheduled: %s. %s", store, error.message, error.hint)
            continue
        for host in hosts(resolved, store):
            begun = [] if is_busy(host, store, now) else due(table, list(made(host, store, now)), now)
            # One of a store at a time: the next tick sees to the other.
            for slot in begun[:1]:
                claim = claims.claim(slot, host, now)
                if claim is not None and hand_over(resolved, host, slot, claim):
                    handed.append(claim)
    return handed


def stores(resolved: Resolved) -> list[str]:
    """Return the stores that are switched on and can be backed up."""
    return [store for store in resolved.enabled if store not in resolved.unbuilt]


def hosts(resolved: Resolved, store: str) -> list[str]:
    """Return the hosts that back up a store."""
    named = resolved["backup_hosts"]
    if named is not None:
        return [host for host, theirs in named.items() if store in theirs]
    return [resolved["backup_host_name"]] if store in resolved.local else []


def run_in(resolved: Resolved, host: str) -> str:
    """Return whether runs of a host are processes of their own, or work of a worker on the host's queue."""
    named = resolved["backup_hosts"] or {}
    return str(resolved["backup_run_in"] or (QUEUE if host in named else DETACHED))


def queue(host: str) -> str:
    """Return the name of a host's queue."""
    return f"hq_backups.{host}"


def made(host: str, store: str, now: datetime) -> Iterator[Slot]:
    """Yield what a host made, or makes, of a store: by the schedule, by cron or by hand, or as its files show."""
    since = now - REMEMBERED
    for row in DueRun.objects.filter(host=host, store=store, queued_at__gte=since):
        slot = claims.counted(row, now)
        if slot is not None:
            yield slot
    runs = BackupRun.objects.filter(host=host, store=store, verb="backup", started_at__gte=since)
    for run in runs:
        there = run.status != BackupRun.Status.FAILED or run.exit_code == Exit.UPLOAD_FAILED
        if there:
            yield Slot(store, run.type, aware(run.started_at))
    artifacts = Artifact.objects.filter(host=host, store=store, managed=True, problem="", taken_at__gte=since)
    for type_, taken_at in artifacts.values_list("type", "taken_at"):
        yield Slot(store, type_, aware(taken_at))


def is_busy(host: str, store: str, now: datetime) -> bool:
    """Tell whether a run of a store goes on there: another one would only meet its lock."""
    here = {"host": host, "store": store}
    running = BackupRun.objects.filter(**here, status=BackupRun.Status.RUNNING, verb__in=BLOCKING)
    runs = running.filter(started_at__gte=now - BLOCKS)
    begun = DueRun.objects.filter(**here, state=DueRun.State.RUNNING, started_at__gte=now - BLOCKS)
    handed = DueRun.objects.filter(**here, state=DueRun.State.QUEUED, queued_at__gte=now - claims.PICK_UP)
    return runs.exists() or begun.exists() or handed.exists()


def hand_over(resolved: Resolved, host: str, slot: Slot, claim: Claim) -> bool:
    """Give a claim to a process of its own here, or to the host's queue; what fails is given back."""
    from hq_backups.tasks import run_due

    try:
        if host == resolved["backup_host_name"] and run_in(resolved, host) == DETACHED:
            detached.start(resolved, words(slot.store, slot.type, claim))
        else:
            run_due.apply_async((str(claim),), queue=queue(host))
    except Exception:
        logger.exception("%s of %s could not be handed to %s", slot.type, slot.store, host)
        claim.give_back()
        return False
    logger.info("%s of %s handed to %s", slot.type, slot.store, host)
    return True


def words(store: str, type_: str, claim: Claim) -> list[str]:
    """Return the command that does a claim's work."""
    return ["run_backup", store, "--type", type_, "--due", str(claim)]


def _hand_over_again(resolved: Resolved, now: datetime) -> None:
    """Hand over, about once an hour, what nobody took; whoever takes the second one finds nothing to do.

    What a newer one stands for is not, and stays to be seen until its host works again.
    """
    for row in DueRun.objects.filter(state=DueRun.State.QUEUED, queued_at__lt=now - claims.PICK_UP):
        if row.store not in stores(resolved) or row.host not in hosts(resolved, row.store):
            Claim.of(row).give_back()
        elif claims.is_superseded(row):
            if claims.is_working(row):
                Claim.of(row).give_back()
        elif (now - aware(row.queued_at)) % SEND_AGAIN < TICK:
            hand_over(resolved, row.host, Slot(row.store, row.type, aware(row.due_at)), Claim.of(row))


def _let_others_reap(me: str) -> None:
    """Have the other hosts look after runs that never ended: only they see whether the process is there."""
    from hq_backups.tasks import reap_runs

    running = BackupRun.objects.filter(status=BackupRun.Status.RUNNING).exclude(host=me)
    begun = DueRun.objects.filter(state=DueRun.State.RUNNING).exclude(host=me)
    for host in {*running.values_list("host", flat=True), *begun.values_list("host", flat=True)}:
        try:
            reap_runs.apply_async(queue=queue(host))
        except Exception:
            logger.exception("%s could not be asked for its runs", host)
