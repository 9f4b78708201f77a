"""Who files are to belong to, as chown(1) spells it: ``cchq``, ``cchq:nfs``, ``1000:1500``."""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
from dataclasses import dataclass
from pathlib import Path

from hq_backups.engine.errors import WrongUser


@dataclass(frozen=True)
class Account:
    """A user with the group that his new files get; the host need not have a name for either."""

    spelt: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    """All the groups that the host gives him, and that one."""
    home: str = "/"

    @property
    def is_me(self) -> bool:
        """Tell whether this process is that user and, where a group is named, makes files of it."""
        return self.uid == os.geteuid() and (":" not in self.spelt or self.gid == os.getegid())


def find(spelt: str) -> Account:
    """Look an owner up; raises WrongUser for a name that the host does not know."""
    user, colon, group = spelt.partition(":")
    entry = _user(user)
    groups: list[int] = []
    if entry is None:
        uid, gid, home = int(user), int(user), "/"
    else:
        uid, gid, home = entry.pw_uid, entry.pw_gid, entry.pw_dir
        groups = os.getgrouplist(entry.pw_name, gid)
    if colon:
        gid = _group(group)
    return Account(spelt, uid, gid, tuple(sorted({*groups, gid})), home)


def me() -> str:
    """Return who this process is, by name where the host has one."""
    with contextlib.suppress(KeyError):
        return pwd.getpwuid(os.geteuid()).pw_name
    return str(os.geteuid())


def _user(name: str) -> pwd.struct_passwd | None:
    """Return a user's entry; None of a number that has none."""
    try:
        return pwd.getpwuid(int(name)) if name.isdecimal() else pwd.getpwnam(name)
    except (KeyError, OverflowError):
        if name.isdecimal() and int(name) < 1 << 32:
            return None
        raise WrongUser(
            f"there is no user {name} on this host", hint="Correct the setting that names it."
        ) from None


def _group(name: str) -> int:
    if name.isdecimal() and int(name) < 1 << 32:
        return int(name)
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise WrongUser(
            f"there is no group {name} on this host", hint="Correct the setting that names it."
        ) from None


def owner_of(directory: Path | None, usual: str) -> str:
    """Return who owns a data directory, else its parent, unless that is root; else the ``usual`` user, else us."""
    for place in (directory, directory.parent if directory else None):
        with contextlib.suppress(OSError, KeyError):
            if place is not None and (uid := place.stat().st_uid) != 0:
                return pwd.getpwuid(uid).pw_name
    with contextlib.suppress(KeyError):
        return pwd.getpwnam(usual).pw_name
    return pwd.getpwuid(os.geteuid()).pw_name
