"""What is asked of each verb: one frozen dataclass per verb, carried in a Job as plain JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class BackupRequest:
    """Make one artifact of one store."""

    store: str
    type: str = "manual"
    upload: bool = True
    prune: bool = True
    accept_shrink: bool = False
    accept_bad_pages: bool = False
    """Make a backup of a server with damaged pages too, and mark it."""
    dry_run: bool = False


@dataclass(frozen=True)
class CatalogRequest:
    """List the artifacts of some stores."""

    stores: tuple[str, ...] = ()
    """Empty means every configured one."""
    source: str = "all"
    """local, s3 or all."""
    since: str | None = None
    """A local date, ``2026-11-22``."""


@dataclass(frozen=True)
class Selection:
    """Which artifact is meant: a name, a path, a key or ``latest``."""

    store: str
    name: str = "latest"
    source: str | None = None
    """local or s3; None means the local one when there are both."""
    host: str | None = None
    version_id: str | None = None


@dataclass(frozen=True)
class RestoreRequest:
    """Put an artifact back, or with ``plan_only`` say how that would be done."""

    selection: Selection
    target_dir: Path | None = None
    """Unpack there and touch nothing that runs."""
    staging_dir: Path | None = None
    plan_only: bool = False
    expected_sha256: str | None = None
    """The artifact that was confirmed: another one by now is refused."""
    from_env: str | None = None
    """The other environment whose data may be put here, by name."""
    disconnect: bool = False
    in_place: bool = False
    """Load a dump into the running server, whose directory is not ours."""
    recreate: bool = False
    """In place: drop what the server holds first."""
    merge: bool = False
    """Add what is missing to the data that are there; nothing that is there is changed."""
    only: tuple[str, ...] = ()
    """Only these parts of the artifact, by the names that its store gives them."""
    new_node: str | None = None
    """The name that the restored node must have; None means whatever it calls itself."""
    also: tuple[str, ...] = ()
    """Artifacts of other nodes of the same cluster, by name, path or key: all become one."""
    indices: tuple[str, ...] = ()
    """Only these indices of a snapshot; empty means all of them."""
    rename_prefix: str | None = None
    """Restore under other names, which begin so, and leave what is live alone."""
    surveyed: Mapping[str, Any] | None = None
    """What a plan read out of an archive without a manifest, so that it is not read twice for that."""


@dataclass(frozen=True)
class UndoRequest:
    """Put back what a restore set aside, or finish what a kill left between two renames."""

    store: str
    plan_only: bool = False


@dataclass(frozen=True)
class BlobRecord:
    """What HQ's database says of one blob."""

    key: str
    size: int
    """Bytes that it takes on the disk, compressed where it is."""
    created: str
    """UTC, ``2026-11-22T00:00:02Z``."""


@dataclass(frozen=True)
class VerifyRequest:
    """Prove that an artifact is whole; deep: by starting a server on it."""

    selection: Selection
    deep: bool = False
    records: tuple[BlobRecord, ...] = ()
    """What of the source's own records must be in it."""


@dataclass(frozen=True)
class PruneRequest:
    """Remove local artifacts that retention no longer asks for."""

    store: str
    manual_older_than: int | None = None
    """Days; None keeps every manual one."""
    dry_run: bool = False


@dataclass(frozen=True)
class UploadRequest:
    """Send what the bucket still lacks."""

    store: str


@dataclass(frozen=True)
class CheckRequest:
    """Judge what one store's bucket holds."""

    store: str
    nadir_hour: int = 0
    """The local hour at which backups start."""
    host: str | None = None
    """Whose backups count; None means anybody's, where the store's data are on no known host."""
    status_file: bool = True
    """Whether it is told in the backup directory too."""
    notes: tuple[str, ...] = ()
    """What the status file says beside the findings, such as that nobody can be mailed."""
    only_notes: bool = False
    """Change them in the status file that stands, and ask nobody."""


@dataclass(frozen=True)
class UnpackRequest:
    """A restore's data work, done as the store's user: unpack into a directory that exists and is empty."""

    manifest: Mapping[str, Any]
    location: Mapping[str, Any]
    target: Path
    outer: Mapping[str, Path] = field(default_factory=dict)
    replaces: Path | None = None
    only: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoadRequest:
    """A restore's work on live data, done as whom the store names for it."""

    manifest: Mapping[str, Any]
    location: Mapping[str, Any]
    restore: RestoreRequest
