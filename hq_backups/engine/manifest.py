"""The manifest: an artifact's JSON description, written last. Schema 1.

A manifest found on disk or in a bucket is untrusted: its size is bounded, every field's type and range is
checked, and its names can name nothing but a file beside it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from hq_backups.engine.config import STORES, TYPES, from_plain, to_plain
from hq_backups.engine.errors import BadManifest, NewerManifest, UsageError
from hq_backups.engine.events import parse_utc

SCHEMA = 1
MAX_BYTES = 64 << 20

UNMANAGED = "unmanaged-"
"""How the run of an artifact begins that no run of ours made."""

_SHA256 = re.compile(r"[0-9a-f]{64}\Z")
_FILE_NAME = re.compile(r"[^/\x00-\x1f\x7f\ud800-\udfff]{1,255}\Z")
_RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\Z")
_MODES = ("plain", "dump", "tar", "snapshot")
_CODECS = ("gzip", "bzip2", "zstd", "none")
_MAX_DEPTH = 32
_MAX_SIZE = 1 << 60


@dataclass(frozen=True)
class Manifest:
    """What one artifact is, where it came from, and how to know that it is whole."""

    store: str
    mode: str
    type: str
    env: str
    host: str
    run: str
    started_at: str
    """UTC, ``2026-11-22T00:00:02Z``."""
    finished_at: str
    local_date: str
    """The host's calendar date of the start, ``2026-11-22``: what retention counts by."""
    name: str
    """The artifact's local file name."""
    size: int
    sha256: str
    crc32: str
    """Of the stored bytes, eight hex digits: what S3 is compared with."""
    plain_size: int
    plain_sha256: str
    codec: str
    source: Mapping[str, Any] = field(default_factory=dict)
    tools: Mapping[str, str] = field(default_factory=dict)
    duration: float = 0.0
    """Seconds."""
    warnings: list[str] = field(default_factory=list)
    repository: Mapping[str, Any] = field(default_factory=dict)
    """``{"kind": "local", "path"}`` or ``{"kind": "s3", "bucket", "key", "version_id"}``."""
    schema: int = SCHEMA

    @property
    def surveyed(self) -> bool:
        """Tell whether it was made by reading an artifact that had none."""
        return self.run.startswith(UNMANAGED)

    @property
    def taken_at(self) -> datetime:
        """Return when the run began."""
        return parse_utc(self.started_at)

    def to_json(self) -> bytes:
        """Return the manifest as indented JSON."""
        return json.dumps(to_plain(self), indent=1, sort_keys=True, ensure_ascii=True).encode() + b"\n"


def load_manifest(raw: bytes, where: str) -> Manifest:
    """Read and check a manifest that was found at ``where``; raises BadManifest."""
    if len(raw) > MAX_BYTES:
        raise BadManifest(f"it is larger than {MAX_BYTES} bytes", name=where)
    try:
        data = json.loads(raw, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        raise BadManifest("it is not JSON", name=where) from error
    if not isinstance(data, dict):
        raise BadManifest("it is not an object", name=where)
    schema = data.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        raise NewerManifest(name=where, schema=schema, known=SCHEMA)
    try:
        _check_depth(data, _MAX_DEPTH)
        manifest = from_plain(Manifest, data)
        _check(manifest)
    except (UsageError, ValueError) as error:
        raise BadManifest(str(error), name=where) from error
    return manifest


def _finite(text: str) -> float:
    """Read a number; raise ValueError for one beyond all bounds, which JSON has not and Python makes of 1e999."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no number")
    return number


def _check_depth(value: Any, left: int) -> None:
    """Refuse what is nested deeper than writing it again could stand."""
    if left == 0:
        raise ValueError("it is nested too deeply")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        if isinstance(inner, (dict, list)):
            _check_depth(inner, left - 1)


def _check(m: Manifest) -> None:
    if m.schema != SCHEMA:
        raise ValueError(f"schema {m.schema} is unknown")
    if m.store not in STORES:
        raise ValueError("store is unknown")
    if m.mode not in _MODES:
        raise ValueError("mode is unknown")
    if m.codec not in _CODECS:
        raise ValueError("codec is unknown")
    if m.type not in TYPES:
        raise ValueError("type is unknown")
    if not _FILE_NAME.match(m.name) or m.name in (".", ".."):
        raise ValueError("name is not a file name")
    if not _RUN.match(m.run):
        raise ValueError("run is not a run's id")
    if not (_FILE_NAME.match(m.env) and _FILE_NAME.match(m.host)):
        raise ValueError("env or host is not a name")
    for sha in (m.sha256, m.plain_sha256):
        if not _SHA256.match(sha):
            raise ValueError("sha256 is not 64 hex digits")
    if not re.fullmatch(r"[0-9a-f]{8}", m.crc32):
        raise ValueError("crc32 is not 8 hex digits")
    if not (0 <= m.size <= _MAX_SIZE and 0 <= m.plain_size <= _MAX_SIZE):
        raise ValueError("a size is negative or beyond any disk")
    parse_utc(m.started_at)
    parse_utc(m.finished_at)
    datetime.strptime(m.local_date, "%Y-%m-%d")
