"""How each store stands, in words: what the top of the history page shows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from hq_backups import history, problems
from hq_backups.engine.judgement import age_words
from hq_backups.engine.space import human_bytes
from hq_backups.history import LastGood, Standing
from hq_backups.models import BackupRun

LABELS = {
    "postgres": "PostgreSQL",
    "couch": "CouchDB",
    "blobdb": "BlobDB",
    "elasticsearch": "Elasticsearch",
}
PLACES = {"local": "this store's disk", "s3": "bucket"}
GOOD, WARN, BAD, QUIET = "good", "warn", "bad", "quiet"
SIGNS = {GOOD: "✓", WARN: "!", BAD: "✗", QUIET: "○"}
"""Beside the colour, for who cannot tell colours apart."""
TONES = {
    history.OK: GOOD,
    history.LATE: WARN,
    history.FAILED: BAD,
    history.NONE: BAD,
    history.OFF: QUIET,
}
RUN_TONES: dict[str, str] = {
    BackupRun.Status.OK: GOOD,
    BackupRun.Status.WARNING: WARN,
    BackupRun.Status.FAILED: BAD,
    BackupRun.Status.RUNNING: QUIET,
}
PROBLEM_TONES = {problems.ERROR: BAD, problems.ALERT: BAD, problems.WARNING: WARN}


@dataclass(frozen=True)
class Row:
    """One thing that is told of a store."""

    label: str
    text: str
    at: datetime | None = None
    tone: str = ""
    run: int | None = None
    """The run that its words are about."""
    artifact: int | None = None

    @property
    def sign(self) -> str:
        """Return the tone as a character."""
        return SIGNS.get(self.tone, "")

    @property
    def utc(self) -> str:
        """Return its time as it is written everywhere."""
        return "" if self.at is None else minute(self.at)


@dataclass(frozen=True)
class Card:
    """One store on one host."""

    store: str
    host: str
    label: str
    tone: str
    words: str
    rows: tuple[Row, ...]

    @property
    def sign(self) -> str:
        """Return the tone as a character."""
        return SIGNS[self.tone]


def cards(standings: Iterable[Standing], now: datetime) -> list[Card]:
    """Return a card for each."""
    return [
        Card(
            each.store,
            each.host,
            LABELS.get(each.store, each.store),
            TONES[each.state],
            _words(each),
            tuple(_rows(each, now)),
        )
        for each in standings
    ]


def summary(shown: Sequence[Card]) -> tuple[str, str]:
    """Return a tone and one sentence about all of them."""
    on = [card for card in shown if card.tone != QUIET]
    wrong = [card for card in on if card.tone != GOOD]
    if not on:
        return QUIET, "No store's backups are switched on."
    if not wrong:
        return GOOD, "All backups are on schedule."
    tone = BAD if any(card.tone == BAD for card in wrong) else WARN
    names = ", ".join(f"{card.label} on {card.host}" for card in wrong)
    return tone, f"{len(wrong)} of {len(on)} need attention: {names}."


def minute(moment: datetime) -> str:
    """Return ``2026-11-22 00:00 UTC``."""
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def duration(seconds: float) -> str:
    """Return ``4.2 s``, ``12 min 5 s`` or ``3 h 20 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _words(standing: Standing) -> str:
    if standing.state == history.LATE:
        return f"Late: {' and '.join(standing.late)}"
    return {
        history.OK: "On schedule",
        history.FAILED: "The last run failed",
        history.NONE: "No good backup",
        history.OFF: "Switched off",
    }[standing.state]


def _rows(standing: Standing, now: datetime) -> Iterable[Row]:
    for type in ("daily", "weekly", "hourly"):
        good = standing.last_good.get(type)
        if good is not None or type in standing.late or (type != "hourly" and standing.next_due):
            yield _last(type, good, standing, now)
    newest = standing.newest
    if newest is not None:
        where = " + ".join(PLACES.get(place, place) for place in newest.places)
        yield Row("Copies of the newest", where or "not known", tone="" if where else WARN)
    if standing.verified_at is not None:
        yield Row("Verified", _ago(now - standing.verified_at), standing.verified_at)
    elif newest is not None:
        yield Row("Verified", "never since it is recorded")
    yield _restored(standing, now)
    if standing.running is not None:
        run = standing.running
        yield Row("Running", f"for {age_words(now - run.started_at)}", run.started_at, run=run.pk)
    if standing.last_failed is not None:
        run = standing.last_failed
        error = run.error.strip().partition("\n")[0] or "no reason was recorded"
        yield Row("Newest failure", error, run.started_at, BAD, run=run.pk)
    if standing.next_due is not None:
        slot = standing.next_due
        yield Row("Next due", f"{slot.type}, in {age_words(slot.due - now)}", slot.due)


def _last(type: str, good: LastGood | None, standing: Standing, now: datetime) -> Row:
    label = f"Last good {type}"
    is_late = type in standing.late
    if good is None:
        covered = type == "daily" and "weekly" in standing.last_good and not is_late
        words = "none; the weekly one counts" if covered else "none; it is late" if is_late else "none yet"
        return Row(label, words, tone=WARN if is_late else QUIET)
    about = [f"{age_words(now - good.taken_at)} old"]
    if good.size is not None:
        about.append(human_bytes(good.size))
    if good.seconds is not None:
        about.append(f"took {duration(good.seconds)}")
    if standing.state != history.OFF:
        about.append("late" if is_late else "on schedule")
    tone = "" if standing.state == history.OFF else WARN if is_late else GOOD
    return Row(label, ", ".join(about), good.taken_at, tone, artifact=good.pk)


def _restored(standing: Standing, now: datetime) -> Row:
    run = standing.restored_by
    if run is None or standing.restored_in is None:
        return Row("Restored in", "not known: no restore or deep verify is recorded")
    how = "a restore" if run.verb == "restore" else "a deep verify"
    words = f"{duration(standing.restored_in)} by {how} {_ago(now - run.started_at)}"
    return Row("Restored in", words, run.started_at, run=run.pk)


def _ago(age: timedelta) -> str:
    return f"{age_words(age)} ago"
