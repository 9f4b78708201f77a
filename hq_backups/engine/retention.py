"""Which local artifacts stay and which go, and why: one pure function of facts, rules and the clock.

The rule of CommCare's scripts since 2024 (``find -daystart -mtime +N``): an artifact goes when it is more
than N calendar days old, an hourly one after so many minutes. Nothing is counted, so a failed artifact can
never push a good one out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta

from hq_backups.engine.config import Retention

CLOCK_TOLERANCE = timedelta(minutes=5)
"""What two hosts that share a directory may differ."""


@dataclass(frozen=True)
class Artifact:
    """What retention needs to know of one file."""

    name: str
    type: str
    local_date: date
    """Of the backup; of the last change for unmanaged ones."""
    taken_at: datetime
    good: bool
    """Whole and restorable as far as is known; an unmanaged one is not known to be."""
    managed: bool
    host: str
    env: str
    store: str

    @property
    def group(self) -> tuple[str, str, str, str]:
        """Return what artifacts must share to stand in for each other."""
        return self.store, self.type, self.host, self.env


@dataclass(frozen=True)
class Decision:
    """What happens to one artifact, with the sentence that says why."""

    artifact: Artifact
    keep: bool
    reason: str


def decide(
    artifacts: Sequence[Artifact],
    retention: Retention,
    today: date,
    now: datetime,
    *,
    extra_days: int = 0,
    manual_older_than: int | None = None,
) -> list[Decision]:
    """Return a decision per artifact, in their order.

    ``today`` is the host's calendar date of ``now``. ``extra_days`` is 1 for a run whose upload failed.
    """
    if (why := _clock_is_wrong(artifacts, today, now)) is not None:
        return [Decision(artifact, keep=True, reason=why) for artifact in artifacts]
    last = _last_of_groups(artifacts)
    decisions = []
    for artifact in artifacts:
        keep, reason = _by_age(artifact, retention, today, now, extra_days, manual_older_than)
        if not keep and any(artifact is kept for kept in last.values()):
            kind = "good" if artifact.good else "old script's"
            keep, reason = True, f"It is the newest {kind} {artifact.type} backup, which is never removed."
        elif not keep and artifact.managed and not artifact.good:
            reason += " It was damaged anyway."
        decisions.append(Decision(artifact, keep, reason))
    return decisions


def _clock_is_wrong(artifacts: Sequence[Artifact], today: date, now: datetime) -> str | None:
    for artifact in artifacts:
        if artifact.taken_at > now + CLOCK_TOLERANCE or artifact.local_date > today + timedelta(days=1):
            jumped = "is newer than this host's clock, which must have jumped back"
            return f"Nothing is removed: {artifact.name} {jumped}."
    return None


def _last_of_groups(artifacts: Sequence[Artifact]) -> dict[tuple[str, str, str, str], Artifact]:
    """Return the newest good artifact of each group, or the newest unmanaged where none is known good."""
    last: dict[tuple[str, str, str, str], Artifact] = {}
    for artifact in artifacts:
        if not artifact.good and artifact.managed:
            continue
        best = last.get(artifact.group)
        if best is None or _rank(artifact) > _rank(best):
            last[artifact.group] = artifact
    return last


def _rank(artifact: Artifact) -> tuple[bool, datetime]:
    return artifact.good, artifact.taken_at


def _by_age(
    artifact: Artifact,
    retention: Retention,
    today: date,
    now: datetime,
    extra_days: int,
    manual_older_than: int | None,
) -> tuple[bool, str]:
    age = (today - artifact.local_date).days
    match artifact.type:
        case "daily":
            return _compare(age, "day", retention.days + extra_days, artifact.type)
        case "weekly":
            return _compare(age, "day", retention.weeks * 7 + extra_days, artifact.type)
        case "hourly":
            minutes = (now - artifact.taken_at) // timedelta(minutes=1)
            return _compare(minutes, "minute", retention.hours * 60 + extra_days * 1440, artifact.type)
        case "manual" if manual_older_than is not None:
            return _compare(age, "day", manual_older_than, artifact.type)
        case "manual":
            return True, "Manual backups are removed only by prune_backups --manual-older-than."
        case _:
            return True, f"Its type, {artifact.type}, is unknown."


def _compare(age: int, unit: str, limit: int, type_: str) -> tuple[bool, str]:
    keep = age <= limit
    verdict = "stay for" if keep else "go after"
    return keep, f"It is {_many(max(age, 0), unit)} old; {type_} backups {verdict} {_many(limit, unit)}."


def _many(n: int, unit: str) -> str:
    return f"{n} {unit}" if n == 1 else f"{n} {unit}s"
