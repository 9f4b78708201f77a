"""Reading an artifact back, from wherever it lies, against its manifest."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from hq_backups.engine import accounts, process
from hq_backups.engine.bucket import open_bucket
from hq_backups.engine.errors import BackupNotFound, CorruptBackup, PreflightFailed, ProducerFailed
from hq_backups.engine.events import Events
from hq_backups.engine.manifest import Manifest
from hq_backups.engine.stores.base import StreamStore
from hq_backups.engine.streams import Digest, PlainReader, Readable


@contextmanager
def opened(
    store: StreamStore,
    location: Mapping[str, Any],
    manifest: Manifest,
    events: Events,
    *,
    hash_plain: bool = True,
) -> Iterator[PlainReader]:
    """Open an artifact as a stream of plain bytes, bounded by its manifest."""

    def read(done: int) -> None:
        events.progress("read", done, manifest.size)

    with (
        stored(store, location) as source,
        reader(
            source,
            manifest.codec,
            manifest.name,
            max_plain=manifest.plain_size,
            on_stored=read,
            hash_plain=hash_plain,
        ) as plain,
    ):
        yield plain


@contextmanager
def stored(store: StreamStore, location: Mapping[str, Any]) -> Iterator[Readable]:
    """Open what lies in a place: a file, an object, or a bare directory as a tar of it."""
    if location["kind"] == "local":
        path = Path(location["path"])
        source: AbstractContextManager[Readable]
        if "fd" in location:
            with os.fdopen(os.dup(int(location["fd"])), "rb") as opened_source:
                opened_source.seek(0)
                yield opened_source
            return
        try:
            source = _packed(store, path) if path.is_dir() else path.open("rb")
        except FileNotFoundError as error:
            raise BackupNotFound(name=path, store=store.name, near="") from error
        except PermissionError as error:
            raise _unreadable(path) from error
        with source as opened_source:
            yield opened_source
        return
    bucket = open_bucket(store)
    key, version = location["key"], location.get("version_id")
    found = bucket.head(key, version)
    if found is None:
        raise BackupNotFound(name=key, store=store.name, near="")
    source = bucket.open(key, version, size=found.size, etag=found.etag)
    try:
        yield source
    finally:
        source.close()


@contextmanager
def handed(location: Mapping[str, Any], owner: str) -> Iterator[tuple[Mapping[str, Any], tuple[int, ...]]]:
    """Open an artifact that ``owner`` may not read, so that his child need not; return where, and what is open.

    Only what whoever owns the backup directory, or root, has put there as a file: never what a link leads to.
    """
    fd = _to_hand(location, owner)
    if fd is None:
        yield location, ()
        return
    try:
        yield {**location, "fd": fd}, (fd,)
    finally:
        os.close(fd)


def _to_hand(location: Mapping[str, Any], owner: str) -> int | None:
    if location["kind"] != "local" or os.geteuid() != 0:
        return None
    path = location["path"]
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    about, uid = os.fstat(fd), accounts.find(owner).uid
    trusted = (0, os.stat(os.path.dirname(path)).st_uid)
    if stat.S_ISREG(about.st_mode) and about.st_uid != uid and about.st_uid in trusted:
        return fd
    os.close(fd)
    return None


def _unreadable(path: Path, user: str | None = None) -> PreflightFailed:
    user = user or accounts.me()
    return PreflightFailed(
        f"user {user} cannot read {path}",
        hint=f"Give it to that user (`chown -R {user} {path}`), or move it where {user} can read.",
    )


@contextmanager
def _packed(store: StreamStore, path: Path) -> Iterator[Readable]:
    """Read a directory as a tar: of one that nobody changes, the same bytes each time."""
    argv = ["tar", "--create", "--file=-", "--sort=name", "--format=gnu", "--hard-dereference"]
    argv += [f"--directory={path}", "."]
    user = store.owner() if os.geteuid() == 0 else None
    try:
        with process.Producer(argv, user=user) as producer:
            yield producer
    except ProducerFailed as error:
        said = str(error.facts.get("tail"))
        if error.facts.get("program") != "tar":
            raise
        if "Permission denied" in said:
            raise _unreadable(path, user) from error
        if "changed as we read it" in said or "removed before we read it" in said:
            raise CorruptBackup("it changed while it was read: something works in it", name=path) from error
        raise


@contextmanager
def reader(
    source: Readable,
    codec: str,
    name: str,
    *,
    max_plain: int | None = None,
    on_stored: Callable[[int], None] | None = None,
    hash_plain: bool = True,
) -> Iterator[PlainReader]:
    """Unpack a stream for the length of the block."""
    plain = PlainReader(source, codec, name, max_plain=max_plain, on_stored=on_stored, hash_plain=hash_plain)
    try:
        yield plain
    finally:
        plain.close()


def compare(digest: Digest, manifest: Manifest) -> None:
    """Compare what was read, as far as it was hashed, with what the manifest promises; raises CorruptBackup."""
    pairs = [
        ("size", digest.size, manifest.size),
        ("sha256", digest.sha256, manifest.sha256),
        ("unpacked size", digest.plain_size, manifest.plain_size),
    ]
    if digest.plain_sha256:
        pairs.append(("unpacked sha256", digest.plain_sha256, manifest.plain_sha256))
    for what, seen, promised in pairs:
        if seen != promised:
            raise CorruptBackup(f"its {what} is {seen}, its manifest says {promised}", name=manifest.name)
