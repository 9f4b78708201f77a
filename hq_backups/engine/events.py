"""The one stream of events that a run tells; console, records, alarms and ``--json`` are its readers.

An event is a kind and plain data. On the wire it is one line of JSON:
``{"v": 1, "at": "2026-11-22T00:00:02Z", "kind": "progress", "run": "...", ...}``.

========== =========================================================================================
kind       data
========== =========================================================================================
started    verb, store, and what is known of the run
step       name, message: a stage begins
progress   phase, done, total (bytes, total may be null)
warning    code, message
plan       what a restore would do (see restore.Plan)
entry      one artifact of the catalog (see catalog.Entry)
artifact   manifest of a new artifact, and its locations
kept       name, reason
pruned     name, reason
check      name, ok, message: one thing that was verified
finding    one sentence of a check of the bucket (see judgement.Finding)
status     store, path: a check wrote its status file
data       free-form facts of a verb (restore timings, paths)
error      code, message, hint, exit
result     ok, exit, store, seconds; the last event of a run
========== =========================================================================================
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from hq_backups.engine.errors import Exit, HQBackupsError, ProtocolMismatch

VERSION = 1


def utc_now() -> datetime:
    """Return this moment, aware, in UTC."""
    return datetime.now(UTC)


def format_utc(moment: datetime) -> str:
    """Return ``2026-11-22T00:00:02Z``."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_utc(text: str) -> datetime:
    """Read what :func:`format_utc` wrote."""
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)


@dataclass(frozen=True)
class Event:
    """Something that happened in a run."""

    kind: str
    data: Mapping[str, Any] = field(default_factory=dict)
    run: str | None = None
    at: datetime = field(default_factory=utc_now)

    def to_json(self) -> str:
        """Return the event as one line."""
        body = {"v": VERSION, "at": format_utc(self.at), "kind": self.kind, "run": self.run, **self.data}
        return json.dumps(body, separators=(",", ":"), ensure_ascii=True)

    @classmethod
    def from_json(cls, line: str) -> Event:
        """Read a line; another version is refused."""
        body = json.loads(line)
        version = body.pop("v", None)
        if version != VERSION:
            raise ProtocolMismatch(ours=VERSION, theirs=version)
        at, kind, run = parse_utc(body.pop("at")), body.pop("kind"), body.pop("run", None)
        return cls(kind, body, run, at)


Sink = Callable[[Event], None]


class Events:
    """What a verb speaks to: gives events their run, thins out progress, remembers warnings."""

    progress_interval = 0.25

    def __init__(self, sink: Sink, run: str | None = None) -> None:
        """Send everything to ``sink``."""
        self.sink = sink
        self.run = run
        self.warnings: list[str] = []
        self._last_progress: dict[str, float] = {}
        self._lock = threading.Lock()

    def emit(self, kind: str, **data: Any) -> None:
        """Send one event; may be called from any thread."""
        with self._lock:
            self.sink(Event(kind, data, self.run))

    def step(self, name: str, message: str) -> None:
        """Say that a stage begins."""
        self.emit("step", name=name, message=message)

    def progress(self, phase: str, done: int, total: int | None = None, *, final: bool = False) -> None:
        """Tell how far a phase is, a few times a second at most."""
        now = time.monotonic()
        if not final and now - self._last_progress.get(phase, -1e9) < self.progress_interval:
            return
        self._last_progress[phase] = now
        self.emit("progress", phase=phase, done=done, total=total)

    def warning(self, code: str, message: str) -> None:
        """Tell, and remember for the manifest, something that is not right but did not stop the run."""
        self.warnings.append(message)
        self.emit("warning", code=code, message=message)

    def error(self, error: BaseException) -> Exit:
        """Tell why the run failed; return the exit code that says so."""
        if isinstance(error, HQBackupsError):
            self.emit(
                "error", code=error.code, message=error.message, hint=error.hint, exit=int(error.exit_code)
            )
            return error.exit_code
        self.emit(
            "error",
            code=type(error).__name__,
            message=str(error) or repr(error),
            hint="",
            exit=int(Exit.ERROR),
        )
        return Exit.ERROR
