"""One run at a time: locks that the kernel frees when their holder dies, and that say who holds them.

flock(2) on the directory's own descriptor works across users: no file that one user makes and another cannot
open. A file of its own is for what only root locks: the target of a restore.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import pwd
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from hq_backups.engine.errors import Locked, PreflightFailed
from hq_backups.engine.events import format_utc, utc_now

HOLDER_NAME = ".hq_backups.holder.json"
FALLBACK_NAME = ".hq_backups.lock"
UNKNOWN = "an unknown process"
_MAX_HOLDER = 4096
_OPEN = os.O_CLOEXEC | os.O_NOFOLLOW


class StoreLock:
    """Holds one store's backup directory for one run; a second one raises Locked."""

    def __init__(self, directory: Path, run: str, what: str) -> None:
        """Lock ``directory``, which must exist; ``what`` is the verb."""
        self.directory, self.run, self.what = directory, run, what
        self._fds: list[int] = []

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the lock or raise Locked with its holder."""
        fd = _open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        self._fds.append(fd)
        try:
            try:
                locked = _try_lock(fd)
            except OSError as error:
                # NFS makes flock a lock that needs a writable descriptor (flock(2), "NFS details").
                if error.errno not in (errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP):
                    raise
                self._fds.append(_open_fallback(self.directory, fd))
                locked = _try_lock(self._fds[-1])
            if not locked:
                raise Locked(path=self.directory, holder=describe_holder(self.directory / HOLDER_NAME))
        except BaseException:
            self._close()
            raise
        with contextlib.suppress(OSError):  # a full or foreign directory still locks
            self._publish()

    def release(self) -> None:
        """Free the lock; may be called again."""
        if self._fds:
            with contextlib.suppress(OSError):
                (self.directory / HOLDER_NAME).unlink()
            self._close()

    def _publish(self) -> None:
        final, fresh = self.directory / HOLDER_NAME, self.directory / f"{HOLDER_NAME}.{os.getpid()}"
        final.unlink(missing_ok=True)  # a killed run's facts are not ours, even when ours cannot be written
        fresh.unlink(missing_ok=True)
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _OPEN, 0o644)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(_facts(self.run, self.what))
            fresh.rename(final)
        except OSError:
            fresh.unlink(missing_ok=True)
            raise

    def _close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())


class FileLock:
    """Holds one file made for this; it stays behind, for removing it would let two runs in."""

    def __init__(self, path: Path, run: str, what: str) -> None:
        """Lock ``path``, made 0600 when it is missing."""
        self.path, self.run, self.what = path, run, what
        self._fd = -1

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the lock or raise Locked with its holder."""
        fd = _open(self.path, os.O_RDWR | os.O_CREAT)
        try:
            if not _try_lock(fd):
                raise Locked(path=self.path, holder=describe_holder(self.path))
            with contextlib.suppress(OSError):
                os.ftruncate(fd, 0)
                os.pwrite(fd, _facts(self.run, self.what), 0)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd

    def release(self) -> None:
        """Free the lock; may be called again."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, 0)
            os.close(self._fd)
            self._fd = -1


def describe_holder(path: Path) -> str:
    """Say who wrote ``path``; facts that cannot be read, or of a process that is gone, are nobody's."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | _OPEN)
        with os.fdopen(fd, "rb") as file:
            facts: Any = json.loads(file.read(_MAX_HOLDER))
        pid, run, verb, user = facts["pid"], facts["run"], facts["verb"], facts["user"]
        since = datetime.fromisoformat(facts["since"]).astimezone(UTC)
        if process_started(pid) != facts["started"]:
            return UNKNOWN
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return UNKNOWN
    who = f"run {_clean(run)} ({_clean(verb)}), pid {pid} of user {_clean(user)}"
    return f"{who}, since {since:%Y-%m-%d %H:%M:%S} UTC"


def process_started(pid: int | str) -> int | None:
    """Return when a process began, in ticks since boot, which tells it from a later one of the same pid."""
    try:
        stat = Path(f"/proc/{int(pid)}/stat").read_bytes()
    except (OSError, ValueError):
        return None
    fields = stat.rpartition(b")")[2].split()
    # proc(5): field 3 is the state, field 22 the start; a zombie holds nothing.
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def _facts(run: str, verb: str) -> bytes:
    facts = {
        "pid": os.getpid(),
        "started": process_started(os.getpid()),
        "run": run,
        "verb": verb,
        "since": format_utc(utc_now()),
        "user": user_name(),
    }
    return json.dumps(facts).encode() + b"\n"


def user_name() -> str:
    """Return the name of this process's user, or its number where it has none."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def _clean(text: object) -> str:
    return re.sub(r"[^ -~]", "?", str(text))[:200]


def _open(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | _OPEN, 0o600)
    except OSError as error:
        raise PreflightFailed(
            f"{path} cannot be locked: {error.strerror}",
            hint=f"Look at it (`ls -ld {path}`): it must exist, be readable, and be no symbolic link.",
        ) from error


def _open_fallback(directory: Path, directory_fd: int) -> int:
    fd = _open(directory / FALLBACK_NAME, os.O_RDWR | os.O_CREAT)
    if os.geteuid() == 0:
        owner = os.fstat(directory_fd)
        os.fchown(fd, owner.st_uid, owner.st_gid)
    return fd


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
