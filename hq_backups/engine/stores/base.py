"""What every store can do; the verbs know only this."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
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
    """One data store of this host."""

    name: ClassVar[str]
    mode: ClassVar[str]
    looks: ClassVar[str]
    """What an artifact of this mode is, unpacked, in words: ``a tar archive``."""
    counted: ClassVar[str | None] = None
    """The number in a manifest's ``source`` that a backup must not lose most of, beside its bytes."""

    def __init__(self, config: Config, settings: StoreConfig) -> None:
        """Take the whole configuration and this store's part of it; nothing is touched."""
        self.config = config
        self.settings = settings

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
