"""The verb restore: saved first, tried out under another name, then put in place, one part after the other.

A part that fails gets its saved contents back, and leaves the others alone. What was done is noted before it
is done, for ``--undo``.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from hq_backups.engine.catalog import Entry
from hq_backups.engine.config import to_plain
from hq_backups.engine.errors import (
    Cancelled,
    Exit,
    HQBackupsError,
    NotEnoughSpace,
    PreflightFailed,
    RestoreNeedsHands,
    RestoreRolledBack,
    UsageError,
    WrongEnvironment,
)
from hq_backups.engine.events import Events, utc_now
from hq_backups.engine.locks import StoreLock
from hq_backups.engine.manifest import Manifest
from hq_backups.engine.plan import about
from hq_backups.engine.repository.snapshots import SnapshotRecords
from hq_backups.engine.requests import RestoreRequest
from hq_backups.engine.snapshots.backup import record
from hq_backups.engine.snapshots.common import SCRATCH, clean_scratch, survey
from hq_backups.engine.snapshots.undo import BACK, DONE, HANDS, MADE, NOTE, SAVED, listed, refuse_unfinished
from hq_backups.engine.space import human_bytes
from hq_backups.engine.stores.base import Situation, SnapshotStore
from hq_backups.engine.when import local_time

SAFETY = "before_restore"


def restore(store: SnapshotStore, entry: Entry, request: RestoreRequest, run_id: str, events: Events) -> Exit:
    """Plan, and unless only the plan was asked for, restore."""
    _refuse_options(store, request)
    manifest = entry.manifest or survey(store.config, store, entry.name, entry.taken_at)
    if manifest.env != store.config.env and request.from_env != manifest.env:
        raise WrongEnvironment(
            theirs=manifest.env, ours=store.config.env, hint=f"When you mean it: --from-env {manifest.env}"
        )
    records = SnapshotRecords(store.settings.backup_dir)
    records.prepare(events)
    if not request.rename_prefix:
        refuse_unfinished(records)
    store.check(manifest)
    situation = store.situation(manifest, request)
    _require_space(situation)
    events.emit("plan", **_plan(store, manifest, situation, request))
    if request.plan_only:
        return Exit.OK
    if request.expected_sha256 not in (None, manifest.sha256):
        raise PreflightFailed(
            "another backup is meant by that name than the one that was confirmed",
            hint="Run the command again and look at its plan.",
        )
    with StoreLock(records.directory, run_id, "restore"):
        clean_scratch(store, records, events)
        if request.rename_prefix:
            return _beside(store, manifest, situation, request.rename_prefix, events)
        refuse_unfinished(records)
        return _Restore(store, records, manifest, situation, run_id, events).run()


def _refuse_options(store: SnapshotStore, request: RestoreRequest) -> None:
    if request.target_dir or request.staging_dir or request.in_place or request.merge or request.only:
        raise UsageError(
            f"a snapshot of {store.name} is restored by the cluster itself, into no directory of ours",
            hint="Options that go with it: --indices, --rename-prefix.",
        )


def _require_space(situation: Situation) -> None:
    if 0 <= situation.free < situation.needed:
        raise NotEnoughSpace(
            path="the data nodes",
            free=human_bytes(situation.free),
            needed=human_bytes(situation.needed),
            hint="Each index is tried out under another name first. Free space there, or restore fewer: --indices",
        )


def _plan(
    store: SnapshotStore, manifest: Manifest, situation: Situation, request: RestoreRequest
) -> dict[str, Any]:
    facts = dict(situation.facts)
    if situation.live and not request.rename_prefix:
        facts["saved_first"] = f"{len(situation.live)} indices, into a snapshot of their own"
    return {
        **about(store, manifest, store.location(manifest.name)),
        "target": None,
        "staging": None,
        "set_aside": None,
        "free": situation.free if situation.free >= 0 else None,
        "needed": situation.needed,
        "facts": facts,
        "next_steps": store.next_steps(situation.parts),
        "surveyed": to_plain(manifest) if manifest.surveyed else None,
    }


def _beside(
    store: SnapshotStore, manifest: Manifest, situation: Situation, prefix: str, events: Events
) -> Exit:
    """Restore under other names; nothing that is live is touched."""
    failed: dict[str, str] = {}
    for part in situation.parts:
        try:
            documents = store.put_beside(manifest, part, prefix + part, events)
        except HQBackupsError as error:
            failed[part] = error.message
            events.emit("check", name=prefix + part, ok=False, message=error.message)
        else:
            events.emit("check", name=prefix + part, ok=True, message=f"{documents} documents")
    if failed:
        raise RestoreRolledBack(
            f"{listed(failed)} could not be restored; nothing that is live was touched",
            hint="Choose another backup: list_backups elasticsearch",
        )
    events.emit("data", old_data=None, next_steps=[f"delete them when you need them no more: {prefix}…"])
    return Exit.OK


class _Restore:
    """One restore over what is live."""

    def __init__(
        self,
        store: SnapshotStore,
        records: SnapshotRecords,
        manifest: Manifest,
        situation: Situation,
        run_id: str,
        events: Events,
    ) -> None:
        self.store, self.records, self.events, self.run_id = store, records, events, run_id
        self.manifest, self.situation = manifest, situation
        self.safety: Manifest | None = None
        self.phases: dict[str, str] = {}
        self.failed: dict[str, str] = {}

    def run(self) -> Exit:
        """Save, then try out and replace each part."""
        began = time.monotonic()
        if self.situation.live:
            self.safety = self._save()
        scratch = self.store.scratch(self.run_id)
        note = self.records.note(SCRATCH, self.run_id, {"prefix": scratch})
        for part in self.situation.parts:
            self._one(part, scratch)
        self.store.clean_scratch(scratch)
        note.unlink()
        hands = [p for p, phase in self.phases.items() if phase == HANDS]
        self._write(open_=bool(hands))
        done = [p for p, phase in self.phases.items() if phase == DONE]
        self.events.emit(
            "data",
            seconds=round(time.monotonic() - began, 1),
            restored=done,
            old_data=self.safety.name if self.safety else None,
            next_steps=[*self.store.next_steps(done), *self._clearing()],
        )
        if hands:
            raise RestoreNeedsHands(
                f"{listed({p: self.failed[p] for p in hands})} is neither restored nor put back",
                hint=f"What it was is in snapshot {self.safety.name if self.safety else '(none)'}: "
                f"restore_backup {self.store.name} --undo",
            )
        if self.failed:
            others = f"; restored: {', '.join(done[:10])}" if done else ""
            raise RestoreRolledBack(f"{listed(self.failed)}{others}", hint=self._hint())
        return Exit.OK

    def _hint(self) -> str:
        return f"Choose another backup of these indices: list_backups {self.store.name}"

    def _clearing(self) -> list[str]:
        if self.safety is None:
            return []
        return [
            f"What was there before is in the snapshot {self.safety.name}, which no run deletes. Take it back:\n"
            f"restore_backup {self.store.name} --undo"
        ]

    def _save(self) -> Manifest:
        """Take a snapshot of what is live, whole or not at all."""
        prepared = self.store.prepare(self.events, self.situation.live)
        taken = {e.name for e in self.store.kept(self.events)}
        moment = local_time(utc_now(), self.store.config.timezone)
        name = self.store.new_name(moment, taken, SAFETY)
        source = {**prepared.source, "partial": True}
        return record(
            self.store, self.records, name, f"{self.run_id}-before", "manual",
            dataclasses.replace(prepared, source=source), self.events,
        )  # fmt: skip

    def _one(self, part: str, scratch: str) -> None:
        """Restore one part, or leave it, or give it back, as it was."""
        try:
            self.events.step("trial", f"{part}: tried out under another name")
            self.store.try_out(self.manifest, part, scratch, self.events)
            if part in self.situation.live and self.safety is not None:
                # It shares files with older snapshots, a damaged one among them perhaps: it must be able to come back.
                self.store.try_out(self.safety, part, scratch, self.events)
        except HQBackupsError as error:
            self._fail(part, error, "left as it was")
            return
        self.phases[part] = SAVED if part in self.situation.live else MADE
        self._write(open_=True)
        try:
            documents = self.store.replace(self.manifest, part, self.events)
        except BaseException as error:
            self._give_back(part, error)
            if not isinstance(error, HQBackupsError):
                self._write(open_=True)
                raise
            return
        self.phases[part] = DONE
        self._write(open_=True)
        self.events.emit("check", name=part, ok=True, message=f"restored, {documents} documents")

    def _give_back(self, part: str, error: BaseException) -> None:
        cause = error if isinstance(error, HQBackupsError) else Cancelled(by="the operator")
        if part in self.situation.lost:
            self.phases[part] = HANDS
            self._fail(part, cause, "it was red before, and is left as it is")
            return
        try:
            self.store.drop(part)
            if part in self.situation.live and self.safety is not None:
                self.store.replace(self.safety, part, self.events)
        except HQBackupsError as second:
            self.phases[part] = HANDS
            self._fail(part, cause, f"and could not be put back: {second.message}")
        else:
            self.phases[part] = BACK
            self._fail(part, cause, "put back as it was" if part in self.situation.live else "removed again")

    def _fail(self, part: str, error: HQBackupsError, then: str) -> None:
        self.failed[part] = f"{error.message}; {then}"
        self.events.emit("check", name=part, ok=False, message=self.failed[part])

    def _write(self, *, open_: bool) -> None:
        self.records.note(
            NOTE,
            self.run_id,
            {
                "run": self.run_id,
                "snapshot": self.manifest.name,
                "safety": to_plain(self.safety) if self.safety else None,
                "live": list(self.situation.live),
                "lost": list(self.situation.lost),
                "phases": self.phases,
                "open": open_,
            },
        )
