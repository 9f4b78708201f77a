"""Reading an artifact back, from wherever it lies, against its manifest."""

from __future__ import annotations

import os
import pwd
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hq_backups.engine.bucket import open_bucket
from hq_backups.engine.errors import BackupNotFound, CorruptBackup, PreflightFailed
from hq_backups.engine.events import Events
from hq_backups.engine.manifest import Manifest
from hq_backups.engine.stores.base import Store
from hq_backups.engine.streams import Digest, PlainReader, Readable


@contextmanager
def opened(
    store: Store, location: Mapping[str, Any], manifest: Manifest, events: Events
) -> Iterator[PlainReader]:
    """Open an artifact as a stream of plain bytes, bounded by its manifest."""

    def read(done: int) -> None:
        events.progress("read", done, manifest.size)

    with _stored(store, location, events) as source, _reader(source, manifest, read) as plain:
        yield plain


@contextmanager
def _stored(store: Store, location: Mapping[str, Any], events: Events) -> Iterator[Readable]:
    if location["kind"] == "local":
        path = Path(location["path"])
        try:
            file = path.open("rb")
        except FileNotFoundError as error:
            raise BackupNotFound(name=path, store=store.name, near="") from error
        except PermissionError as error:
            user = pwd.getpwuid(os.geteuid()).pw_name
            raise PreflightFailed(
                f"user {user} cannot read {path}",
                hint=f"Give it to that user (`chown {user} {path}`), or move it where {user} can read.",
            ) from error
        with file:
            yield file
        return
    bucket = open_bucket(store)
    key, version = location["key"], location.get("version_id")
    stored = bucket.head(key, version)
    if stored is None:
        raise BackupNotFound(name=key, store=store.name, near="")
    source = bucket.open(key, version, size=stored.size, etag=stored.etag)
    try:
        yield source
    finally:
        source.close()


@contextmanager
def _reader(source: Readable, manifest: Manifest, on_stored: Callable[[int], None]) -> Iterator[PlainReader]:
    plain = PlainReader(
        source, manifest.codec, manifest.name, max_plain=manifest.plain_size, on_stored=on_stored
    )
    try:
        yield plain
    finally:
        plain.close()


def compare(digest: Digest, manifest: Manifest) -> None:
    """Compare what was read with what the manifest promises; raises CorruptBackup."""
    pairs = (
        ("size", digest.size, manifest.size),
        ("sha256", digest.sha256, manifest.sha256),
        ("unpacked size", digest.plain_size, manifest.plain_size),
        ("unpacked sha256", digest.plain_sha256, manifest.plain_sha256),
    )
    for what, seen, promised in pairs:
        if seen != promised:
            raise CorruptBackup(f"its {what} is {seen}, its manifest says {promised}", name=manifest.name)
