"""File names and bucket keys, as CommCare's operators and their other tools know them.

``postgres_<env>_daily_2026_11_22.tar.gz`` on disk; ``postgres_daily_<host>.tar.gz`` in a bucket that keeps
versions. Dates and hours are the host's local time at the start of the run.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

from hq_backups.engine.errors import UsageError
from hq_backups.engine.events import format_utc

MANIFEST_KEY_SUFFIX = ".manifest.json"
PARTIAL_SUFFIX = ".partial"
SPOOL_SUFFIX = ".spool"

OUTER = "outer"
"""Beside the tree that a deep check unpacks: where it puts what lies outside the data directory."""

PREFIX = {"postgres": "postgres", "couch": "couchdb", "blobdb": "blobdb"}
_CODEC_SUFFIX = {"gzip": ".gz", "zstd": ".zst", "none": ""}
_TYPE = r"(?P<type>daily|weekly|hourly|manual)"
_DATE = r"(?P<date>\d{4}_(?:0[1-9]|1[0-2])_(?:0[1-9]|[12]\d|3[01]))"
_TIME = r"(?:_(?P<time>\d{2}(?:\d{4})?))?"
_EXT = r"(?P<ext>\.tar(?:\.gz|\.zst)?|\.gz|\.zst|\.sql)"
_POSTGRES = re.compile(rf"postgres_(?P<env>.+)_{_TYPE}_{_DATE}{_TIME}{_EXT}\Z")
_FILES = re.compile(rf"(?P<prefix>couchdb|blobdb)_{_TYPE}_{_DATE}{_TIME}{_EXT}\Z")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")

_SNAPSHOT = re.compile(
    r"(?P<repository>.+)_(?P<year>\d{4})_(?P<month>[1-9]|1[0-2])_(?P<day>[1-9]|[12]\d|3[01])(?:_\d{6})?\Z"
)

# What CommCare's scripts have called their backups since 2016, in the order in which they are tried: a date
# wins over a host's name that looks like one.
_OLD_TYPE = r"(?P<type>daily|weekly|hourly)"
_HOUR = r"(?:_(?:[01]\d|2[0-3]))?"
_OLD_LOCAL = (
    re.compile(
        rf"(?P<prefix>postgres)_(?:(?P<env>.+)_)?{_OLD_TYPE}_{_DATE}{_HOUR}"
        r"(?P<ext>\.tar\.gz|\.gz|\.tar\.bz|\.db\.gz)?\Z"
    ),
    re.compile(rf"(?P<prefix>postgres)_{_DATE}(?P<ext>\.db\.gz)\Z"),
    re.compile(rf"(?P<prefix>couchdb|blobdb)_(?:{_OLD_TYPE}_)?{_DATE}{_HOUR}(?P<ext>\.tar\.gz|\.gz)\Z"),
)
_OLD_KEYS = (
    re.compile(rf"(?P<prefix>postgres|couchdb|blobdb)_{_OLD_TYPE}_(?P<host>.+?)(?P<ext>\.tar\.gz|\.gz)\Z"),
    re.compile(r"(?P<prefix>postgres)_(?P<type>daily|weekly)\Z"),
    re.compile(r"(?P<prefix>couchdb|blobdb)\Z"),
)
OLD_KEY_PREFIXES = ("/", "opt/")
"""Keys of 2016 and 2017 are whole local paths; a service that keeps files drops their leading slash."""


def run_id(started: datetime, host: str, store: str) -> str:
    """Return ``20261122T000002Z-pg0-postgres``."""
    stamp = format_utc(started).replace("-", "").replace(":", "")
    return f"{stamp}-{safe(host)}-{store}"


def safe(text: str) -> str:
    """Return ``text`` with everything that a file name or key should not hold replaced by ``-``."""
    return _UNSAFE.sub("-", text).strip("-.") or "unnamed"


def extension(mode: str, codec: str) -> str:
    """Return the end of an artifact's name: ``.tar.gz`` for archives, ``.gz`` for dumps."""
    try:
        packed = _CODEC_SUFFIX[codec]
    except KeyError:
        raise UsageError(f"unknown codec {codec}") from None
    return (packed or ".sql") if mode == "dump" else ".tar" + packed


def local_name(store: str, env: str, type_: str, started: datetime, mode: str, codec: str) -> str:
    """Return an artifact's file name; ``started`` is in the host's time zone."""
    middle = f"{safe(env)}_" if store == "postgres" else ""
    stamp = f"{started:%Y_%m_%d}"
    if type_ == "hourly":
        stamp += f"_{started:%H}"
    elif type_ == "manual":
        stamp += f"_{started:%H%M%S}"
    return f"{PREFIX[store]}_{middle}{type_}_{stamp}{extension(mode, codec)}"


def fixed_key(store: str, type_: str, host: str, mode: str, codec: str) -> str:
    """Return the one key per type and host that a versioned bucket gets."""
    return f"{PREFIX[store]}_{type_}_{safe(host)}{extension(mode, codec)}"


def dated_key(name: str, *, host: str | None = None, time: datetime | None = None) -> str:
    """Return the key for local ``name``, with the host, and the time of a later run of the day, put in."""
    parsed = parse_name(name)
    if parsed is None:
        raise UsageError(f"{name} is not the name of an artifact")
    stem = name.removesuffix(parsed.ext)
    if host is not None:
        stem += f"_{safe(host)}"
    if time is not None:
        stem += f"_{time:%H%M%S}"
    return stem + parsed.ext


def snapshot_name(repository: str, started: datetime, taken: Collection[str], purpose: str = "") -> str:
    """Return ``<repository>_2026_8_2``, or with the time of day where that is ``taken``.

    HQ's restore_es_snapshot looks for the former, unpadded. A ``purpose`` stands before the date, and has a time.
    """
    stem = f"{repository}_{purpose}_" if purpose else f"{repository}_"
    name = f"{stem}{started.year}_{started.month}_{started.day}"
    if not purpose and name not in taken:
        return name
    moment = started
    while (timed := f"{name}_{moment:%H%M%S}") in taken:
        moment += timedelta(seconds=1)
    return timed


def day_of_snapshot(name: str) -> datetime | None:
    """Return the day that a snapshot's name tells, as a moment; None when it tells none."""
    match = _SNAPSHOT.match(name)
    if match is None:
        return None
    try:
        return datetime(int(match["year"]), int(match["month"]), int(match["day"]), tzinfo=UTC)
    except ValueError:
        return None


@dataclass(frozen=True)
class ParsedName:
    """What an artifact's file name says."""

    store: str
    type: str
    date: date
    time: str | None
    env: str | None
    ext: str

    @property
    def mode(self) -> str:
        """Return the mode that the extension stands for."""
        if self.store != "postgres":
            return "tar"
        return "plain" if self.ext.startswith(".tar") else "dump"


def parse_name(name: str) -> ParsedName | None:
    """Read a local artifact name, today's scripts' ones included; None when it is something else."""
    match = _POSTGRES.match(name) or _FILES.match(name)
    if match is None:
        return None
    groups = match.groupdict()
    try:
        day = datetime.strptime(groups["date"], "%Y_%m_%d").date()
    except ValueError:
        return None
    prefix = groups.get("prefix", "postgres")
    store = next(s for s, p in PREFIX.items() if p == prefix)
    return ParsedName(store, groups["type"], day, groups["time"], groups.get("env"), groups["ext"])


@dataclass(frozen=True)
class OldName:
    """What the name of an artifact without a manifest says."""

    store: str
    type: str | None = None
    env: str | None = None
    host: str | None = None
    ext: str = ""

    @property
    def mode(self) -> str:
        """Return the mode that the extension hints at; only the contents decide."""
        if self.store != "postgres":
            return "tar"
        return "dump" if self.ext in (".gz", ".db.gz", ".zst", ".sql") else "plain"


def recognise(name: str, *, is_key: bool = False) -> OldName | None:
    """Read the last part of a path or key in any form that our or the old scripts' backups have, or had.

    Keys had forms that no file has. Without an extension it is a directory, or the key of two days in 2018.
    """
    parsed = parse_name(name)
    if parsed is not None:
        return OldName(parsed.store, parsed.type, parsed.env, ext=parsed.ext)
    for pattern in (*_OLD_LOCAL, *(_OLD_KEYS if is_key else ())):
        match = pattern.match(name)
        if match is None:
            continue
        said = match.groupdict()
        if said.get("date") and not _is_day(said["date"]):
            continue
        store = next(s for s, p in PREFIX.items() if p == said["prefix"])
        return OldName(store, said.get("type"), said.get("env"), said.get("host"), said.get("ext") or "")
    return None


def _is_day(text: str) -> bool:
    try:
        datetime.strptime(text, "%Y_%m_%d")
    except ValueError:
        return False
    return True


def manifest_name(name: str) -> str:
    """Return the dot file beside an artifact: a name that the old crons' prune globs do not eat."""
    return f".{name}.json"


def pending_name(run: str) -> str:
    """Return the manifest's name until its artifact stands under its final one."""
    return f".{run}.pending.json"


def partial_name(run: str) -> str:
    """Return the artifact's name while it is being written."""
    return f".{run}{PARTIAL_SUFFIX}"


def spool_name(run: str) -> str:
    """Return the directory in which a run keeps what cannot go straight into its artifact."""
    return f".{run}{SPOOL_SUFFIX}"
