"""Who a job must run as, and whether what root would run can be trusted."""

from __future__ import annotations

import os
import pwd
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from hq_backups.engine.config import Job, StoreConfig
from hq_backups.engine.errors import UsageError, WrongUser

USUAL_NAMES = {"postgres": "postgres", "couch": "couchdb"}
ROOT_VERBS = ("restore", "undo")


def me() -> str:
    """Return the name of this process's user."""
    return _name(os.geteuid())


def store_user(config: StoreConfig) -> str:
    """Return the user who may read the store's files and write its backups."""
    if config.os_user:
        return config.os_user
    if config.data_dir is not None:
        owner = _owner(config.data_dir)
        if owner is None:
            # The directory is gone, or its parent hides it: whoever owns the place still owns the store,
            # unless that is root, who owns every mount point and says nothing by it.
            owner = _not_root(_owner_above(config.data_dir))
        if owner is not None:
            return owner
    owner = _owner(config.backup_dir) or _not_root(_owner_above(config.backup_dir))
    if owner is not None:
        return owner
    usual = USUAL_NAMES.get(config.store)
    return usual if usual is not None and exists(usual) else me()


def user_for(job: Job) -> str:
    """Return the user that ``job`` must run as."""
    request = job.request
    selection = request.get("selection") or {}
    names = (
        [request.get("store") or selection.get("store")] if job.verb != "catalog" else request.get("stores")
    )
    stores = [job.config.store(str(name)) for name in names or job.config.stores]
    if job.verb == "catalog" and request.get("source") == "s3":
        return me()
    users = {store_user(store) for store in stores} or {me()}
    if len(users) > 1:
        raise UsageError(f"one job cannot run as several users: {', '.join(sorted(users))}")
    (user,) = users
    if (
        job.verb in ROOT_VERBS
        and not request.get("target_dir")
        and not all(_mine_to_swap(s, user) for s in stores)
    ):
        return "root"
    return user


def _mine_to_swap(config: StoreConfig, user: str) -> bool:
    """Tell whether one user owns everything that a restore renames, as on a developer's machine."""
    if config.data_dir is None:
        # Nothing on this host is renamed.
        return True
    if user != me():
        return False
    return os.access(config.data_dir.resolve().parent, os.W_OK | os.X_OK)


def exists(user: str) -> bool:
    """Tell whether this host knows ``user``."""
    try:
        pwd.getpwnam(user)
    except KeyError:
        return False
    return True


def refuse_writable(paths: Iterable[Path]) -> None:
    """Raise WrongUser when anybody but root and one owner could change what root is about to run."""
    owners: set[int] = set()
    seen: set[Path] = set()
    for path in paths:
        for part in _chain(path):
            if part in seen:
                continue
            seen.add(part)
            info = part.lstat()
            if stat.S_ISLNK(info.st_mode):
                continue
            sticky = stat.S_ISDIR(info.st_mode) and info.st_mode & stat.S_ISVTX
            if info.st_mode & 0o022 and not sticky:
                raise WrongUser(
                    f"{part} can be changed by its group or by anybody, so it is not run as root",
                    hint=f"Take that right away (chmod go-w {part}), then repeat the command.",
                )
            if info.st_uid:
                owners.add(info.st_uid)
    if len(owners) > 1:
        names = ", ".join(sorted(_name(uid) for uid in owners))
        raise WrongUser(
            f"the program's files belong to several users ({names}), so they are not run as root",
            hint="Give them all to root or to the one user who deploys.",
        )


def program_files(package: Path, python: Path) -> Iterator[Path]:
    """Yield what a process of ``python`` running the engine of ``package`` loads first."""
    yield python
    yield package
    for directory, _, files in os.walk(package):
        yield Path(directory)
        yield from (Path(directory, name) for name in files if name.endswith((".py", ".so", ".pyc")))


def _chain(path: Path) -> Iterator[Path]:
    """Yield ``path``, its parents, and the same of every link on the way."""
    todo, seen = [Path(os.path.abspath(path))], set()
    while todo:
        part = todo.pop()
        if part in seen:
            continue
        seen.add(part)
        yield part
        if part.is_symlink():
            todo.append(Path(os.path.abspath(part.parent.resolve() / part.readlink())))
        if part != part.parent:
            todo.append(part.parent)


def _owner(path: Path) -> str | None:
    try:
        return _name(path.stat().st_uid)
    except OSError:
        return None


def _owner_above(path: Path) -> str | None:
    return next((owner for parent in path.parents if (owner := _owner(parent)) is not None), None)


def _not_root(owner: str | None) -> str | None:
    return None if owner == "root" else owner


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
