"""The host's calendar: names, dates and retention go by local time, manifests by UTC."""

from __future__ import annotations

from datetime import datetime
from zoneinfo import ZoneInfo


def local_time(moment: datetime, timezone: str | None) -> datetime:
    """Return a moment in ``timezone``, or in the host's own."""
    return moment.astimezone(ZoneInfo(timezone) if timezone else None)
