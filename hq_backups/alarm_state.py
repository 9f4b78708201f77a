"""What is remembered of alarms between two runs: one JSON file in the state directory, never the database.

Nothing here stops anybody: a file that cannot be used counts as empty, a directory that cannot be written
leaves nothing remembered, and both are said.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from hq_backups.engine.events import format_utc, parse_utc
from hq_backups.problems import Problem

NAME = "alarms.json"
VERSION = 1
MAX_BYTES = 4 << 20
LOCK_SECONDS = 10.0


@dataclass(frozen=True)
class Alarm:
    """A problem that is, or was, and of which somebody is or will be told."""

    problem: Problem
    since: datetime
    told_at: datetime | None = None
    """When it was mailed last; None: nobody has been told."""
    over_at: datetime | None = None
    """When it ended, while nobody has been told so."""
    claimed_until: datetime | None = None
    """Until then somebody is about to send it."""


@dataclass(frozen=True)
class Outcome:
    """How the last run of a verb on a store ended on this host."""

    at: datetime
    problem: Problem | None = None


@dataclass(frozen=True)
class Good:
    """The newest good backup of a type that this host made."""

    at: datetime
    name: str
    size: int | None = None


@dataclass(frozen=True)
class Checked:
    """What the last check of a store found, warnings included."""

    at: datetime
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True)
class Undelivered:
    """Since when and why mails cannot be sent."""

    since: datetime
    at: datetime
    why: str


@dataclass(frozen=True)
class State:
    """Everything that is remembered."""

    since: datetime | None = None
    """When this file was begun."""
    alarms: Mapping[str, Alarm] = field(default_factory=dict)
    runs: Mapping[str, Outcome] = field(default_factory=dict)
    """By ``store/verb``."""
    good: Mapping[str, Good] = field(default_factory=dict)
    """By ``store/type``."""
    checks: Mapping[str, Checked] = field(default_factory=dict)
    """By store."""
    undelivered: Undelivered | None = None

    def last_good(self, store: str) -> Good | None:
        """Return the newest good backup of a store, of whatever type."""
        mine = [good for key, good in self.good.items() if key.startswith(f"{store}/")]
        return max(mine, key=lambda good: good.at, default=None)

    def to_plain(self) -> dict[str, Any]:
        """Return plain data."""
        return {"version": VERSION, **{name: _plain(getattr(self, name)) for name in _FIELDS}}

    @classmethod
    def from_plain(cls, data: Any) -> State:
        """Read plain data; raises ValueError when anything in them is not as it should be."""
        try:
            if data["version"] != VERSION:
                raise ValueError(f"it is of version {data['version']}, this hq_backups knows {VERSION}")
            undelivered = data["undelivered"]
            return cls(
                _time(data["since"]),
                {key: _alarm(each) for key, each in data["alarms"].items()},
                {key: Outcome(_moment(o["at"]), _maybe(o["problem"])) for key, o in data["runs"].items()},
                {
                    key: Good(_moment(g["at"]), _text(g["name"]), _size(g["size"]))
                    for key, g in data["good"].items()
                },
                {
                    key: Checked(_moment(c["at"]), tuple(_problem(p) for p in c["problems"]))
                    for key, c in data["checks"].items()
                },
                None
                if undelivered is None
                else Undelivered(
                    _moment(undelivered["since"]), _moment(undelivered["at"]), _text(undelivered["why"])
                ),
            )
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"it is not what it should be ({type(error).__name__}: {error})") from error


_FIELDS = ("since", "alarms", "runs", "good", "checks", "undelivered")


@dataclass
class Opened:
    """The state under its lock; what is put into :attr:`state` is kept at the end."""

    state: State
    notes: list[str] = field(default_factory=list)
    """What is wrong with the file or its directory."""


@contextlib.contextmanager
def opened(directory: Path, now: datetime) -> Iterator[Opened]:
    """Hold the state to read and change it."""
    notes: list[str] = []
    with _locked(directory, notes):
        found = load(directory, notes)
        begun = found if found.since else replace(found, since=now)
        held = Opened(begun, notes)
        yield held
        if held.state != found:
            _save(directory, held.state, notes)


def load(directory: Path, notes: list[str] | None = None) -> State:
    """Return what is remembered; one that cannot be used is empty, and why is added to ``notes``."""
    path = directory / NAME
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return State()
    except OSError as error:
        return _unusable(path, error.strerror or str(error), notes)
    try:
        with os.fdopen(fd, "rb") as file:
            about = os.fstat(fd)
            if not stat.S_ISREG(about.st_mode) or about.st_mode & 0o022:
                return _unusable(path, "others could have written it", notes)
            if about.st_uid not in (os.geteuid(), 0, directory.stat().st_uid):
                return _unusable(path, f"it belongs to user id {about.st_uid}", notes)
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            return _unusable(path, "it is too large", notes)
        return State.from_plain(json.loads(raw))
    except (OSError, ValueError, RecursionError) as error:
        return _unusable(path, str(error), notes)


def _unusable(path: Path, why: str, notes: list[str] | None) -> State:
    if notes is not None:
        notes.append(f"{path} cannot be used, so alarms begin anew: {why[:300]}")
    return State()


@contextlib.contextmanager
def _locked(directory: Path, notes: list[str]) -> Iterator[None]:
    """Hold the directory's own lock, which needs no file; without it go on, and say so."""
    fd = -1
    try:
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            _wait_for_lock(fd)
        except OSError as error:
            notes.append(f"{directory} cannot be locked: {error.strerror or error}")
        yield
    finally:
        if fd >= 0:
            os.close(fd)


def _wait_for_lock(fd: int) -> None:
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise OSError(f"somebody has held it for {LOCK_SECONDS:g} s") from error
        time.sleep(0.05)


def _save(directory: Path, state: State, notes: list[str]) -> None:
    """Put the file in its place, whole and on disk, or leave what is there."""
    path, fresh = directory / NAME, directory / f".{NAME}.{os.getpid()}.tmp"
    try:
        content = json.dumps(state.to_plain(), indent=1).encode()
        fresh.unlink(missing_ok=True)
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(content)
                if os.geteuid() == 0:
                    # root may look in; the file stays theirs who run the backups.
                    owner = directory.stat()
                    os.fchown(fd, owner.st_uid, owner.st_gid)
                file.flush()
                os.fsync(fd)
            os.rename(fresh, path)
        except BaseException:
            with contextlib.suppress(OSError):
                fresh.unlink(missing_ok=True)
            raise
    except OSError as error:
        notes.append(
            f"{path} cannot be written ({error.strerror or error}): alarms are repeated each time, and none is "
            "said to be over"
        )


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return format_utc(value)
    if isinstance(value, Problem):
        return value.to_plain()
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    if hasattr(value, "__dataclass_fields__"):
        return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
    return value


def _alarm(data: Any) -> Alarm:
    return Alarm(
        _problem(data["problem"]),
        _moment(data["since"]),
        _time(data["told_at"]),
        _time(data["over_at"]),
        _time(data["claimed_until"]),
    )


def _problem(data: Any) -> Problem:
    problem = Problem.from_plain(data)
    if problem is None:
        raise ValueError("it holds a problem that is none")
    return problem


def _maybe(data: Any) -> Problem | None:
    return None if data is None else _problem(data)


def _moment(text: Any) -> datetime:
    if not isinstance(text, str):
        raise ValueError(f"{type(text).__name__} is no time")
    return parse_utc(text)


def _time(text: Any) -> datetime | None:
    return None if text is None else _moment(text)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{type(value).__name__} is no text")
    return value[:1024]


def _size(value: Any) -> int | None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise ValueError(f"{type(value).__name__} is no size")
    return value
