"""What an artifact is: its manifest, or for one without, what reading it tells.

Old scripts left no manifests, and names that say little: what is in an archive decides, never what it is called.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from hq_backups.engine import codecs
from hq_backups.engine.catalog import Entry
from hq_backups.engine.config import Config
from hq_backups.engine.errors import BadManifest, CorruptBackup
from hq_backups.engine.events import Events, format_utc, parse_utc, utc_now
from hq_backups.engine.manifest import UNMANAGED, Manifest, load_manifest
from hq_backups.engine.source import reader, stored
from hq_backups.engine.stores import modes_of, open_stream
from hq_backups.engine.streams import CHUNK, PlainReader, Readable
from hq_backups.engine.when import local_time

UNKNOWN = "unknown"
_HEAD = 1024


def describe(
    config: Config,
    entry: Entry,
    location: Mapping[str, Any],
    events: Events,
    known: Mapping[str, Any] | None = None,
) -> Manifest:
    """Return an artifact's manifest; without one, read it to its end and make one of what it holds.

    ``known`` is such a manifest from an earlier reading of the same artifact.
    """
    if entry.manifest is not None:
        return entry.manifest
    if known is not None:
        before = load_manifest(json.dumps(dict(known)).encode(), "of an earlier reading")
        same_size = before.size == entry.size or _is_directory(location)
        # Unpacking compares its sha256 with what is there by then.
        if before.surveyed and same_size and (before.store, before.name) == (entry.store, _name(entry)):
            return before
    return _survey(config, entry, location, events)


def _survey(config: Config, entry: Entry, location: Mapping[str, Any], events: Events) -> Manifest:
    """Read an artifact once, to its end, and say what it is; raises CorruptBackup."""
    name = _name(entry)
    events.step("survey", f"{entry.name} has no manifest: reading it to its end to see what it holds")
    began = format_utc(utc_now())
    store = open_stream(config, entry.store)

    def read(done: int) -> None:
        events.progress("read", done, entry.size)

    with stored(store, location) as raw:
        source = _Rewound(raw)
        codec = codecs.sniff(source.head)
        with reader(source, codec, name, on_stored=read) as plain:
            mode = _mode(entry, plain)
            store = open_stream(config, entry.store, mode)
            facts = store.walk(plain, None, events)
            digest = plain.digest()
    # From here on it is what any backup is: planned, unpacked and compared by its manifest.
    manifest = Manifest(
        store=entry.store,
        mode=mode,
        type=entry.type,
        env=entry.env or UNKNOWN,
        host=entry.host or UNKNOWN,
        run=f"{UNMANAGED}{digest.sha256[:16]}",
        started_at=entry.taken_at,
        finished_at=began,
        local_date=f"{_local(config, entry.taken_at):%Y-%m-%d}",
        name=name,
        size=digest.size,
        sha256=digest.sha256,
        crc32=f"{digest.crc32:08x}",
        plain_size=digest.plain_size,
        plain_sha256=digest.plain_sha256,
        codec=codec,
        source=dict(facts["source"]),
        repository=dict(location),
    )
    version = manifest.source.get("version", "unknown")
    told = f"{facts.get('members')} members, whole to the end; mode {mode}, version {version}"
    if begun := manifest.source.get("start_time"):
        # The time of a file or object is that of its end, or of its last copy.
        told += f", begun {begun}"
    events.emit("check", name="archive", ok=True, message=told)
    try:
        return load_manifest(manifest.to_json(), name)
    except BadManifest as error:
        # What was found in a file without a manifest is as little to be trusted as one.
        raise CorruptBackup(f"what it says of itself makes no sense ({error.message})", name=name) from error


def _name(entry: Entry) -> str:
    """Return a file's name for an artifact that may be called by a whole path."""
    return entry.name.rsplit("/", 1)[-1]


def _is_directory(location: Mapping[str, Any]) -> bool:
    return location["kind"] == "local" and Path(location["path"]).is_dir()


def _local(config: Config, taken_at: str) -> datetime:
    return local_time(parse_utc(taken_at), config.timezone)


def _mode(entry: Entry, plain: PlainReader) -> str:
    """Return the mode that the contents show, whatever the name says; raises CorruptBackup."""
    head = plain.peek(_HEAD)
    if not head:
        raise CorruptBackup(
            "it is an empty stream, such as a dump leaves that failed at once"
            if entry.size
            else "it is an empty file",
            name=entry.name,
        )
    modes = modes_of(entry.store)
    for each in modes:
        if each.recognises(head):
            return each.mode
    for each in modes:
        if (found := each.lookalike(head)) is not None:
            what, hint = found
            raise CorruptBackup(what, name=entry.name, hint=hint)
    words = [each.looks for each in modes]
    what = f"neither {' nor '.join(words)}" if len(words) > 1 else f"not {''.join(words)}"
    raise CorruptBackup(f"it is {what}: {_looks(head)}", name=entry.name)


def _looks(head: bytes) -> str:
    """Say how a file begins, in characters that any terminal can show."""
    shown = head[:16].decode("ascii", "replace")
    return f"it begins with {shown!r}" if shown.isprintable() else f"it begins with {head[:8].hex(' ')}"


class _Rewound:
    """A stream whose first bytes were looked at and are read again."""

    def __init__(self, source: Readable) -> None:
        self._source = source
        self.head = b""
        while len(self.head) < 4 and (more := source.read(CHUNK)):
            self.head += more
        self._kept = self.head

    def read(self, n: int, /) -> bytes:
        """Return up to ``n`` bytes; none at the end only."""
        if not self._kept:
            return self._source.read(n)
        out, self._kept = self._kept[:n], self._kept[n:]
        return out
