"""The verb undo: the last restore is taken back, finished or not, by what it noted before it did it.

Where the snapshot that saved what was live is gone, nothing can be put back: what is there stays as it is.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hq_backups.engine.config import from_plain
from hq_backups.engine.errors import (
    CorruptBackup,
    Exit,
    HQBackupsError,
    PreflightFailed,
    RestoreNeedsHands,
    UsageError,
)
from hq_backups.engine.events import Events
from hq_backups.engine.locks import StoreLock
from hq_backups.engine.manifest import Manifest
from hq_backups.engine.repository.snapshots import SnapshotRecords
from hq_backups.engine.requests import UndoRequest
from hq_backups.engine.snapshots.common import SCRATCH, clean_scratch
from hq_backups.engine.stores.base import SnapshotStore

NOTE = "restore"
MADE, SAVED, BACK, DONE, HANDS = "made", "saved", "back", "done", "hands"


def listed(failed: Mapping[str, str]) -> str:
    """Return a few parts, each with what is to be said of it."""
    return ", ".join(f"{part} ({why})" for part, why in list(failed.items())[:5])


def refuse_unfinished(records: SnapshotRecords) -> None:
    """Refuse while a restore that was interrupted is not taken back."""
    for path, note in records.notes(NOTE):
        if not note:
            raise _unreadable(path)
        if note.get("open"):
            raise PreflightFailed(
                f"the restore {note.get('run')} of {note.get('snapshot')} was interrupted",
                hint="Put back what it had changed first: restore_backup elasticsearch --undo",
            )


def undo(store: SnapshotStore, request: UndoRequest, run_id: str, events: Events) -> Exit:
    """Take the last restore back: what was there comes from the snapshot that saved it, the rest goes."""
    records = SnapshotRecords(store.settings.backup_dir)
    path, note = _last(records, store)
    try:
        safety = from_plain(Manifest, note["safety"]) if note.get("safety") else None
    except UsageError as error:
        raise _unreadable(path) from error
    touched = {p: phase for p, phase in dict(note.get("phases") or {}).items() if phase != BACK}
    live, lost = set(note.get("live") or ()), set(note.get("lost") or ())
    facts = {
        "put_back": sorted(p for p in touched if p in live),
        "removed": sorted(p for p in touched if p not in live | lost),
        "left": sorted(p for p in touched if p in lost),
    }
    events.emit(
        "plan", undo=True, store=store.name, env=store.config.env, name=note.get("snapshot"), run=note.get("run"),
        old_data=safety.name if safety else None, facts=facts,
    )  # fmt: skip
    if request.plan_only:
        return Exit.OK
    with StoreLock(records.directory, run_id, "undo"):
        clean_scratch(store, records, events)
        if facts["put_back"] and not _can_come_back(store, safety, facts["put_back"], path, events):
            facts["put_back"] = []
        scratch = records.note(SCRATCH, run_id, {"prefix": store.scratch(run_id)})
        failed = _take_back(store, safety, facts, store.scratch(run_id), events)
        store.clean_scratch(store.scratch(run_id))
        scratch.unlink()
        if failed:
            raise RestoreNeedsHands(
                f"{listed(failed)} could not be put back", hint="Repeat the command when the cause is mended."
            )
        path.unlink()
        events.emit("data", old_data=None, next_steps=store.next_steps(facts["put_back"]))
    return Exit.OK


def _can_come_back(
    store: SnapshotStore, safety: Manifest | None, parts: list[str], path: Path, events: Events
) -> bool:
    """Tell whether what was live is still to be had; raises what an operator does when it is not.

    False means that it is not, and that nothing of it is in the cluster either: there is nothing to take back.
    """
    try:
        if safety is None:
            raise CorruptBackup("there is none", name="(none)")
        store.kept(events, register=True)
        store.check(safety)
    except CorruptBackup as error:
        name = safety.name if safety is not None else "(none)"
        there = store.present(parts)
        if not there:
            events.warning(
                "given-up",
                f"neither the snapshot {name} of what was live ({error.message}) nor any of {', '.join(parts[:10])} is "
                "there: nothing can be taken back, the note of the restore goes",
            )
            return False
        raise RestoreNeedsHands(
            f"the snapshot {name} of what was live cannot come back ({error.message}); left as they are: "
            f"{listed(there)}",
            hint="If the repository is only away, bring it back and repeat the command. Otherwise look at those "
            "indices, give the undo up, then restore a backup that is whole:\n"
            f"sudo rm {shlex.quote(str(path))}",
        ) from error
    return True


def _take_back(
    store: SnapshotStore,
    safety: Manifest | None,
    facts: Mapping[str, list[str]],
    scratch: str,
    events: Events,
) -> dict[str, str]:
    failed: dict[str, str] = {}
    for part in facts["put_back"]:
        try:
            if safety is None:
                raise RestoreNeedsHands("there is no snapshot of it")
            store.try_out(safety, part, scratch, events)
            # What a killed run began may still be on its way, and cannot be closed: it goes.
            store.drop(part)
            documents = store.replace(safety, part, events)
        except HQBackupsError as error:
            failed[part] = error.message
        else:
            events.emit("check", name=part, ok=True, message=f"as before the restore, {documents} documents")
    for part in facts["removed"]:
        try:
            store.drop(part)
        except HQBackupsError as error:
            failed[part] = error.message
        else:
            events.emit("check", name=part, ok=True, message="removed: it was not there before the restore")
    return failed


def _last(records: SnapshotRecords, store: SnapshotStore) -> tuple[Path, dict[str, Any]]:
    notes = records.notes(NOTE)
    if not notes:
        raise PreflightFailed(
            f"there is no restore of {store.name} to take back",
            hint=f"See what there is: list_backups {store.name}",
        )
    # An interrupted one comes first, whatever was done since.
    path, note = next(((p, n) for p, n in notes if n.get("open", True)), notes[-1])
    if not note:
        raise _unreadable(path)
    return path, note


def _unreadable(path: Path) -> RestoreNeedsHands:
    return RestoreNeedsHands(
        f"the note of a restore cannot be read, {path}",
        hint="What was live before is in the newest snapshot named …_before_restore_…: list_backups elasticsearch\n"
        f"Look at the indices, then let the note go, and restore that one or another: sudo rm {shlex.quote(str(path))}",
    )
