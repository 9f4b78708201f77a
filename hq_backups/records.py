"""Keeps the history: a reader of events that writes rows, and never stops a run.

The database may be down, old, or the very one that is being restored: every write stands alone, its
connection is closed after it, and what fails is said once.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any

from django.db import connections, router

from hq_backups.artifacts import TEXT, integer, sane, sync, write_entries
from hq_backups.console import locations
from hq_backups.engine.config import Job
from hq_backups.engine.events import Event, Sink, format_utc
from hq_backups.process_id import ProcessId

__all__ = ["Recorder", "guarded", "sync"]

logger = logging.getLogger(__name__)

MOST_STEPS = 200
"""How many of a run's last steps are kept."""


class Recorder:
    """Writes one run's row and its artifacts' from its events."""

    def __init__(self, job: Job, sink: Sink) -> None:
        """Record a run of ``job``; what cannot be recorded is said to ``sink``."""
        self.job = job
        self.sink = sink
        self.key = ""
        self.said = False
        self.fields: dict[str, Any] = {}
        self.warnings: list[str] = []
        self.steps: deque[dict[str, str]] = deque(maxlen=MOST_STEPS)
        self.verified: tuple[dict[str, str], datetime] | None = None
        self.artifacts: dict[tuple[Any, Any], dict[str, Any]] = {}

    def __call__(self, event: Event) -> None:
        """Take in one event."""
        take = getattr(self, f"on_{event.kind}", None)
        if take is not None and self.job.run is not None:
            take(event, event.data)

    def on_started(self, event: Event, data: Mapping[str, Any]) -> None:
        """Write the row of a run that begins; a part of it, done as another user, begins again."""
        if not self.fields.get("started_at"):
            self._begin(event, data)
            self._guard(self._create)

    def on_step(self, event: Event, data: Mapping[str, Any]) -> None:
        """Remember a stage; all of them are written with the result."""
        told = {name: str(data.get(name, "")) for name in ("name", "message")}
        self.steps.append(sane({"at": format_utc(event.at), **told}))

    def on_warning(self, event: Event, data: Mapping[str, Any]) -> None:
        """Remember it."""
        self.warnings.append(str(data.get("message", "")))

    def on_error(self, event: Event, data: Mapping[str, Any]) -> None:
        """Remember it."""
        self.fields |= {"error": sane(str(data.get("message", ""))), "hint": sane(str(data.get("hint", "")))}

    def on_data(self, event: Event, data: Mapping[str, Any]) -> None:
        """Remember what the verb measured."""
        self.fields["facts"] = {**self.fields.get("facts", {}), **sane(dict(data))}

    def on_artifact(self, event: Event, data: Mapping[str, Any]) -> None:
        """Remember what was made; it is written with the result."""
        manifest = data.get("manifest") or {}
        places = [dict(place) for place in locations(data)]
        entry = {**manifest, "taken_at": manifest.get("started_at"), "managed": True, "manifest": manifest}
        # One event for the local file, another for the object: one artifact.
        entry = self.artifacts.setdefault(
            (manifest.get("run"), manifest.get("name")), {**entry, "locations": []}
        )
        entry["locations"] += [place for place in places if place not in entry["locations"]]
        self.fields["artifact"] = sane(str(manifest.get("name") or ""))
        # The object's event tells its name and run alone.
        self.fields["size"] = integer(manifest.get("size")) or self.fields.get("size")

    def on_verified(self, event: Event, data: Mapping[str, Any]) -> None:
        """Mark the artifact that proved to be whole."""
        which = {"store": data.get("store"), "run": data.get("verified_run") or "", "name": data.get("name")}
        self.fields["artifact"] = sane(str(data.get("name") or ""))
        self.verified = {key: sane(str(value)) for key, value in which.items()}, event.at
        # A deep verify restores into a scratch place: how long that takes is worth knowing.
        self.fields["facts"] = {**self.fields.get("facts", {}), "deep": bool(data.get("deep"))}

    def on_result(self, event: Event, data: Mapping[str, Any]) -> None:
        """Write how it went, whatever became of the first row: a restore may have rolled it away."""
        self._begin(event, data)
        status = "failed" if not data.get("ok") else "warning" if self.warnings else "ok"
        self.fields |= {
            "status": status,
            "exit_code": integer(data.get("exit")),
            "finished_at": event.at,
            "warnings": sane(self.warnings),
            "steps": list(self.steps),
            "seconds": (event.at - self.fields["started_at"]).total_seconds(),
        }
        self._guard(self._finish)

    def _begin(self, event: Event, data: Mapping[str, Any]) -> None:
        if "started_at" in self.fields:
            return
        request, config = self.job.request, self.job.config
        store = (
            data.get("store") or request.get("store") or (request.get("selection") or {}).get("store") or ""
        )
        settings = config.stores.get(str(store))
        known = {
            "verb": self.job.verb,
            "store": store,
            "mode": data.get("mode") or (settings.mode if settings else ""),
            "type": data.get("type") or request.get("type") or "",
            "env": config.env,
            "host": config.host,
        }
        self.fields = (
            {k: sane(str(v))[: TEXT.get(k, 32)] for k, v in known.items()}
            | {"started_at": event.at, "process": str(ProcessId.mine() or "")}
            | self.fields
        )

    def _create(self) -> None:
        from hq_backups.models import BackupRun

        key = str(self.job.run)[:240]
        _, new = BackupRun.objects.get_or_create(run=key, defaults=self.fields)
        # Ids count seconds: a second run of the same one (refused by the lock) must not take the first's row.
        self.key = key if new else f"{key}~{os.getpid()}"
        if not new:
            BackupRun.objects.get_or_create(run=self.key, defaults=self.fields)

    def _finish(self) -> None:
        from hq_backups.models import Artifact, BackupRun

        if not self.key:
            self._create()
        BackupRun.objects.update_or_create(run=self.key, defaults=self.fields)
        if self.verified is not None:
            which, when = self.verified
            Artifact.objects.filter(**which).update(verified_at=when)
        if self.artifacts:
            write_entries(self.artifacts.values())

    def _guard(self, write: Callable[[], None]) -> None:
        problem = guarded(write)
        if problem and not self.said:
            self.said = True
            self.sink(Event("warning", {"code": "history", "message": problem}, self.job.run))


def guarded(write: Callable[[], object]) -> str:
    """Call ``write`` with a fresh connection and close it after; return what went wrong, or nothing."""
    try:
        _drop_connections()
        write()
    except Exception as error:
        logger.debug("history", exc_info=True)
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"the history cannot be written ({first}); the catalog has everything: list_backups --sync"
    finally:
        # Our own idle connection would stand in a restore's way.
        _drop_connections()
    return ""


def _drop_connections() -> None:
    from hq_backups.models import BackupRun

    with suppress(Exception):
        connection = connections[router.db_for_write(BackupRun)]
        if not connection.in_atomic_block:
            connection.close()
