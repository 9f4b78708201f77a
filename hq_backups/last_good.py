"""The last good backup of a store, in words: by what this host remembers, else by the records."""

from __future__ import annotations

import logging
from datetime import datetime

from hq_backups.alarm_state import Good, State
from hq_backups.bounded import within
from hq_backups.clock import aware
from hq_backups.engine.judgement import age_words

logger = logging.getLogger(__name__)

SECONDS = 5.0


def good_words(state: State, store: str, now: datetime) -> str:
    """Return its name and how old it is; nothing when nobody knows of one."""
    good = state.last_good(store) or _recorded(store)
    return f"{good.name or 'one without a name'}, {age_words(now - good.at)} old" if good else ""


def _recorded(store: str) -> Good | None:
    try:
        return within(SECONDS, lambda: _ask(store), what="the database")
    except Exception:
        # What is told must not wait for a database that is dead.
        logger.debug("the records cannot be asked", exc_info=True)
        return None


def _ask(store: str) -> Good | None:
    from hq_backups.models import BackupRun

    made = BackupRun.objects.filter(store=store).made()
    row = made.order_by("-started_at").values("started_at", "artifact", "size").first()
    return Good(aware(row["started_at"]), row["artifact"], row["size"]) if row else None
