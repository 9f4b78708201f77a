"""What every store can do; the verbs know only this."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, Protocol

from hq_backups.engine.config import Config, StoreConfig
from hq_backups.engine.control import Service
from hq_backups.engine.errors import UsageError
from hq_backups.engine.events import Events
from hq_backups.engine.manifest import Manifest
from hq_backups.engine.requests import BlobRecord, RestoreRequest
from hq_backups.engine.streams import PlainReader


@dataclass(frozen=True)
class Prepared:
    """What a store found out before a backup."""

    estimate: int
    """Plain bytes to expect; 0 when ``unknown``."""
    source: Mapping[str, Any]
    tools: Mapping[str, str] = field(default_factory=dict)
    spool: int = 0
    """Bytes that must lie in the backup directory for a while, beside the artifact itself."""
    unknown: bool = False
    """Whether nothing tells how much to expect."""


@dataclass(frozen=True)
class Outer:
    """A directory of the source that lay outside its data directory, such as a tablespace."""

    id: str
    """What the archive calls it."""
    location: Path
    """Where the source had it."""
    size: int = 0
    """Bytes, as far as they are known."""


@dataclass(frozen=True)
class Destination:
    """Where an artifact is unpacked to."""

    tree: Path
    """An empty directory: the new data directory."""
    outer: Mapping[str, Path] = field(default_factory=dict)
    """An empty directory for each of the manifest's outer directories, by id."""
    replaces: Path | None = None
    """The data directory whose place the tree will take; it may be there, and in use."""
    only: tuple[str, ...] = ()
    """The parts that are wanted, by the store's names for them; empty means everything."""


@dataclass(frozen=True)
class Part:
    """One of several artifacts that are restored as one."""

    manifest: Manifest
    location: Mapping[str, Any]


class Stream(Protocol):
    """A store's bytes, watched as they pass."""

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill ``buffer``; 0 only when the producer has ended well."""

    def finish(self) -> Mapping[str, Any]:
        """Return facts for the manifest; raises when what passed is not whole."""


class Store(ABC):
    """One data store of this host: what every kind of store has."""

    name: ClassVar[str]
    mode: ClassVar[str]
    counted: ClassVar[str | None] = None
    """The number in a manifest's ``source`` that a backup must not lose most of, beside its bytes."""

    def __init__(self, config: Config, settings: StoreConfig) -> None:
        """Take the whole configuration and this store's part of it; nothing is touched."""
        self.config = config
        self.settings = settings


class StreamStore(Store):
    """A store that is backed up as a stream of bytes, into a file and an object of ours."""

    looks: ClassVar[str]
    """What an artifact of this mode is, unpacked, in words: ``a tar archive``."""

    @abstractmethod
    def prepare(self, last: Manifest | None, events: Events) -> Prepared:
        """Check access, tools and versions before a backup; raises PreflightFailed.

        ``last`` is the newest good backup of this mode, by which some stores guess how large the next will be.
        """

    @abstractmethod
    def open_stream(
        self, prepared: Prepared, run: str, *, accept_bad_pages: bool = False
    ) -> AbstractContextManager[Stream]:
        """Begin the backup's one pass."""

    # What follows serves verify and restore.

    @classmethod
    @abstractmethod
    def recognises(cls, head: bytes) -> bool:
        """Tell by its first plain bytes, 1024 at most, whether an artifact without a manifest is of this mode."""

    @classmethod
    def lookalike(cls, head: bytes) -> tuple[str, str] | None:
        """Say what such bytes are that are mistaken for a backup of this mode, and what to do with them."""
        return None

    @abstractmethod
    def walk(self, plain: PlainReader, manifest: Manifest | None, events: Events) -> Mapping[str, Any]:
        """Read an archive to its end and check what must be in it; raises CorruptBackup.

        Returns ``members``, how many it has, and for one without a manifest ``source``: what it tells of the
        server that it was taken from.
        """

    def expect(self, records: tuple[BlobRecord, ...]) -> None:
        """Take records of what the next walk or deep check must find."""
        raise UsageError(f"there are no records of {self.name} to compare a backup with")

    def unpacked_size(self, manifest: Manifest) -> int:
        """Return the bytes that an artifact takes when it is unpacked, outer directories included."""
        return manifest.plain_size + manifest.plain_size // 50

    def directory_problem(self, path: Path) -> str | None:
        """Say why a bare directory, found among the backups, is no whole one; None when it may be."""
        return "a bare directory cannot be restored"

    def outer(self, manifest: Manifest) -> tuple[Outer, ...]:
        """Return the directories that an artifact holds beside its data directory."""
        return ()

    def outside(self, tree: Path) -> list[Path]:
        """Return the directories outside a data directory that belong to it, and to nothing else."""
        return []

    def unite(self, parts: Sequence[Part]) -> Manifest:
        """Return the manifest of what several artifacts are together; its sha256 stands for all of theirs."""
        raise UsageError(f"backups of {self.name} cannot be restored several at once", hint="Name one.")

    def parts(self, manifest: Manifest) -> Sequence[Part]:
        """Return the artifacts that such a manifest is of; none for that of a single one."""
        return ()

    def join(self, tree: Path, trees: Sequence[Path], manifest: Manifest, events: Events) -> None:
        """Make one data directory, ``tree``, of the unpacked parts, which lie in it; raises CorruptBackup."""
        raise NotImplementedError

    @abstractmethod
    def unpack(self, plain: PlainReader, spot: Destination, manifest: Manifest, events: Events) -> None:
        """Unpack an archive into empty directories; raises CorruptBackup."""

    @abstractmethod
    def check_unpacked(self, target: Path, manifest: Manifest, events: Events) -> None:
        """Check and make ready an unpacked tree, as its owner; raises CorruptBackup."""

    def check_deep(self, manifest: Manifest) -> None:
        """Check that what a deep check starts is here, before anything is unpacked; raises PreflightFailed."""
        return

    @abstractmethod
    def deep_check(self, tree: Path, manifest: Manifest, events: Events) -> None:
        """Read all that an unpacked tree holds, with a server of our own where there is one; raises CorruptBackup."""

    @abstractmethod
    def clean_scratch(self, tree: Path) -> None:
        """Stop whatever a killed deep check left running on ``tree``."""

    @abstractmethod
    def target(self) -> Path:
        """Return the data directory that a restore replaces."""

    @abstractmethod
    def owner(self) -> str:
        """Return the system user whom the data belongs to."""

    def tree_mode(self, manifest: Manifest) -> int:
        """Return the mode of a data directory that takes the place of none."""
        return 0o700

    @abstractmethod
    def check_restore(self, manifest: Manifest, request: RestoreRequest, events: Events) -> Mapping[str, Any]:
        """Check that this host can serve the artifact, or only hold it when ``request`` names a target directory.

        Returns facts for the plan, raises PreflightFailed.
        """

    def check_in_place(
        self, manifest: Manifest, request: RestoreRequest, events: Events
    ) -> Mapping[str, Any]:
        """Check that an artifact can be loaded into the running server; returns facts for the plan."""
        raise UsageError(
            f"a backup of {self.name} in mode {self.mode} cannot be restored with --in-place",
            hint="Leave --in-place out: the data directory is replaced, and the old one kept.",
        )

    def loader(self) -> str | None:
        """Return who must load in place, as chown(1) spells it; None means whoever conducts the restore."""
        return None

    def check_load(
        self, plain: PlainReader, manifest: Manifest, request: RestoreRequest, events: Events
    ) -> None:
        """Read an artifact to its end before it is loaded in place; raises CorruptBackup and PreflightFailed."""
        self.walk(plain, manifest, events)

    def load_in_place(
        self, plain: PlainReader, manifest: Manifest, request: RestoreRequest, events: Events
    ) -> None:
        """Load an artifact into the running server; what was there is gone."""
        raise NotImplementedError

    @abstractmethod
    def service(self, manifest: Manifest | None) -> Service:
        """Return how this store's server is stopped and started."""

    @abstractmethod
    def check_serving(
        self, manifest: Manifest | None, request: RestoreRequest | None, events: Events
    ) -> None:
        """Make the started server serve the restored data, and check that it does; raises ServiceError.

        Both are None after an undo: the server then serves what it served before.
        """

    @abstractmethod
    def next_steps(self, manifest: Manifest | None = None) -> list[str]:
        """Return what an operator does after a restore; without a manifest, after one was taken back."""


@dataclass(frozen=True)
class Kept:
    """One snapshot as the repository of a server lists it."""

    name: str
    identity: str
    """What tells it from a later one of the same name."""
    taken_at: datetime | None = None
    """UTC; None when that cannot be read."""
    problem: str | None = None
    size: int = 0
    """0 while nothing tells it."""


@dataclass(frozen=True)
class Situation:
    """What a restore of parts of a snapshot would meet."""

    parts: tuple[str, ...]
    """What is restored, by the store's names."""
    live: tuple[str, ...]
    """Those that are there now and can be saved first."""
    lost: tuple[str, ...]
    """Those that are there and too damaged to be saved."""
    facts: Mapping[str, Any]
    free: int
    needed: int
    largest: int = 0


class SnapshotStore(Store):
    """A store whose server makes its backups itself and keeps them in a repository of its own: ours to conduct."""

    @property
    @abstractmethod
    def medium(self) -> str:
        """Return what stands for the repository's place where a source is chosen: local or s3."""

    @abstractmethod
    def location(self, name: str) -> dict[str, Any]:
        """Return where a snapshot lies; its ``kind`` is ``snapshot``."""

    @abstractmethod
    def prepare(self, events: Events, only: Collection[str] = (), *, dry_run: bool = False) -> Prepared:
        """Check access, the repository and that all data, or ``only`` some, are whole; raises PreflightFailed."""

    @abstractmethod
    def new_name(self, started: datetime, taken: Collection[str], purpose: str = "") -> str:
        """Return a free name; ``started`` is in the host's time zone."""

    @abstractmethod
    def take(self, name: str, prepared: Prepared, events: Events) -> Mapping[str, Any]:
        """Take a snapshot and return its ``source`` with its ``bytes``; raises when it is not whole."""

    @abstractmethod
    def kept(self, events: Events, *, register: bool = False) -> list[Kept]:
        """Return what the repository holds, in a bounded number of requests; raises when it cannot be read.

        With ``register`` the server is told of the repository where it does not know it yet.
        """

    @abstractmethod
    def survey(self, name: str) -> Mapping[str, Any]:
        """Return the ``source`` of a snapshot that has no manifest, with its ``bytes``; raises CorruptBackup."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove one snapshot."""

    @abstractmethod
    def check(self, manifest: Manifest) -> str:
        """Read a snapshot's metadata and compare them with its manifest; raises CorruptBackup."""

    @abstractmethod
    def parts(self, manifest: Manifest) -> dict[str, int]:
        """Return what a snapshot is restored by, and the bytes of each."""

    @abstractmethod
    def situation(self, manifest: Manifest, request: RestoreRequest) -> Situation:
        """Say what a restore would meet; raises PreflightFailed when it cannot be done."""

    @abstractmethod
    def present(self, parts: Collection[str]) -> dict[str, str]:
        """Return which of some parts are there, and how each is, in words."""

    @abstractmethod
    def try_out(self, manifest: Manifest, part: str, scratch: str, events: Events) -> int:
        """Restore a part under a name of its own, judge it and remove it; raises CorruptBackup."""

    @abstractmethod
    def put_beside(self, manifest: Manifest, part: str, name: str, events: Events) -> int:
        """Restore a part under another name, to stay; raises CorruptBackup, and then leaves none."""

    @abstractmethod
    def replace(self, manifest: Manifest, part: str, events: Events) -> int:
        """Restore a part under its own name, over what is there; raises CorruptBackup."""

    @abstractmethod
    def drop(self, part: str) -> None:
        """Remove a part that a restore made."""

    @abstractmethod
    def scratch(self, run: str) -> str:
        """Return how the names of everything begin that a run makes and removes again."""

    @abstractmethod
    def clean_scratch(self, prefix: str) -> list[str]:
        """Remove what a killed run left under such names; return it."""

    @abstractmethod
    def next_steps(self, parts: Sequence[str] = ()) -> list[str]:
        """Return what an operator does after a restore."""
