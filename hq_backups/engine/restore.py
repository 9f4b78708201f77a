"""The verb restore: nothing is touched until everything was found, checked and unpacked beside the target.

Root conducts (services, renames in root's directories); the data work is done in a child as the store's user.
On a host where one user owns everything, that user does both.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hq_backups.engine import space
from hq_backups.engine.as_user import run_as
from hq_backups.engine.catalog import Entry, select
from hq_backups.engine.config import Config, Job, to_plain
from hq_backups.engine.errors import Exit, NotBuiltYet, PreflightFailed, WrongEnvironment
from hq_backups.engine.events import Events
from hq_backups.engine.journal import OPEN, Journal, read_journal
from hq_backups.engine.locks import FileLock, StoreLock
from hq_backups.engine.manifest import Manifest
from hq_backups.engine.requests import RestoreRequest, UndoRequest, UnpackRequest
from hq_backups.engine.stores import open_store
from hq_backups.engine.stores.base import Store
from hq_backups.engine.swap import Swap
from hq_backups.engine.switchover import switch
from hq_backups.engine.switchover import undo as switch_back
from hq_backups.engine.unpack import unpack

MARGIN = 64 << 20
"""Bytes that stay free beside what is unpacked."""
_NOTHING_BACK = "there are no data now, as before: restore_backup {} latest"


@dataclass(frozen=True)
class Plan:
    """What a restore will do, shown before it does anything."""

    store: str
    env: str
    name: str
    run: str
    sha256: str
    from_env: str
    from_host: str
    taken_at: str
    size: int
    plain_size: int
    source: str
    """Where the artifact is read from."""
    target: str
    staging: str | None
    set_aside: str | None
    """Where the data of now will be kept; None when there is none."""
    owner: str
    free: int
    needed: int
    facts: Mapping[str, Any]
    next_steps: tuple[str, ...]

    @property
    def connections(self) -> list[str]:
        """Return the clients that are connected to the server of now."""
        return list(self.facts.get("connections", ()))


def restore(config: Config, request: RestoreRequest, run_id: str, events: Events) -> Exit:
    """Plan, and unless only the plan was asked for, restore."""
    entry, location, manifest, store = _find(config, request, events)
    if request.target_dir is not None:
        return _beside(config, request, manifest, location, store, run_id, events)
    target = store.target().resolve()
    plan = _plan(request, entry, location, manifest, store, target, run_id, events)
    events.emit("plan", **to_plain(plan))
    if request.plan_only:
        return Exit.OK
    if request.expected_sha256 not in (None, manifest.sha256):
        raise PreflightFailed(
            "another backup is meant by that name than the one that was confirmed",
            hint="Run the command again and look at its plan.",
        )
    if plan.connections and not request.disconnect:
        raise PreflightFailed(
            f"clients are connected to the server ({len(plan.connections)}), among them {plan.connections[0]}",
            hint=f"Stop HQ first (commcare-cloud {config.env} downtime start), or add --disconnect.",
        )
    _make_parents(target, plan.owner)
    with _locks(store, target, run_id):
        _refuse_unfinished(target)
        _remove_leftovers(target, events)
        began = time.monotonic()
        swap, unpacked = _unpack_beside(config, manifest, location, plan, run_id, events)
        try:
            switch(swap, store.service(manifest), lambda: store.check_serving(manifest, events), events)
        except PreflightFailed:
            # Nothing was changed: what was unpacked is of no more use.
            shutil.rmtree(swap.staging, ignore_errors=True)
            raise
        events.emit(
            "data",
            unpack_seconds=round(unpacked - began, 1),
            downtime_seconds=round(time.monotonic() - unpacked, 1),
            old_data=str(swap.journal.old) if swap.journal.old_inode is not None else None,
            next_steps=[*plan.next_steps, *_clearing(swap.journal)],
        )
    return Exit.OK


def _unpack_beside(
    config: Config, manifest: Manifest, location: Mapping[str, Any], plan: Plan, run_id: str, events: Events
) -> tuple[Swap, float]:
    """Unpack and check beside the target; return the swap that is now possible, and when that was."""
    target, staging = Path(plan.target), Path(str(plan.staging))
    owner = pwd.getpwnam(plan.owner)
    # An empty directory was made by hand: its owner and mode say nothing.
    fresh = not target.exists() or not any(target.iterdir())
    try:
        _make(staging, plan.owner)
        _unpack(config, manifest, location, staging, plan.owner, run_id, events)
        swap = Swap(
            target,
            staging,
            run_id,
            store=plan.store,
            artifact=manifest.name,
            owner=(owner.pw_uid, owner.pw_gid) if fresh else None,
            mode=0o700 if fresh else None,
        )
        swap.check()
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return swap, time.monotonic()


def undo(config: Config, request: UndoRequest, run_id: str, events: Events) -> Exit:
    """Put back what the last restore set aside, or finish what a kill left between two renames."""
    store = open_store(config, request.store)
    target = store.target().resolve()
    planned = Swap.load(target).journal
    events.emit("plan", undo=True, store=store.name, env=config.env, **_undo_facts(planned))
    if request.plan_only:
        return Exit.OK
    with _locks(store, target, run_id):
        if switch_back(target, store.service(None), lambda: store.check_serving(None, events), events):
            journal = Swap.load(target).journal
            steps = (
                store.next_steps() if journal.old_inode is not None else [_NOTHING_BACK.format(store.name)]
            )
            events.emit("data", failed_data=str(journal.failed), old_data=None, next_steps=steps)
        _remove_leftovers(target, events)
    return Exit.OK


def _clearing(journal: Journal) -> list[str]:
    return [f"delete the old data when you are sure: {journal.old}"] if journal.old_inode is not None else []


def _undo_facts(journal: Journal) -> dict[str, Any]:
    known = {
        "name": journal.artifact,
        "run": journal.run,
        "phase": journal.phase,
        "target": str(journal.target),
    }
    if journal.phase in ("planned", "rolled_back", "undone"):
        return {**known, "afterwards": "as now: that restore has been put back, or changed nothing"}
    return {
        **known,
        "old_data": str(journal.old) if journal.old_inode is not None else None,
        "failed_data": str(journal.failed),
        "afterwards": None
        if journal.old_inode is not None
        else "no data, and the server stays down: there were no data before this restore",
    }


def _refuse_unfinished(target: Path) -> None:
    """Refuse a target whose last restore was killed: it must be undone first."""
    journal = read_journal(target)
    if journal is not None and journal.phase in OPEN:
        raise PreflightFailed(
            f"the restore {journal.run} of {target} was interrupted ({journal.phase})",
            hint=f"Put the old data back first: restore_backup {journal.store} --undo",
        )


def _find(
    config: Config, request: RestoreRequest, events: Events
) -> tuple[Entry, Mapping[str, Any], Manifest, Store]:
    entry, location = select(open_store(config, request.selection.store), request.selection, events)
    manifest = entry.manifest
    if manifest is None:
        raise NotBuiltYet(
            f"{entry.name} has no manifest: archives of the old scripts cannot be restored yet in this release",
            hint="Choose a managed backup: list_backups",
        )
    if manifest.env != config.env and request.from_env != manifest.env:
        raise WrongEnvironment(
            theirs=manifest.env, ours=config.env, hint=f"When you mean it: --from-env {manifest.env}"
        )
    return entry, location, manifest, open_store(config, manifest.store, manifest.mode)


def _plan(
    request: RestoreRequest,
    entry: Entry,
    location: Mapping[str, Any],
    manifest: Manifest,
    store: Store,
    target: Path,
    run_id: str,
    events: Events,
) -> Plan:
    _refuse_unfinished(target)
    if space.is_mount_point(target):
        raise PreflightFailed(
            f"{target} is a mount point: it cannot be renamed, and so not be put back if anything fails",
            hint="Keep the data in a directory below it, or restore with --target-dir and move the data by hand.",
        )
    owner = store.owner()
    if os.geteuid() != 0 and pwd.getpwuid(os.geteuid()).pw_name != owner:
        raise PreflightFailed(
            f"the data belongs to user {owner}, and only root can restore it",
            hint="Run the same command as root (sudo).",
        )
    facts = store.check_restore(manifest, events, in_place=True)
    parent = space.existing(request.staging_dir or target.parent)
    if not space.same_filesystem(parent, space.existing(target.parent)):
        raise PreflightFailed(
            f"{parent} is on another filesystem than {target.parent}",
            hint="Leave --staging-dir out, or choose a directory on the same filesystem.",
        )
    needed = manifest.plain_size + manifest.plain_size // 50 + MARGIN
    space.require(parent, needed, "unpack beside the target", "Free space there; nothing was changed.")
    staging = (request.staging_dir or target.parent) / f"{_staging_prefix(target)}{run_id}"
    return Plan(
        **_about(store, manifest, location),
        target=str(target),
        staging=str(staging),
        set_aside=str(target.with_name(f"{target.name}.before-{run_id}"))
        if os.path.lexists(target)
        else None,
        owner=owner,
        free=space.free_bytes(parent),
        needed=needed,
        facts=facts,
        next_steps=tuple(store.next_steps()),
    )


def _about(store: Store, manifest: Manifest, location: Mapping[str, Any]) -> dict[str, Any]:
    """Return what every plan says of the artifact."""
    return {
        "store": store.name,
        "env": store.config.env,
        "name": manifest.name,
        "run": manifest.run,
        "sha256": manifest.sha256,
        "from_env": manifest.env,
        "from_host": manifest.host,
        "taken_at": manifest.started_at,
        "size": manifest.size,
        "plain_size": manifest.plain_size,
        "source": _where(location),
    }


def _staging_prefix(target: Path) -> str:
    return f".{target.name}.hq_backups-staging-"


def _where(location: Mapping[str, Any]) -> str:
    if location["kind"] == "local":
        return str(location["path"])
    version = f" (version {location['version_id']})" if location.get("version_id") else ""
    return f"s3://{location['bucket']}/{location['key']}{version}"


def _beside(
    config: Config,
    request: RestoreRequest,
    manifest: Manifest,
    location: Mapping[str, Any],
    store: Store,
    run_id: str,
    events: Events,
) -> Exit:
    """Unpack into a directory of the operator's; nothing that runs is touched."""
    target = Path(str(request.target_dir)).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise PreflightFailed(
            f"{target} is not an empty directory", hint="Name another one with --target-dir."
        )
    facts = store.check_restore(manifest, events, in_place=False)
    needed = manifest.plain_size + manifest.plain_size // 50
    space.require(space.existing(target), needed, "the unpacked data", "Name a place with more room.")
    events.emit(
        "plan",
        **to_plain(
            Plan(
                **_about(store, manifest, location),
                target=str(target),
                staging=None,
                set_aside=None,
                owner=store.owner(),
                free=space.free_bytes(space.existing(target)),
                needed=needed,
                facts=facts,
                next_steps=(),
            )
        ),
    )
    if request.plan_only:
        return Exit.OK
    there = target.exists()
    owner = store.owner() if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
    try:
        _make(target, owner)
        _unpack(config, manifest, location, target, owner, run_id, events)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        if there:
            target.mkdir(mode=0o700)
        raise
    os.sync()
    events.step("unpack", f"{manifest.name} lies unpacked in {target}; nothing that runs was touched")
    return Exit.OK


def _unpack(
    config: Config,
    manifest: Manifest,
    location: Mapping[str, Any],
    target: Path,
    owner: str,
    run_id: str,
    events: Events,
) -> None:
    """Do the data work as the store's user."""
    events.step("unpack", f"unpacking {manifest.name}")
    request = UnpackRequest(to_plain(manifest), dict(location), target)
    if os.geteuid() == 0 and owner != "root":
        run_as(Job("unpack", config, to_plain(request), run_id), owner, events)
    else:
        unpack(config, request, events)


def _make(directory: Path, owner: str) -> None:
    """Make an empty directory that only ``owner`` may enter."""
    directory.mkdir(mode=0o700, exist_ok=True)
    if os.geteuid() == 0:
        entry = pwd.getpwnam(owner)
        os.chown(directory, entry.pw_uid, entry.pw_gid)
    os.chmod(directory, 0o700)


def _make_parents(target: Path, owner: str) -> None:
    """Make what is missing above a target, as the store's user would have it."""
    missing = [p for p in (target.parent, *target.parent.parents) if not p.exists()]
    for directory in reversed(missing):
        directory.mkdir(mode=0o755)
        if os.geteuid() == 0:
            entry = pwd.getpwnam(owner)
            os.chown(directory, entry.pw_uid, entry.pw_gid)


@contextmanager
def _locks(store: Store, target: Path, run_id: str) -> Iterator[None]:
    """Keep other restores off the target, and backups off the store."""
    with contextlib.ExitStack() as stack:
        if target.parent.is_dir():
            lock = target.parent / f".{target.name}.hq_backups.lock"
            stack.enter_context(FileLock(lock, run_id, "restore"))
        if store.settings.backup_dir.is_dir():
            stack.enter_context(StoreLock(store.settings.backup_dir, run_id, "restore"))
        yield


def _remove_leftovers(target: Path, events: Events) -> None:
    """Remove the staging directories of restores that were killed. Only under the lock."""
    if not target.parent.is_dir():
        return
    for entry in list(os.scandir(target.parent)):
        if entry.name.startswith(_staging_prefix(target)) and entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
            events.step("recover", f"removed {entry.path}, left by a restore that died")
