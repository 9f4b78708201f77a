"""What the dispatcher does after it has looked for what is due: it says that it lives, and tells what is wrong."""

from __future__ import annotations

import logging
from datetime import datetime
from typing import TYPE_CHECKING

from hq_backups import alerts, health, mailing, recorded
from hq_backups.bounded import within
from hq_backups.watching import notes_of

if TYPE_CHECKING:
    from hq_backups.conf import Resolved

logger = logging.getLogger(__name__)

SECONDS = 45.0


def supervise(resolved: Resolved, now: datetime) -> None:
    """Tell missed runs, killed runs and silent workers of every host that shares the database.

    Raises nothing, and leaves the worker, which may be the only one that a host has, after a bounded time.
    """
    try:
        recorded.tick(str(resolved["backup_host_name"] or ""), now)
    except Exception as error:
        # The survey says so too, and tells it.
        logger.warning("the dispatcher cannot be noted: %s", mailing.said(error))
    try:
        told = within(SECONDS, lambda: _tell(resolved, now), what="telling what is wrong")
    except Exception:
        logger.exception("what is wrong could not be told")
        return
    for note in notes_of(told):
        logger.warning("%s", note)


def _tell(resolved: Resolved, now: datetime) -> alerts.Told:
    looked = health.survey(resolved, now, dispatching=True)
    return alerts.tell(resolved, looked.reports, now=now)
