"""Celery's tasks. They keep no result, are acknowledged before they begin, and are never repeated by Celery.

A message that Redis hands out twice, or a worker gets late, finds nothing to take: the rows decide.
"""

from __future__ import annotations

import logging
from typing import Any

from celery import shared_task
from django.core.management import call_command

from hq_backups import conf, detached, reaper
from hq_backups.claims import Claim
from hq_backups.clock import host_time_zone
from hq_backups.conf.engine import is_checked
from hq_backups.engine.events import utc_now
from hq_backups.engine.when import local_time
from hq_backups.verifying import verify

__all__ = ["check_backups", "check_here", "dispatch_due", "reap_runs", "run_command", "run_due", "verify"]

logger = logging.getLogger(__name__)

CHECK_HOURS = (3, 7, 11, 15, 19, 23)
"""Local hours at which the bucket is looked at."""
MINUTE = 60
DAY = 24 * 60 * MINUTE
RUN_LIMIT = 14 * DAY
"""Seconds: a host's limit on its own tasks is not meant for backups of its whole data."""

_ONCE: dict[str, Any] = {"ignore_result": True, "acks_late": False, "max_retries": 0}


@shared_task(name="hq_backups.dispatch_due", expires=9 * MINUTE, **_ONCE)
def dispatch_due() -> None:
    """Start what is due; then tell what is wrong, also when nothing could be started."""
    from hq_backups.dispatch import dispatch
    from hq_backups.supervision import supervise

    resolved, now = conf.resolve(), utc_now()
    try:
        dispatch(resolved, now)
    finally:
        supervise(resolved, now)


@shared_task(
    name="hq_backups.run_due", expires=65 * MINUTE, time_limit=RUN_LIMIT, soft_time_limit=RUN_LIMIT, **_ONCE
)
def run_due(claim: str) -> None:
    """Make one backup that is due on this host: in this worker, or started from it and left alone."""
    from hq_backups.dispatch import DETACHED, run_in, words

    resolved = conf.resolve()
    host = resolved["backup_host_name"]
    reaper.reap(host, utc_now())
    row = Claim.parse(claim).row()
    if row is None or row.host != host:
        logger.info("nothing to do for %s on %s", claim, host)
        return
    command = words(row.store, row.type, Claim.of(row))
    if run_in(resolved, host) == DETACHED:
        detached.start(resolved, command)
    else:
        run_command(command)


@shared_task(name="hq_backups.reap_runs", expires=9 * MINUTE, **_ONCE)
def reap_runs() -> None:
    """Mark this host's runs that were killed."""
    reaper.reap(conf.resolve()["backup_host_name"], utc_now())


@shared_task(name="hq_backups.check_backups", expires=30 * MINUTE, **_ONCE)
def check_backups() -> None:
    """Check the bucket as check_s3_backups does, at the hours of the host's own calendar, and have other hosts do so.

    Each host writes the status files of its own directories; only this one mails.
    """
    from hq_backups.dispatch import QUEUE, queue, run_in

    resolved = conf.resolve()
    if not any(is_checked(resolved, store) for store in resolved.switched_on):
        return
    if local_time(utc_now(), resolved["timezone"] or host_time_zone()).hour not in CHECK_HOURS:
        return
    for host in resolved["backup_hosts"] or {}:
        if host != resolved["backup_host_name"] and run_in(resolved, host) == QUEUE:
            try:
                check_here.apply_async(queue=queue(host))
            except Exception:
                logger.exception("%s could not be asked to check its backups", host)
    run_command(["check_s3_backups"])


@shared_task(name="hq_backups.check_here", expires=3 * 60 * MINUTE, **_ONCE)
def check_here() -> None:
    """Check the bucket and write this host's status files; the host that asked for it mails."""
    run_command(["check_s3_backups", "--no-email"])


def run_command(words: list[str]) -> int:
    """Run one of our commands in this process, its words in the log; return its exit code."""
    name, *arguments = words
    try:
        call_command(name, *arguments, stdout=_Log(logging.INFO), stderr=_Log(logging.WARNING))
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


class _Log:
    """A stream whose lines are log records."""

    def __init__(self, level: int) -> None:
        self.level = level

    def write(self, text: str) -> int:
        """Log what is no empty line."""
        for line in text.splitlines():
            if line.strip():
                logger.log(self.level, "%s", line.rstrip())
        return len(text)

    def flush(self) -> None:
        """Do nothing: a record is written at once."""

    def isatty(self) -> bool:
        """Tell that nobody watches."""
        return False
