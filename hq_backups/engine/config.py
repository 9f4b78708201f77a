"""The plain job that the engine runs: frozen dataclasses that travel as JSON.

The app turns settings into a :class:`Config`; a bridge carries it, with a verb and its request, as one
:class:`Job` to whatever user the work must be done as. Secrets travel only in here, never in argv.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from hq_backups.engine.errors import ConfigurationError, ProtocolMismatch, UsageError

PROTOCOL = 1

STORES = ("postgres", "couch", "blobdb", "elasticsearch")
TYPES = ("daily", "weekly", "hourly", "manual")

T = TypeVar("T")


@dataclass(frozen=True)
class S3Config:
    """Where buckets lie and how to reach them."""

    access_key: str | None = field(default=None, repr=False)
    secret_key: str | None = field(default=None, repr=False)
    endpoint: str | None = None
    """URL with scheme; None means AWS itself."""
    region: str | None = None
    versioning: bool = True
    """Whether fixed keys are wanted; the bucket is asked whether it keeps versions."""
    upload_limit: int | None = None
    """Bytes per second."""


@dataclass(frozen=True)
class Retention:
    """How long artifacts stay on the local disk."""

    days: int = 1
    weeks: int = 1
    hours: int = 1


@dataclass(frozen=True)
class StoreConfig:
    """One store's settings; what only that store knows is in ``options``."""

    store: str
    mode: str
    backup_dir: Path
    retention: Retention = Retention()
    hourly: bool = False
    s3: bool = False
    bucket: str | None = None
    bucket_fallback: str | None = None
    """A misspelt default: used, and said, where only it exists."""
    mirror: str | None = None
    """The host, ``[user@]host[:/directory]``, to which the backup directory is copied after a good run."""
    data_dir: Path | None = None
    os_user: str | None = None
    """Who the engine runs as; None means the owner of ``data_dir``."""
    stop_command: tuple[str, ...] | None = None
    start_command: tuple[str, ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Config:
    """Everything that a verb needs to know about this host and environment."""

    env: str
    host: str
    timezone: str | None = None
    """IANA name for dates in file names; None means the host's own."""
    compression: str = "gzip"
    compression_level: int = 1
    s3: S3Config | None = None
    stores: Mapping[str, StoreConfig] = field(default_factory=dict)
    """By store name; only the stores that are switched on or have a directory."""

    def store(self, name: str) -> StoreConfig:
        """Return the configuration of one store, or say how to switch it on."""
        try:
            return self.stores[name]
        except KeyError:
            raise ConfigurationError(
                f"store {name} is not configured on this host",
                hint="See what is: list_backups --config",
            ) from None


@dataclass(frozen=True)
class Job:
    """One verb with everything it needs, ready to be run by any user on this host."""

    verb: str
    config: Config
    request: Mapping[str, Any] = field(default_factory=dict)
    run: str | None = None
    """The run id, when the caller has already made one."""
    protocol: int = PROTOCOL

    def to_json(self) -> str:
        """Return the job as one line of JSON, secrets included."""
        return json.dumps(to_plain(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """Read a job; another protocol version is refused."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise UsageError("the job on standard input is not JSON") from error
        theirs = data.get("protocol") if isinstance(data, dict) else None
        if theirs != PROTOCOL:
            raise ProtocolMismatch(ours=PROTOCOL, theirs=theirs)
        return from_plain(cls, data)


def to_plain(value: Any) -> Any:
    """Return dataclasses, paths, tuples and mappings as what JSON can say."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    return value


def from_plain(cls: type[T], data: Any) -> T:
    """Build dataclass ``cls`` from plain JSON data; an unknown or ill-typed field is a usage error."""
    if not isinstance(data, Mapping):
        raise UsageError(f"{cls.__name__} must be an object, not {type(data).__name__}")
    hints = typing.get_type_hints(cls)
    fields = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - fields)
    if unknown:
        raise UsageError(f"{cls.__name__} has no field {', '.join(unknown)}")
    try:
        return cls(
            **{name: _convert(hints[name], value, f"{cls.__name__}.{name}") for name, value in data.items()}
        )
    except TypeError as error:
        raise UsageError(f"{cls.__name__}: {error}") from error


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (inner,) = (a for a in args if a is not type(None))
        return _convert(inner, value, where)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_plain(hint, value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_convert(args[0], v, where) for v in value)
    if origin is list and isinstance(value, (list, tuple)):
        return [_convert(args[0], v, where) for v in value]
    if origin in (dict, Mapping, Mapping.__mro__[0]) and isinstance(value, Mapping):
        return {str(k): _convert(args[1], v, where) for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise UsageError(f"{where} must be {getattr(hint, '__name__', hint)}, not {type(value).__name__}")
