"""When backups are due: pure functions of the settings, the clock and what was made.

Every local date has one regular backup at the nadir hour: the weekly one on Sundays, which counts as that day's
daily, else the daily one. Hourly ones, where they are on, start at a quarter past, Mondays to Saturdays.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

from hq_backups.clock import host_time_zone
from hq_backups.engine.judgement import GRACE

if TYPE_CHECKING:
    from hq_backups.conf import Resolved

__all__ = ["COUNTS", "GRACE", "Slot", "Timetable", "due", "is_covered", "timetable"]

COUNTS = {"daily": ("daily", "weekly"), "weekly": ("weekly",), "hourly": ("hourly",)}
"""Which types count for one that is due."""
ELASTICSEARCH_LATER = 4
"""Hours: HQ's job that notes how far its pillows are must have ended before the indices are copied."""
HOURLY_MINUTE = 15
NOON = time(12)
SUNDAY = 7


@dataclass(frozen=True)
class Slot:
    """One backup that is due at one moment."""

    store: str
    type: str
    due: datetime
    """Aware, UTC."""


@dataclass(frozen=True)
class Timetable:
    """When the backups of one store are due."""

    store: str
    zone: tzinfo
    nadir_hour: int
    """The hour, local time, of the store's own daily and weekly backups."""
    hourly_every: int | None = None
    """Hours between hourly backups; None when they are off."""

    def last(self, now: datetime, type: str) -> Slot | None:
        """Return the newest slot of a type that is due by ``now``.

        There is no daily one from the weekly one on, which counts for it, and no hourly one while that is off.
        """
        regular, of_type = self._newest(now, ("daily", "weekly")), self._newest(now, (type,))
        superseded = type == "daily" and regular is not None and regular.type == "weekly"
        return None if superseded else of_type

    def next(self, now: datetime, type: str | None = None) -> Slot:
        """Return the first slot after ``now``, of any type when none is named."""
        later = (s for s in self.around(now) if s.due > now and type in (None, s.type))
        return min(later, key=lambda slot: slot.due)

    def around(self, now: datetime) -> Iterator[Slot]:
        """Yield every slot of the week before ``now`` and of the one after it."""
        today = now.astimezone(self.zone).date()
        for number in range(-9, 10):
            yield from self.of_date(today + timedelta(days=number))

    def of_date(self, day: date) -> Iterator[Slot]:
        """Yield the slots of a local date, which may be one that the zone's calendar left out."""
        if self._at(day, NOON).astimezone(self.zone).date() != day:
            return
        sunday = day.isoweekday() == SUNDAY
        yield Slot(self.store, "weekly" if sunday else "daily", self._at(day, time(self.nadir_hour)))
        if self.hourly_every and not sunday:
            for hour in range(0, 24, self.hourly_every):
                yield Slot(self.store, "hourly", self._at(day, time(hour, HOURLY_MINUTE)))

    def _newest(self, now: datetime, types: Collection[str]) -> Slot | None:
        past = (s for s in self.around(now) if s.due <= now and s.type in types)
        return max(past, key=lambda slot: slot.due, default=None)

    def _at(self, day: date, local: time) -> datetime:
        """Return one moment, also for a local time that the clocks skip (it is that much later) or repeat."""
        return datetime.combine(day, local, self.zone).astimezone(UTC)


def timetable(resolved: Resolved, store: str) -> Timetable:
    """Return when the settings want backups of ``store``, by the calendar that file names go by."""
    config = resolved.config(require=(store,))
    zone = config.timezone or host_time_zone()
    later = ELASTICSEARCH_LATER if store == "elasticsearch" else 0
    return Timetable(
        store,
        ZoneInfo(zone) if zone else UTC,
        (resolved["nadir_hour"] + later) % 24,
        resolved["nadir_hour_frequency"] if config.store(store).hourly else None,
    )


def due(table: Timetable, done: Collection[Slot], now: datetime) -> list[Slot]:
    """Return what is to be started now, the regular one first: never more than one regular and one hourly.

    ``done`` is what was started or made, each at the moment at which that was; it may have more than this store's.
    Only the newest slot of a type is ever caught up. A weekly one that was missed is made before the daily one,
    and counts for it. What carries a time that is not yet (the clock was wrong) counts for nothing.
    """
    past = [each for each in done if each.due <= now]
    missed = {
        type_: slot
        for type_ in COUNTS
        if (slot := table.last(now, type_)) is not None and not is_covered(slot, past)
    }
    if "weekly" in missed:
        missed.pop("daily", None)
    return sorted(missed.values(), key=lambda slot: slot.type == "hourly")


def is_covered(slot: Slot, done: Collection[Slot]) -> bool:
    """Tell whether something that counts for ``slot`` was started since it was due."""
    return any(
        each.store == slot.store and each.type in COUNTS[slot.type] and each.due >= slot.due for each in done
    )
