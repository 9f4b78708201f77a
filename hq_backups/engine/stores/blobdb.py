"""BlobDB: HQ's directory of blobs, as one tar."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hq_backups.engine import accounts, archive, space
from hq_backups.engine.blobs import merge, old
from hq_backups.engine.blobs.headers import FILE
from hq_backups.engine.blobs.records import Records
from hq_backups.engine.blobs.stream import BlobStream
from hq_backups.engine.blobs.unpack import Root, blobs, directory_mode, unpack
from hq_backups.engine.control import NoService, Service
from hq_backups.engine.errors import (
    BackupNotFound,
    BadManifest,
    CorruptBackup,
    PreflightFailed,
    UsageError,
)
from hq_backups.engine.events import Events
from hq_backups.engine.manifest import Manifest
from hq_backups.engine.requests import BlobRecord, RestoreRequest
from hq_backups.engine.stores.base import Destination, Prepared, Stream, StreamStore
from hq_backups.engine.streams import PlainReader

_BLOCK = 4096
"""Bytes that a filesystem gives a file at least."""


class BlobDB(StreamStore):
    """HQ's blob directory."""

    name = "blobdb"
    mode = "tar"
    looks = "a tar archive"
    counted = "files"

    # Backup

    def prepare(self, last: Manifest | None, events: Events) -> Prepared:
        """Find the directory, and see that it can be read."""
        directory = self._source()
        about = directory.stat()
        source = {
            "directory": os.fsencode(directory).decode("utf-8", "backslashreplace"),
            "directory_mode": f"{about.st_mode & 0o7777:04o}",
            "directory_owner": f"{about.st_uid}:{about.st_gid}",
        }
        self._events = events
        # Walking a million files to know what they will be costs as much as reading them.
        return Prepared(last.plain_size if last else 0, source, {}, unknown=True)

    def _source(self) -> Path:
        """Return the blob directory; raises PreflightFailed."""
        hint = "Set blobdb_dir_path to the directory that HQ uses (SHARED_DRIVE_CONF.blob_dir)."
        if self.settings.data_dir is None:
            raise PreflightFailed("the directory of the blobs is not known", hint=hint)
        directory = self.settings.data_dir.resolve()
        try:
            os.scandir(directory).close()
        except FileNotFoundError:
            raise PreflightFailed(
                f"the blob directory {self.settings.data_dir} is not there",
                hint=f"Is its disk mounted? {hint}",
            ) from None
        except NotADirectoryError:
            raise PreflightFailed(f"{directory} is not a directory", hint=hint) from None
        except PermissionError:
            raise PreflightFailed(
                f"user {accounts.me()} cannot read {directory}",
                hint="Name one who can: blobdb_backup_os_user.",
            ) from None
        return directory

    @contextmanager
    def open_stream(
        self, prepared: Prepared, run: str, *, accept_bad_pages: bool = False
    ) -> Iterator[Stream]:
        """Read the directory."""
        stream = BlobStream(self._source(), self._events)
        with contextlib.closing(stream):
            yield stream

    # Verify and restore

    @classmethod
    def recognises(cls, head: bytes) -> bool:
        """Look for a tar's first header."""
        return archive.is_tar(head)

    def expect(self, records: tuple[BlobRecord, ...]) -> None:
        """Remember what HQ's records say of some blobs."""
        self._records = Records(records)

    _records: Records | None = None

    def walk(self, plain: PlainReader, manifest: Manifest | None, events: Events) -> Mapping[str, Any]:
        """Read every header and compare the counts with the manifest, and HQ's records with what is there."""
        if manifest is None:
            return old.walk(plain, events)
        files, directories = self._walk(plain, manifest, Root(plain.name, **_front(manifest)), events)
        return {"members": files + directories}

    def _walk(self, plain: PlainReader, manifest: Manifest, root: Root, events: Events) -> tuple[int, int]:
        files = directories = size = 0
        records = self._records
        for key, member in blobs(plain, root):
            if member.kind == FILE:
                files += 1
                size += member.size
                if records is not None:
                    records.saw(key, member.size)
            else:
                directories += bool(key)
            events.progress("verify", plain.tell())
        self._compare(files, size, manifest)
        if records is not None:
            records.finish(manifest, events)
        return files, directories

    @staticmethod
    def _compare(files: int, size: int, manifest: Manifest) -> None:
        for what, seen in (("files", files), ("bytes", size)):
            promised = manifest.source.get(what)
            if seen != promised:
                raise CorruptBackup(
                    f"it holds {seen} {what} of blobs, its manifest says {promised}", name=manifest.name
                )

    def unpacked_size(self, manifest: Manifest) -> int:
        """Return the bytes of the blobs, and what the filesystem adds to each."""
        return (
            _count(manifest, "bytes") + (_count(manifest, "files") + _count(manifest, "directories")) * _BLOCK
        )

    def unpack(self, plain: PlainReader, spot: Destination, manifest: Manifest, events: Events) -> None:
        """Unpack the blobs, all or those that are wanted."""
        root = Root(plain.name, **_front(manifest), only=spot.only)
        found = unpack(plain, spot.tree, root)
        _require_found(root, manifest)
        if not spot.only:
            self._compare(found.files, found.bytes, manifest)
        events.step("unpack", f"{found.files} blobs in {found.directories} directories")

    def check_unpacked(self, target: Path, manifest: Manifest, events: Events) -> None:
        """Do nothing more: every byte went by its sha256, and every file was counted."""

    def deep_check(self, tree: Path, manifest: Manifest, events: Events) -> None:
        """Count what lies on the disk, and compare it with the manifest and HQ's records."""
        events.step("deep", "counting what lies unpacked")
        files, size = _measure(os.fsencode(tree))
        self._compare(files, size, manifest)
        events.emit(
            "check", name="contents", ok=True, message=f"{files} blobs, {space.human_bytes(size)}, unpacked"
        )
        if self._records is not None:
            self._records.look_in(tree)
            self._records.finish(manifest, events)

    def clean_scratch(self, tree: Path) -> None:
        """Do nothing: nothing runs on a tree of blobs."""

    def target(self) -> Path:
        """Return the blob directory that a restore replaces."""
        if self.settings.data_dir is None:
            raise PreflightFailed("the directory of the blobs is not known", hint="Set blobdb_dir_path.")
        return self.settings.data_dir

    def owner(self) -> str:
        """Return the user and group that HQ reads and writes its blobs as; whoever we are when we are not root."""
        if os.geteuid() != 0 and not self.settings.options.get("owner_is_set"):
            return accounts.me()
        owner, group = self.settings.options.get("owner"), self.settings.options.get("group")
        return f"{owner or accounts.me()}:{group}" if group else str(owner or accounts.me())

    def tree_mode(self, manifest: Manifest) -> int:
        """Return the recorded mode of the blob directory."""
        recorded = str(manifest.source.get("directory_mode", "0755"))
        return directory_mode(
            int(recorded, 8) if recorded.isdecimal() and set(recorded) <= set("01234567") else 0o755
        )

    def check_restore(self, manifest: Manifest, request: RestoreRequest, events: Events) -> Mapping[str, Any]:
        """Check the counts, the owner and the inodes."""
        if request.only and request.target_dir is None and not request.merge:
            raise UsageError(
                "--only goes with --merge or --target-dir",
                hint="A restore of everything would set all the other blobs aside.",
            )
        files, directories = _count(manifest, "files"), _count(manifest, "directories")
        place = request.target_dir or request.staging_dir or self.target()
        accounts.find(self.owner())
        if not request.only:
            space.require(space.existing(place), 0, "the blobs", files=files + directories)
        return {"files": files, "blob_bytes": _count(manifest, "bytes"), "only": list(request.only)}

    def check_in_place(
        self, manifest: Manifest, request: RestoreRequest, events: Events
    ) -> Mapping[str, Any]:
        """Check that what is missing can be added to the live directory."""
        if not request.merge:
            return super().check_in_place(manifest, request, events)
        accounts.find(self.owner())
        target = self._source()
        return {
            "server": str(target),
            "files": _count(manifest, "files"),
            "merge": "adds the blobs that are missing; nothing that is there is changed",
            "only": list(request.only),
        }

    def loader(self) -> str:
        """Merge as HQ's user."""
        return self.owner()

    def check_load(
        self, plain: PlainReader, manifest: Manifest, request: RestoreRequest, events: Events
    ) -> None:
        """Read the archive to its end: what is wanted must be in it, and what is missing must fit."""
        root = Root(plain.name, **_front(manifest), only=request.only)
        missing = merge.missing(plain, root, self.target().resolve())
        _require_found(root, manifest)
        needed = missing.bytes + missing.files * _BLOCK
        space.require(self.target().resolve(), needed, "the missing blobs", files=missing.files)
        events.step("verify", f"{missing.files} blobs are missing, {space.human_bytes(missing.bytes)}")

    def load_in_place(
        self, plain: PlainReader, manifest: Manifest, request: RestoreRequest, events: Events
    ) -> None:
        """Add what is missing to the live directory."""
        root = Root(plain.name, **_front(manifest), only=request.only)
        merge.merge(plain, root, self.target().resolve(), events)

    def service(self, manifest: Manifest | None) -> Service:
        """Return nothing that runs: HQ opens each blob when it is asked for it."""
        return NoService("nothing, blobs are files")

    def check_serving(
        self, manifest: Manifest | None, request: RestoreRequest | None, events: Events
    ) -> None:
        """Look that the directory is there and can be entered."""
        os.scandir(self.target()).close()

    def next_steps(self, manifest: Manifest | None = None) -> list[str]:
        """Return what an operator of HQ does after the blobs are back."""
        return [f"commcare-cloud {self.config.env} django-manage check_services"]


def _front(manifest: Manifest) -> dict[str, Any]:
    """Return what of an archive's paths is in front of the keys."""
    return {"strip": old.strip(manifest), "old": manifest.surveyed}


def _count(manifest: Manifest, what: str) -> int:
    """Return one of the manifest's counts; raises BadManifest."""
    found = manifest.source.get(what)
    if not isinstance(found, int) or isinstance(found, bool) or not 0 <= found < 1 << 60:
        raise BadManifest(f"its number of {what} is {found!r}", name=manifest.name)
    return found


def _require_found(root: Root, manifest: Manifest) -> None:
    """Raise BackupNotFound when something that is wanted is not in the archive."""
    if missing := root.missing:
        shown = ", ".join(ascii(key) for key in missing[:20])
        raise BackupNotFound(
            name=shown,
            store="blobdb",
            near=f": not in {manifest.name}"
            + (f", and {len(missing) - 20} more" if len(missing) > 20 else ""),
            hint="Keys are as BlobMeta has them. Nothing was changed.",
        )


def _measure(directory: bytes) -> tuple[int, int]:
    """Count the files below a directory, and their bytes."""
    files = size = 0
    waiting = [directory]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                else:
                    files += 1
                    size += entry.stat(follow_symlinks=False).st_size
    return files, size
