"""Archives of PostgreSQL that have no manifest: what they are is read out of them.

CommCare's scripts have made them since 2016, pg_basebackup or tar underneath, with the paths of their day in front
of the members' names. So the cluster is found by its marks, never by a number of directories.
Facts: postgresql.org/docs/current/continuous-archiving.html; src/include/catalog/pg_control.h.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from tarfile import TarInfo
from typing import Any

from hq_backups.engine import archive
from hq_backups.engine.errors import CorruptBackup, UnsafeArchive
from hq_backups.engine.events import Events
from hq_backups.engine.manifest import Manifest
from hq_backups.engine.postgres import controlfile
from hq_backups.engine.streams import PlainReader

STANDBY_FILES = ("standby.signal", "recovery.signal", "recovery.conf")
_STANDBY_SETTING = re.compile(
    r"\s*(primary_conninfo|primary_slot_name|restore_command)\s*(=|\s)", re.IGNORECASE
)

_KEPT = frozenset(
    ["PG_VERSION", "backup_label", "backup_manifest", "postmaster.pid", "tablespace_map", *STANDBY_FILES]
)
_WAL = re.compile(r"[0-9A-F]{24}\Z")
_WAL_DIRECTORIES = ("pg_wal", "pg_xlog")
_MAX_KEPT = 16 << 10
_MAX_NOTES = 1 << 18
"""Files, WAL segments and links that are remembered, larger ones by the 256 bytes: what bounds memory."""
_CLEANLY_STOPPED = (1, 2)
"""States of the control file: shut down, and shut down in recovery."""


@dataclass
class _Found:
    """What passed of one possible root."""

    files: dict[str, bytes] = field(default_factory=dict)
    """The first bytes of what a cluster's top has, by name; the control file is ``pg_control``."""
    wal: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    members: int = 0

    @property
    def is_cluster(self) -> bool:
        return "PG_VERSION" in self.files and "pg_control" in self.files


def walk(plain: PlainReader, events: Events) -> dict[str, Any]:
    """Read a tar to its end; return ``members``, ``wal_segments`` and ``source``; raises CorruptBackup."""
    found: dict[PurePosixPath, _Found] = {}
    strange: list[PurePosixPath] = []
    everything, notes = 0, 0
    for member in archive.members(plain):
        # tar -P of the old scripts stored the slash; what is unpacked goes below the target all the same.
        member.name = member.name.lstrip("/")
        path = archive.safe_path(member, plain.name)
        everything += 1
        if path is None:
            continue
        notes += _note(found, path, member, plain)
        if not (member.isreg() or member.isdir()):
            strange.append(path)
            notes += 1
        if notes > _MAX_NOTES:
            raise CorruptBackup("it holds the marks of too many clusters", name=plain.name)
        events.progress("verify", plain.tell())
    # Whether the stream itself ends well comes first: what is missing may be missing for that.
    while plain.chunk():
        pass
    root = _root(found, everything, plain.name)
    source = _source(root, found[root], plain.name, events)
    inside = [path for path in strange if root in path.parents]
    if inside:
        raise UnsafeArchive(f"{inside[0]} is neither file nor directory", name=plain.name)
    return {
        "members": everything,
        "wal_segments": len(found[root].wal),
        "source": source,
    }


def _note(
    found: dict[PurePosixPath, _Found], path: PurePosixPath, member: TarInfo, plain: PlainReader
) -> int:
    """Remember a member that tells of a cluster; return how many notes that were."""
    if member.issym() or member.islnk():
        for depth in range(1, min(3, len(path.parts)) + 1):
            above = PurePosixPath(*path.parts[:-depth])
            _at(found, above).links.append(str(path.relative_to(above)))
        return 1
    if not member.isreg():
        return 0
    is_control = path.name == "pg_control" and path.parent.name == "global"
    if is_control or path.name in _KEPT:
        head = _head(plain, member)
        _at(found, path.parent.parent if is_control else path.parent).files[path.name] = head
        return 1 + len(head) // 256
    if path.parent.name in _WAL_DIRECTORIES and _WAL.match(path.name):
        _at(found, path.parent.parent).wal.add(path.name)
        return 1
    return 0


def _at(found: dict[PurePosixPath, _Found], root: PurePosixPath) -> _Found:
    return found.setdefault(root, _Found())


def _head(plain: PlainReader, member: TarInfo) -> bytes:
    """Return a small file's contents, or the beginning of a large one's."""
    wanted = _MAX_KEPT if member.size <= _MAX_KEPT else 32
    return b"".join(bytes(piece) for piece in plain.pieces(min(member.size, wanted)))


def _root(found: dict[PurePosixPath, _Found], members: int, name: str) -> PurePosixPath:
    """Return the shallowest directory that is a cluster."""
    clusters = sorted((r for r in found if found[r].is_cluster), key=lambda r: len(r.parts))
    if not clusters:
        links = sorted({link for each in found.values() for link in each.links})
        if members == 1 and links:
            raise CorruptBackup(
                "it holds a symbolic link and nothing else: not the data behind it", name=name
            )
        marks = {mark for each in found.values() for mark in each.files}
        missing = [m for m in ("PG_VERSION", "pg_control") if m not in marks]
        what = " and ".join(missing).replace("pg_control", "global/pg_control")
        why = f"{what} is not in it" if missing else "PG_VERSION and global/pg_control are not together"
        raise CorruptBackup(f"no PostgreSQL cluster is in it: {why}", name=name)
    root = clusters[0]
    rivals = [str(r) for r in clusters[1:] if root not in r.parents]
    if rivals:
        raise CorruptBackup(
            f"it holds several clusters: {root}, {', '.join(rivals[:5])}",
            name=name,
            hint="Unpack by hand the one that is meant (tar -x, with its path as the last word), "
            "then restore that directory: restore_backup postgres /the/directory",
        )
    return root


def _source(root: PurePosixPath, found: _Found, name: str, events: Events) -> dict[str, Any]:
    version = found.files["PG_VERSION"].decode("ascii", "replace").strip()
    if not re.fullmatch(r"[0-9]{1,2}(\.[0-9])?", version):
        raise CorruptBackup(f"its PG_VERSION says {version[:20]!r}", name=name)
    control = found.files["pg_control"]
    if len(control) < 20 or not any(control):
        raise CorruptBackup("its global/pg_control is empty", name=name)
    _refuse_tablespaces(found, name)
    if not found.wal:
        raise CorruptBackup("no WAL is in it", name=name)
    label = found.files.get("backup_label", b"").decode("utf-8", "replace")
    said = dict(re.findall(r"^([A-Z ]+): (.*)$", label, re.MULTILINE))
    if "backup_label" in found.files:
        _require_wal(found, said, name)
    else:
        _judge_cold(found, control, name, events)
    # 90624 for 9.6.24, 150018 for 15.18 (postgresql.org/docs/current/libpq-status.html); the minor is not known.
    major, _, second = version.partition(".")
    return {
        "version": version,
        "version_num": int(major) * 10000 + int(second or 0) * 100,
        "system_identifier": controlfile.system_identifier(control),
        "tablespaces": [],
        "root": "" if root == PurePosixPath() else str(root),
        "in_recovery": any(f in found.files for f in STANDBY_FILES) or said.get("BACKUP FROM") == "standby",
        "has_label": "backup_label" in found.files,
        "has_file_list": "backup_manifest" in found.files,
        "start_time": said.get("START TIME", "")[:40],
    }


def _refuse_tablespaces(found: _Found, name: str) -> None:
    """Refuse what only refers to files: WAL and tablespaces on other disks."""
    lines = found.files.get("tablespace_map", b"").decode("utf-8", "replace").split("\n")
    mapped = [line for line in lines if line.strip()]
    linked = [link for link in found.links if link.startswith("pg_tblspc/")]
    if mapped or linked:
        raise CorruptBackup(
            f"the cluster had tablespaces ({', '.join((mapped or linked)[:5])}), and their files are not in it",
            name=name,
            hint="Look for <number>.tar.gz beside it, and restore by hand; a backup of now holds tablespaces too.",
        )
    for link in found.links:
        if link in _WAL_DIRECTORIES:
            raise CorruptBackup(f"its {link} is a symbolic link: the WAL behind it is not in it", name=name)


def _require_wal(found: _Found, said: dict[str, str], name: str) -> None:
    """Look for the WAL that was written while the base backup ran: without it, it is worth nothing."""
    match = re.search(r"\(file ([0-9A-F]{24})\)", said.get("START WAL LOCATION", ""))
    if match is None:
        raise CorruptBackup("its backup_label does not say where its WAL begins", name=name)
    if match.group(1) not in found.wal:
        raise CorruptBackup(f"the WAL that it needs, from {match.group(1)} on, is not in it", name=name)


def _judge_cold(found: _Found, control: bytes, name: str, events: Events) -> None:
    """Without a backup_label it is a copy of files: good if the server did not run meanwhile."""
    state = int.from_bytes(control[16:20], sys.byteorder)
    if "postmaster.pid" in found.files or state not in _CLEANLY_STOPPED:
        events.warning(
            "hot-copy",
            f"{name} is a copy of a data directory whose server ran meanwhile or had crashed, and no backup of "
            "the server's own making: it may start and be damaged all the same. Prove it with --deep",
        )


def directory_problem(path: Path) -> str | None:
    """Say why a bare directory cannot be a whole cluster; None when nothing speaks against it."""
    missing = [m for m in ("PG_VERSION", "global/pg_control") if not (path / m).is_file()]
    if missing:
        return f"{' and '.join(missing)} is not in it: its run was killed, or is still going on"
    return None


def wrapper(manifest: Manifest) -> tuple[str, ...]:
    """Return the directories that stand in front of a cluster's files in an archive."""
    return PurePosixPath(str(manifest.source.get("root", ""))).parts if manifest.surveyed else ()


def has_file_list(manifest: Manifest) -> bool:
    """Tell whether a list of the files, with their sums, is in an archive, and is of this very backup.

    Before PostgreSQL 13 there was none. A copy of the files of a cluster that was itself restored once still has
    the list of then.
    """
    return not manifest.surveyed or bool(
        manifest.source.get("has_label") and manifest.source.get("has_file_list")
    )


def make_primary(tree: Path, manifest: Manifest) -> Iterator[str]:
    """Remove from an unpacked tree what would have it follow its old primary; yield what was removed."""
    was_standby = bool(manifest.source.get("in_recovery"))
    if manifest.surveyed and (tree / "postmaster.pid").exists():
        # Of a server that ran while the files were copied: another process may have its number now.
        (tree / "postmaster.pid").unlink()
    for name in STANDBY_FILES:
        if (tree / name).exists():
            was_standby = True
            (tree / name).unlink()
            yield name
    settings = tree / "postgresql.auto.conf"
    if was_standby and settings.is_file():
        lines = settings.read_bytes().decode("utf-8", "surrogateescape").splitlines(keepends=True)
        kept = [line for line in lines if not _STANDBY_SETTING.match(line)]
        if len(kept) != len(lines):
            settings.write_bytes("".join(kept).encode("utf-8", "surrogateescape"))
            yield "the address of its primary from postgresql.auto.conf"
