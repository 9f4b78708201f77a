"""What is wrong with the backups in a bucket: one pure function of what was seen, the schedule and the clock.

A daily backup is due every day at the nadir hour, local time; on Sundays the weekly one is that day's daily.
Whoever judges gives a run its grace, so that one that still works is not missed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from statistics import median_low
from typing import Any

from hq_backups.engine.errors import Exit
from hq_backups.engine.events import format_utc
from hq_backups.engine.space import human_bytes

GRACE = timedelta(hours=4)
"""How long after its due time a backup may still be on its way."""
MOST_GRACE = timedelta(hours=20)
"""What slow runs may have at most: a run that did not happen is told before the next one is due."""
RECENT_RUNS = 5
EARLY = timedelta(minutes=5)
"""What the clocks of two hosts may differ."""
SHRUNK = 0.5
"""A backup below this part of the ones before it has shrunk."""
EMPTY = 128
"""Bytes that no backup has so few of: a dump that failed leaves 20, an archive of nothing 45."""
KEPT = timedelta(days=7)
"""For so long after it was taken a backup must still be there; then the bucket's rules may remove it."""
MANY = 10
"""Damaged backups that are told one by one."""

OK, WARNING, ALERT, ERROR = "ok", "warning", "alert", "error"
EXITS = {OK: Exit.OK, WARNING: Exit.OK, ALERT: Exit.BAD_BACKUP, ERROR: Exit.ERROR}
_WORST = (Exit.BAD_BACKUP, Exit.ERROR, Exit.PREFLIGHT, Exit.LOCKED, Exit.USAGE, Exit.OK)


@dataclass(frozen=True)
class Problem:
    """Why a backup in the bucket is not good: a stable code, and words that begin with its key."""

    code: str
    text: str


@dataclass(frozen=True)
class Seen:
    """One backup as the bucket shows it."""

    key: str
    type: str
    taken_at: datetime
    """When its run began; for one without a manifest, when its upload ended."""
    size: int
    """Stored bytes."""
    form: str = ""
    """Mode and codec: only backups of one form have sizes that can be compared."""
    version_id: str | None = None
    env: str | None = None
    host: str | None = None
    managed: bool = False
    took: timedelta | None = None
    run: str | None = None
    crc32: str | None = None
    """Of the stored bytes, by the manifest: eight hex digits."""
    problem: Problem | None = None


@dataclass(frozen=True)
class Schedule:
    """When backups are due."""

    nadir_hour: int
    timezone: tzinfo

    def due(self, day: date) -> datetime:
        """Return the moment at which the backup of a local date is due."""
        return datetime.combine(day, time(self.nadir_hour), self.timezone).astimezone(UTC)

    def last(self, before: datetime, *, weekly: bool = False) -> datetime:
        """Return the newest due time that is not after ``before``."""
        return next(d for d in self._days(before, -1, weekly) if d <= before)

    def next(self, after: datetime, *, weekly: bool = False) -> datetime:
        """Return the first due time after a moment."""
        return next(d for d in self._days(after, 1, weekly) if d > after)

    def _days(self, moment: datetime, step: int, weekly: bool) -> Iterator[datetime]:
        today = moment.astimezone(self.timezone).date()
        for number in range(-1, 10):
            day = today + timedelta(days=step * number)
            if not weekly or day.isoweekday() == 7:
                yield self.due(day)


@dataclass(frozen=True)
class BucketFacts:
    """What a bucket says of itself."""

    name: str
    versioned: bool | None
    """None when it cannot be asked."""
    why: str = ""
    """Why it is taken to keep no versions."""
    fixed_keys: bool = True
    """Whether the settings want one key for each type and host."""
    what: str = "bucket"
    """What it is."""


@dataclass(frozen=True)
class Finding:
    """One sentence about a store's backups, with a code that programs can rely on."""

    code: str
    severity: str
    message: str
    hint: str = ""
    type: str | None = None
    key: str | None = None
    version_id: str | None = None
    age: float | None = None
    """Seconds."""
    size: int | None = None
    usual_size: int | None = None
    """What the ones before had."""
    exit: Exit | None = None
    """What the check ends with; None means what the severity says."""

    @property
    def exit_code(self) -> Exit:
        """Return the exit code that this finding alone would give."""
        return EXITS[self.severity] if self.exit is None else self.exit

    @property
    def line(self) -> str:
        """Return ``[ALERT] …``."""
        return one_line(f"[{self.severity.upper()}] {self.message}")

    def to_plain(self) -> dict[str, Any]:
        """Return the public JSON form."""
        return {
            "code": self.code,
            "severity": self.severity,
            "line": self.line,
            "hint": self.hint,
            "type": self.type,
            "key": self.key,
            "version_id": self.version_id,
            "age_seconds": None if self.age is None else round(self.age),
            "size": self.size,
            "usual_size": self.usual_size,
        }


@dataclass(frozen=True)
class _Rule:
    type: str
    counts: tuple[str, ...]
    limit: timedelta
    words: str


RULES = (
    _Rule("daily", ("daily", "weekly"), timedelta(days=2), "two days"),
    _Rule("weekly", ("weekly",), timedelta(days=7), "seven days"),
)


def judge(
    store: str,
    seen: Sequence[Seen],
    schedule: Schedule,
    now: datetime,
    bucket: BucketFacts,
    *,
    elsewhere: Seen | None = None,
) -> tuple[Finding, ...]:
    """Return what is to be said of a store, the newest daily and weekly backup first.

    ``elsewhere`` is the newest backup of another host, which is not among ``seen``.
    """
    marked = [_marked(each) for each in seen]
    good = sorted((s for s in marked if s.problem is None), key=lambda s: s.taken_at, reverse=True)
    newest, late = [], []
    for rule in RULES:
        first, *more = _fresh(store, rule, marked, good, schedule, now, bucket, elsewhere)
        newest.append(first)
        late += more
    return (
        *newest,
        *late,
        *_shrunk(store, good, now),
        *_damaged(store, marked, good, now),
        *_versions(bucket),
    )


def grace(good: Iterable[Seen]) -> timedelta:
    """Return how long a run may take: half as long again as the last ones did, four hours at least."""
    runs = sorted((s for s in good if s.took is not None), key=lambda s: s.taken_at, reverse=True)
    took = [s.took for s in runs[:RECENT_RUNS] if s.took is not None]
    return max(GRACE, min(1.5 * median_low(took), MOST_GRACE)) if took else GRACE


def worst(codes: Iterable[Exit]) -> Exit:
    """Return what several checks end with: 3 before 1, and both before 2."""
    known = [code if code in _WORST else Exit.ERROR for code in codes]
    return min(known, key=_WORST.index, default=Exit.OK)


def lines(findings: Sequence[Finding]) -> list[str]:
    """Return the findings as lines, and after them what to do about them."""
    hints = dict.fromkeys(f.hint for f in findings if f.hint)
    return [*(f.line for f in findings), *(f"  next: {one_line(hint)}" for hint in hints)]


def one_line(text: str) -> str:
    """Return untrusted text as one printable line."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split("\n")))


def age_words(age: timedelta) -> str:
    """Return ``5 days``, ``31 hours`` or ``12 minutes``."""
    whole = max(0, int(age.total_seconds()))
    units = (("day", 86400, 2), ("hour", 3600, 1), ("minute", 60, 0))
    count, unit = next((whole // length, unit) for unit, length, least in units if whole >= least * length)
    return f"{count} {unit}" if count == 1 else f"{count} {unit}s"


def _marked(each: Seen) -> Seen:
    if each.problem is None and each.size < EMPTY:
        return replace(each, problem=Problem("empty", f"{each.key} is empty: it has {each.size} bytes"))
    return each


def _about(each: Seen, now: datetime) -> dict[str, Any]:
    age = (now - each.taken_at).total_seconds()
    return {
        "type": each.type,
        "key": each.key,
        "version_id": each.version_id,
        "age": age,
        "size": each.size,
    }


def _fresh(
    store: str,
    rule: _Rule,
    seen: Sequence[Seen],
    good: Sequence[Seen],
    schedule: Schedule,
    now: datetime,
    bucket: BucketFacts,
    elsewhere: Seen | None,
) -> Iterator[Finding]:
    """Yield the line about the newest backup of a type, and another one when a later one was due."""
    weekly = rule.type == "weekly"
    due = schedule.last(now - grace(good), weekly=weekly)
    newest = next((s for s in good if s.type in rule.counts), None)
    born = min((s.taken_at for s in seen), default=None)
    none = f"No {rule.type} {store} backup in last {rule.words}"
    hint = f"run_backup {store} --type {rule.type}, and find out why none was made (list_backups {store})"
    if newest is None:
        if born is not None and born > due:
            first = schedule.next(born, weekly=weekly)
            yield Finding(
                "not-due",
                OK,
                f"No {rule.type} {store} backup is due yet: the first one is due {format_utc(first)}",
                type=rule.type,
            )
            return
        why = _why_none(rule, seen, bucket, elsewhere)
        yield Finding("missing", ALERT, f"{none}: {why}", hint, rule.type)
        return
    about = {**_about(newest, now), "type": rule.type}
    age = now - newest.taken_at
    last = f"the last one is {age_words(age)} old ({newest.key})"
    is_late = newest.taken_at < due - EARLY
    if is_late and age > rule.limit:
        yield Finding("stale", ALERT, f"{none}: {last}", hint, **about)
        return
    yield Finding("newest", OK, f"Last {rule.type} {store} backup is {newest.key}", **about)
    if is_late:
        was_due = f"was due {format_utc(due)} (nadir_hour {schedule.nadir_hour})"
        message = f"The {rule.type} {store} backup that {was_due} is not there: {last}"
        yield Finding("late", ALERT, message, hint, **about)


def _why_none(rule: _Rule, seen: Sequence[Seen], bucket: BucketFacts, elsewhere: Seen | None) -> str:
    bad = [s for s in seen if s.type in rule.counts and s.problem is not None]
    if bad:
        return f"the last one is damaged ({max(bad, key=lambda s: s.taken_at).key})"
    if elsewhere is not None:
        return f"{bucket.what} {bucket.name} has none of this host, the newest is of {elsewhere.host} ({elsewhere.key})"
    return f"{bucket.what} {bucket.name} has none at all"


def _shrunk(store: str, good: Sequence[Seen], now: datetime) -> Iterator[Finding]:
    """Yield an alert when the newest backup is much smaller than the ones before it."""
    regular = [s for s in good if s.type in ("daily", "weekly")]
    if not regular:
        return
    newest, *rest = regular
    before = [s.size for s in rest if s.form == newest.form][:RECENT_RUNS]
    usual = median_low(before) if before else 0
    if newest.size < SHRUNK * usual:
        message = (
            f"{newest.key} is much smaller than the ones before: {human_bytes(newest.size)}, "
            f"{100 * newest.size // usual} % of {human_bytes(usual)}"
        )
        hint = f"See what it holds, before older ones go: verify_backup {newest.key} --store {store} --source s3 --deep"
        yield Finding("shrunk", ALERT, message, hint, **_about(newest, now), usual_size=usual)


def _damaged(store: str, seen: Sequence[Seen], good: Sequence[Seen], now: datetime) -> Iterator[Finding]:
    """Yield an alert for each damaged backup that should be good."""
    last = {s.type: s.taken_at for s in reversed(good)}
    told = [s for s in seen if s.problem is not None and _matters(s, last.get(s.type), now)]
    told.sort(key=lambda s: s.taken_at, reverse=True)
    hint = f"Restore another one, and find out what damaged this one: list_backups {store} --source s3"
    for each in told[:MANY]:
        if each.problem is not None:
            yield Finding(each.problem.code, ALERT, each.problem.text, hint, **_about(each, now))
    if len(told) > MANY:
        yield Finding("more", ALERT, f"{len(told) - MANY} more backups are damaged", hint)


def _matters(each: Seen, last_good: datetime | None, now: datetime) -> bool:
    """Tell whether a damaged backup is news: rules of the bucket may take old ones away, or half of them."""
    if each.problem is not None and each.problem.code == "size-differs":
        return True
    return last_good is None or each.taken_at > last_good or now - each.taken_at <= KEPT


def _versions(bucket: BucketFacts) -> Iterator[Finding]:
    if not bucket.fixed_keys or bucket.versioned:
        return
    hint = "Switch the bucket's versioning on, or set aws_versioning_enabled: false"
    if bucket.versioned is None:
        message = f"bucket {bucket.name} may not keep versions: {bucket.why}"
        yield Finding("versioning-unknown", WARNING, message, hint)
        return
    message = f"bucket {bucket.name} does not keep versions ({bucket.why}): one key would be one backup"
    yield Finding("unversioned", ALERT, message, hint)
