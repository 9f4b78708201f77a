"""The host's calendar, which Django's time zone must not change."""

from __future__ import annotations

import contextlib
import os
from datetime import datetime
from pathlib import Path
from zoneinfo import ZoneInfo

from hq_backups.engine.config import Config
from hq_backups.engine.events import utc_now
from hq_backups.engine.when import local_time


def host_time_zone() -> str | None:
    """Return the host's IANA zone; None when it does not say.

    Django puts TIME_ZONE into the process's environment, so the process's own local time is not the host's.
    """
    candidates = [os.path.realpath("/etc/localtime").rpartition("/zoneinfo/")[2].removeprefix("posix/")]
    with contextlib.suppress(OSError):
        candidates.append(Path("/etc/timezone").read_text().strip())
    for name in candidates:
        with contextlib.suppress(OSError, ValueError, KeyError):
            return ZoneInfo(name).key
    return None


def automatic_type(config: Config) -> str:
    """Return what cron means today, by the calendar that file names go by: weekly on Sundays, else daily."""
    return "weekly" if local_time(utc_now(), config.timezone).isoweekday() == 7 else "daily"


def aware(moment: datetime) -> datetime:
    """Return a row's time with its zone, which is left out where the host switched USE_TZ off."""
    from django.utils import timezone

    return (
        moment if timezone.is_aware(moment) else timezone.make_aware(moment, timezone.get_default_timezone())
    )


def stored(moment: datetime) -> datetime:
    """Return a time as rows have it: without its zone where the host switched USE_TZ off."""
    from django.conf import settings
    from django.utils import timezone

    return moment if settings.USE_TZ else timezone.make_naive(moment, timezone.get_default_timezone())
