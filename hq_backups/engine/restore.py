"""The verb restore: nothing is touched until everything was found, checked and unpacked beside the target.

Root conducts (services, renames in root's directories); the data work is done in a child as the store's user.
On a host where one user owns everything, that user does both.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import os
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from hq_backups.engine import accounts, outer, unfinished
from hq_backups.engine.as_user import run_as
from hq_backups.engine.catalog import select
from hq_backups.engine.config import Config, Job, to_plain
from hq_backups.engine.errors import Exit, PreflightFailed, RestoreRolledBack, WrongEnvironment
from hq_backups.engine.events import Events
from hq_backups.engine.journal import OPEN, Journal, read_journal
from hq_backups.engine.locks import FileLock, StoreLock
from hq_backups.engine.manifest import Manifest
from hq_backups.engine.plan import Plan, beside, plan_beside, plan_in_place, plan_swap, staging_prefix
from hq_backups.engine.requests import LoadRequest, RestoreRequest, Selection, UndoRequest, UnpackRequest
from hq_backups.engine.snapshots import restore as snapshots
from hq_backups.engine.snapshots.undo import undo as undo_snapshots
from hq_backups.engine.source import compare, handed, opened
from hq_backups.engine.stores import open_store, open_stream
from hq_backups.engine.stores.base import Destination, Part, SnapshotStore, StreamStore
from hq_backups.engine.survey import describe
from hq_backups.engine.swap import Swap, inode
from hq_backups.engine.switchover import switch
from hq_backups.engine.switchover import undo as switch_back
from hq_backups.engine.unfinished import Unfinished
from hq_backups.engine.unpack import load, unpack

_NOTHING_BACK = "there are no data now, as before: restore_backup {} latest"


def restore(config: Config, request: RestoreRequest, run_id: str, events: Events) -> Exit:
    """Plan, and unless only the plan was asked for, restore."""
    kind = open_store(config, request.selection.store)
    if isinstance(kind, SnapshotStore):
        entry, _ = select(kind, request.selection, events)
        return snapshots.restore(kind, entry, request, run_id, events)
    location, manifest, store = _find(config, request, events)
    if request.target_dir is not None:
        return _beside(config, request, manifest, location, store, run_id, events)
    if request.in_place or request.merge:
        return _in_place(config, request, manifest, location, store, run_id, events)
    target = store.target().resolve()
    if _unfinished(target) is not None:
        # Unless one is at work right now: then that is what is said.
        with _locks(store, target, run_id):
            _refuse_unfinished(target)
    plan = plan_swap(request, location, manifest, store, target, run_id, events)
    events.emit("plan", **to_plain(plan))
    if request.plan_only:
        return Exit.OK
    _require_confirmed(request, manifest)
    if plan.connections and not request.disconnect:
        raise PreflightFailed(
            f"clients are connected to the server ({len(plan.connections)}), among them {plan.connections[0]}",
            hint=f"Stop HQ first (commcare-cloud {config.env} downtime start), or add --disconnect.",
        )
    _make_parents(target, plan.owner)
    with _locks(store, target, run_id):
        _refuse_unfinished(target)
        _remove_leftovers(store, target, events)
        began = time.monotonic()
        swap, made, unpacked = _unpack_beside(config, manifest, location, store, plan, run_id, events)
        try:
            switch(
                swap, store.service(manifest), lambda: store.check_serving(manifest, request, events), events
            )
        except PreflightFailed:
            # Nothing was changed: what was unpacked is of no more use.
            made.remove()
            raise
        except RestoreRolledBack as error:
            error.hint = "\n".join(filter(None, [error.hint, *_dropping(store, swap.journal)]))
            raise
        made.forget()
        events.emit(
            "data",
            unpack_seconds=round(unpacked - began, 1),
            downtime_seconds=round(time.monotonic() - unpacked, 1),
            old_data=str(swap.journal.old) if swap.journal.old_inode is not None else None,
            next_steps=[*plan.next_steps, *_clearing(store, swap.journal)],
        )
    return Exit.OK


def _unpack_beside(
    config: Config,
    manifest: Manifest,
    location: Mapping[str, Any],
    store: StreamStore,
    plan: Plan,
    run_id: str,
    events: Events,
) -> tuple[Swap, Unfinished, float]:
    """Unpack and check beside the target; return the swap that is now possible, what was made, and when that was."""
    target, staging = Path(plan.target), Path(str(plan.staging))
    owner = accounts.find(plan.owner)
    # An empty directory was made by hand: its owner and mode say nothing.
    fresh = not target.exists() or not any(target.iterdir())
    spot = Destination(staging, plan.outer, target)
    made = _make_unfinished(plan, target, staging, run_id)
    try:
        _unpack(config, manifest, location, spot, plan.owner, run_id, events)
        swap = Swap(
            target,
            staging,
            run_id,
            store=plan.store,
            artifact=manifest.name,
            owner=(owner.uid, owner.gid) if fresh else None,
            mode=store.tree_mode(manifest) if fresh else None,
        )
        swap.check()
    except BaseException:
        # Where unpacking is loading, a child that was killed leaves its server running.
        store.clean_scratch(staging)
        made.remove()
        raise
    return swap, made, time.monotonic()


def _make_unfinished(plan: Plan, target: Path, staging: Path, run_id: str) -> Unfinished:
    """Make the empty directories that will be filled; return what is to be written down of them."""
    there = tuple(place for place in plan.outer.values() if os.path.lexists(place))
    number, outside = _make_spot(staging, plan.owner), {str(p): outer.UNKNOWN for p in plan.outer.values()}
    made = Unfinished(run_id, target, staging, number, outside, there)
    try:
        made.write()
        for place in plan.outer.values():
            outside[str(place)] = _make_spot(place, plan.owner, there=place in there)
        made.write()
    except BaseException:
        made.remove()
        raise
    return made


def undo(config: Config, request: UndoRequest, run_id: str, events: Events) -> Exit:
    """Put back what the last restore set aside, or finish what a kill left between two renames."""
    store = open_store(config, request.store)
    if isinstance(store, SnapshotStore):
        return undo_snapshots(store, request, run_id, events)
    target = store.target().resolve()
    planned = Swap.load(target).journal
    events.emit("plan", undo=True, store=store.name, env=config.env, **_undo_facts(planned))
    if request.plan_only:
        return Exit.OK
    with _locks(store, target, run_id):
        if switch_back(target, store.service(None), lambda: store.check_serving(None, None, events), events):
            journal = Swap.load(target).journal
            steps = (
                store.next_steps() if journal.old_inode is not None else [_NOTHING_BACK.format(store.name)]
            )
            steps += _dropping(store, journal)
            events.emit("data", failed_data=str(journal.failed), old_data=None, next_steps=steps)
        _remove_leftovers(store, target, events)
    return Exit.OK


def _clearing(store: StreamStore, journal: Journal) -> list[str]:
    """Return what an operator deletes when the restored data are as they should be."""
    if journal.old_inode is None:
        return []
    return [f"delete the old data when you are sure:\n{_all_of(store, journal.old)}"]


def _dropping(store: StreamStore, journal: Journal) -> list[str]:
    """Return what an operator deletes when the data that were taken back are of no more use."""
    pattern = f"{glob.escape(str(journal.failed))}*"
    found = [Path(name) for name in glob.glob(pattern) if inode(Path(name)) == journal.new_inode]
    return [f"delete what was taken back when you need it no more:\n{_all_of(store, p)}" for p in found]


def _all_of(store: StreamStore, tree: Path) -> str:
    """List a data directory and what belongs to it elsewhere, a line each, as a shell takes them."""
    return "\n".join(shlex.quote(str(path)) for path in (tree, *store.outside(tree)))


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


def _unfinished(target: Path) -> Journal | None:
    """Return the journal of a restore of a target that has begun and not come to its end."""
    journal = read_journal(target)
    return journal if journal is not None and journal.phase in OPEN else None


def _refuse_unfinished(target: Path) -> None:
    """Refuse a target whose last restore was killed: it must be undone first."""
    journal = _unfinished(target)
    if journal is not None:
        raise PreflightFailed(
            f"the restore {journal.run} of {target} was interrupted ({journal.phase})",
            hint=f"Put the old data back first: restore_backup {journal.store} --undo",
        )


def _find(
    config: Config, request: RestoreRequest, events: Events
) -> tuple[Mapping[str, Any], Manifest, StreamStore]:
    """Return what is restored and where it lies; of several artifacts, what they are together."""
    location, manifest, store = _find_one(config, request, request.selection, events)
    if not request.also:
        return location, manifest, store
    parts = [Part(manifest, location)]
    for name in request.also:
        selection = dataclasses.replace(request.selection, name=name, version_id=None)
        place, other, _ = _find_one(config, request, selection, events)
        parts.append(Part(other, place))
    return location, store.unite(parts), store


def _find_one(
    config: Config, request: RestoreRequest, selection: Selection, events: Events
) -> tuple[Mapping[str, Any], Manifest, StreamStore]:
    entry, location = select(open_store(config, selection.store), selection, events)
    manifest = describe(config, entry, location, events, request.surveyed)
    if manifest.env != config.env and request.from_env != manifest.env:
        raise WrongEnvironment(
            theirs=manifest.env, ours=config.env, hint=f"When you mean it: --from-env {manifest.env}"
        )
    return location, manifest, open_stream(config, manifest.store, manifest.mode)


def _require_confirmed(request: RestoreRequest, manifest: Manifest) -> None:
    if request.expected_sha256 not in (None, manifest.sha256):
        raise PreflightFailed(
            "another backup is meant by that name than the one that was confirmed",
            hint="Run the command again and look at its plan.",
        )


def _in_place(
    config: Config,
    request: RestoreRequest,
    manifest: Manifest,
    location: Mapping[str, Any],
    store: StreamStore,
    run_id: str,
    events: Events,
) -> Exit:
    """Load into live data. Nothing can be put back, so the whole artifact is read and checked first."""
    plan = plan_in_place(request, location, manifest, store, events)
    events.emit("plan", **to_plain(plan))
    if request.plan_only:
        return Exit.OK
    _require_confirmed(request, manifest)
    events.step("verify", f"reading {manifest.name} to its end before anything is changed")
    with opened(store, location, manifest, events) as plain:
        store.check_load(plain, manifest, request, events)
        compare(plain.digest(), manifest)
    events.step("load", f"loading {manifest.name} into {plan.target}")
    owner = store.loader()
    with _store_lock(store, run_id):
        if owner is None or os.geteuid() != 0 or accounts.find(owner).is_me:
            load(config, LoadRequest(to_plain(manifest), dict(location), request), events)
        else:
            with handed(location, owner) as (there, fds):
                work = LoadRequest(to_plain(manifest), dict(there), request)
                run_as(Job("load", config, to_plain(work), run_id), owner, events, fds)
    events.emit("data", old_data=None, next_steps=list(plan.next_steps))
    return Exit.OK


def _beside(
    config: Config,
    request: RestoreRequest,
    manifest: Manifest,
    location: Mapping[str, Any],
    store: StreamStore,
    run_id: str,
    events: Events,
) -> Exit:
    """Unpack into a directory of the operator's; nothing that runs is touched."""
    plan = plan_beside(request, location, manifest, store, events)
    events.emit("plan", **to_plain(plan))
    if request.plan_only:
        return Exit.OK
    target = Path(plan.target)
    spot = Destination(target, plan.outer, only=request.only)
    there, outside = target.exists(), dict[Path, int]()
    try:
        _make_spot(spot.tree, plan.owner, there=there)
        for place in spot.outer.values():
            outside[place] = _make_spot(place, plan.owner)
        _unpack(config, manifest, location, spot, plan.owner, run_id, events)
    except BaseException:
        store.clean_scratch(target)
        shutil.rmtree(target, ignore_errors=True)
        outer.remove(outside)
        with contextlib.suppress(OSError):
            beside(target).rmdir()
        if there:
            target.mkdir(mode=0o700)
        raise
    os.sync()
    apart = (
        f", its tablespaces in {beside(target)} (which it links to: leave them there)" if plan.outer else ""
    )
    events.step("unpack", f"{manifest.name} lies unpacked in {target}{apart}; nothing that runs was touched")
    return Exit.OK


def _unpack(
    config: Config,
    manifest: Manifest,
    location: Mapping[str, Any],
    spot: Destination,
    owner: str,
    run_id: str,
    events: Events,
) -> None:
    """Do the data work as the store's user."""
    events.step("unpack", f"unpacking {manifest.name}")
    places = (spot.tree, spot.outer, spot.replaces, spot.only)
    if os.geteuid() != 0 or accounts.find(owner).is_me:
        unpack(config, UnpackRequest(to_plain(manifest), dict(location), *places), events)
        return
    with handed(location, owner) as (there, fds):
        request = UnpackRequest(to_plain(manifest), dict(there), *places)
        run_as(Job("unpack", config, to_plain(request), run_id), owner, events, fds)


def _make_spot(directory: Path, owner: str, *, there: bool = False) -> int:
    """Make an empty directory that only ``owner`` may enter, or take one that is there; return its inode number."""
    _make_parents(directory, owner)
    if not there:
        directory.mkdir(mode=0o700)
    # Whoever may write above it could have put a link there: what is given away is what was looked at.
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.listdir(fd):
            raise PreflightFailed(f"{directory} is no longer empty", hint="Run the command again.")
        if os.geteuid() == 0:
            account = accounts.find(owner)
            os.fchown(fd, account.uid, account.gid)
        os.fchmod(fd, 0o700)
        return os.fstat(fd).st_ino
    finally:
        os.close(fd)


def _make_parents(target: Path, owner: str) -> None:
    """Make what is missing above a target, as the store's user would have it."""
    missing = [p for p in (target.parent, *target.parent.parents) if not p.exists()]
    for directory in reversed(missing):
        directory.mkdir(mode=0o755)
        if os.geteuid() == 0:
            account = accounts.find(owner)
            os.chown(directory, account.uid, account.gid)


@contextmanager
def _locks(store: StreamStore, target: Path, run_id: str) -> Iterator[None]:
    """Keep other restores off the target, and backups off the store."""
    with contextlib.ExitStack() as stack:
        if target.parent.is_dir():
            lock = target.parent / f".{target.name}.hq_backups.lock"
            stack.enter_context(FileLock(lock, run_id, "restore"))
        stack.enter_context(_store_lock(store, run_id))
        yield


def _store_lock(store: StreamStore, run_id: str) -> AbstractContextManager[object]:
    """Keep backups off the store, where this host makes any."""
    if not store.settings.backup_dir.is_dir():
        return contextlib.nullcontext()
    return StoreLock(store.settings.backup_dir, run_id, "restore")


def _remove_leftovers(store: StreamStore, target: Path, events: Events) -> None:
    """Remove the staging directories of restores that were killed, and what runs on them. Only under the lock."""
    if not target.parent.is_dir():
        return
    for made in unfinished.left(target):
        if not made.is_unused():
            made.forget()
            continue
        store.clean_scratch(made.staging)
        made.remove()
        gone = ", ".join(str(path) for path in (made.staging, *made.outer.values()))
        events.step("recover", f"removed {gone}, left by a restore that died")
    for entry in list(os.scandir(target.parent)):
        if entry.name.startswith(staging_prefix(target)) and entry.is_dir(follow_symlinks=False):
            store.clean_scratch(Path(entry.path))
            shutil.rmtree(entry.path, ignore_errors=True)
            events.step("recover", f"removed {entry.path}, left by a restore that died")
