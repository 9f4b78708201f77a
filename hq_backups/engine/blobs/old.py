"""Archives of blobs that have no manifest, such as CommCare's scripts have made since 2016.

They hold the whole path of the directory, with a slash in front or without. The blobs are what is below the path
that ends in the first ``blobdb``, or below the directory that the archive begins with.
"""

from __future__ import annotations

import os
from typing import Any

from hq_backups.engine.blobs.headers import DIRECTORY, FILE, SYMLINK, Member, inside, members
from hq_backups.engine.blobs.judge import Noted
from hq_backups.engine.errors import BadManifest, CorruptBackup
from hq_backups.engine.events import Events
from hq_backups.engine.manifest import Manifest
from hq_backups.engine.streams import PlainReader

_NAME = b"blobdb"
_COUCH = (b"_dbs.couch", b"_users.couch", b"_replicator.couch")


def walk(plain: PlainReader, events: Events) -> dict[str, Any]:
    """Read a tar to its end; return ``members`` and ``source``; raises CorruptBackup."""
    front: bytes | None = None
    files = directories = size = newest = 0
    strange, outside = Noted(), Noted()
    for member in members(plain):
        name = inside(member.name.lstrip(b"/") or member.name, plain.name)
        if front is None:
            front = _front(member, name, plain.name)
        if not (not front or name == front or name.startswith(front + b"/")):
            outside.add(member.shown)
        elif member.kind == FILE:
            files += 1
            size += member.size
            newest = max(newest, member.mtime)
            if name[len(front) + bool(front) :] in _COUCH:
                raise CorruptBackup(
                    f"it holds {member.shown}: it is a backup of CouchDB, which was once called so",
                    name=plain.name,
                    hint="Move it to CouchDB's backup directory: list_backups couch",
                )
        elif member.kind == DIRECTORY:
            directories += 1
        else:
            strange.add(member.shown)
        events.progress("verify", plain.tell())
    if front is None:
        raise CorruptBackup("its archive is empty", name=plain.name)
    if outside.count:
        raise CorruptBackup(
            f"it holds more than one directory: {outside.listed()} lies not in {os.fsdecode(front)!r}",
            name=plain.name,
        )
    if strange.count:
        events.warning(
            "left-out", f"links and devices are in {plain.name} and are not restored: {strange.listed()}"
        )
    if not files:
        events.warning("no-blobs", f"no blob is in {plain.name}: its directory was empty")
    # A manifest is Unicode, a path need not be.
    source = {"files": files, "directories": directories, "bytes": size, "root": front.decode("latin-1")}
    return {"members": files + directories, "source": source}


def _front(member: Member, name: bytes, archive: str) -> bytes:
    """Return the path that is in front of every blob, by the archive's first member."""
    parts = name.split(b"/")
    if member.kind == SYMLINK:
        raise CorruptBackup(
            f"nothing is in it but the symbolic link {member.shown} to {os.fsdecode(member.target)!r}: the script "
            "archived the link, and not the directory",
            name=archive,
            hint="No blob was ever in it. Choose another backup: list_backups blobdb",
        )
    if _NAME in parts:
        return b"/".join(parts[: parts.index(_NAME) + 1])
    return name if member.kind == DIRECTORY else b""


def strip(manifest: Manifest) -> tuple[str, ...]:
    """Return the directories that an archive has in front of its blobs; raises BadManifest."""
    if not manifest.surveyed:
        return ()
    root = manifest.source.get("root", "")
    if not isinstance(root, str):
        raise BadManifest("its root is no path", name=manifest.name)
    try:
        parts = os.fsdecode(root.encode("latin-1")).split("/")
    except UnicodeEncodeError as error:
        raise BadManifest("its root is no path", name=manifest.name) from error
    return tuple(part for part in parts if part)
