"""What every store can do; the verbs know only this."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from hq_backups.engine.config import Config, StoreConfig
from hq_backups.engine.control import Service
from hq_backups.engine.events import Events
from hq_backups.engine.manifest import Manifest
from hq_backups.engine.streams import PlainReader


@dataclass(frozen=True)
class Prepared:
    """What a store found out before a backup."""

    estimate: int
    """Plain bytes to expect."""
    source: Mapping[str, Any]
    tools: Mapping[str, str] = field(default_factory=dict)


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

    def __init__(self, config: Config, settings: StoreConfig) -> None:
        """Take the whole configuration and this store's part of it; nothing is touched."""
        self.config = config
        self.settings = settings

    @abstractmethod
    def prepare(self, events: Events) -> Prepared:
        """Check access, tools and versions before a backup; raises PreflightFailed."""

    @abstractmethod
    def open_stream(self, prepared: Prepared, run: str) -> AbstractContextManager[Stream]:
        """Begin the backup's one pass."""

    # What follows serves verify and restore.

    @abstractmethod
    def walk(self, plain: PlainReader, events: Events) -> Mapping[str, Any]:
        """Read an archive to its end and check what must be in it; raises CorruptBackup."""

    @abstractmethod
    def unpack(self, plain: PlainReader, target: Path, events: Events) -> None:
        """Unpack an archive into the empty directory ``target``."""

    @abstractmethod
    def check_unpacked(self, target: Path, manifest: Manifest, events: Events) -> None:
        """Check and make ready an unpacked tree, as its owner; raises CorruptBackup."""

    @abstractmethod
    def deep_check(self, tree: Path, manifest: Manifest, events: Events) -> None:
        """Start a server of our own on an unpacked tree and compare its contents; raises CorruptBackup."""

    @abstractmethod
    def clean_scratch(self, tree: Path) -> None:
        """Stop whatever a killed deep check left running on ``tree``."""

    @abstractmethod
    def target(self) -> Path:
        """Return the data directory that a restore replaces."""

    @abstractmethod
    def owner(self) -> str:
        """Return the system user whom the data belongs to."""

    @abstractmethod
    def check_restore(self, manifest: Manifest, events: Events, *, in_place: bool) -> Mapping[str, Any]:
        """Check that this host can serve the artifact; returns facts for the plan, raises PreflightFailed."""

    @abstractmethod
    def service(self, manifest: Manifest | None) -> Service:
        """Return how this store's server is stopped and started."""

    @abstractmethod
    def check_serving(self, manifest: Manifest | None, events: Events) -> None:
        """Check that the started server answers with the restored data; raises ServiceError."""

    @abstractmethod
    def next_steps(self) -> list[str]:
        """Return what an operator does after a restore."""
