"""A host as the engine sees it: one store with its backup directory and its bucket, and what ran there."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from hq_backups.engine import entry
from hq_backups.engine.config import Config, Job, Retention, S3Config, StoreConfig, to_plain
from hq_backups.engine.entry import run_job
from hq_backups.engine.errors import Exit
from hq_backups.engine.events import Event
from hq_backups.engine.requests import (
    BackupRequest,
    CatalogRequest,
    RestoreRequest,
    Selection,
    UndoRequest,
    UploadRequest,
    VerifyRequest,
)
from tests.testbed.places import IS_ROOT
from tests.testbed.process import as_user, give
from tests.testbed.s3 import S3Service

ENV = "icds_new_prod"
"""Underscores, as in HQ's own names."""


@dataclass(repr=False)
class Outcome:
    """What a run said and how it ended."""

    code: Exit
    events: list[Event]

    def of(self, kind: str) -> list[Mapping[str, Any]]:
        return [event.data for event in self.events if event.kind == kind]

    @property
    def error(self) -> str:
        """Return what went wrong and what to do about it, as an operator reads it."""
        return "\n".join(f"{e['code']}: {e['message']} >> {e['hint']}" for e in self.of("error"))

    @property
    def warnings(self) -> set[str]:
        return {str(w["code"]) for w in self.of("warning")}

    @property
    def manifest(self) -> Mapping[str, Any]:
        return next(a["manifest"] for a in self.of("artifact") if "sha256" in a["manifest"])

    @property
    def key(self) -> str:
        return next(str(a["location"]["key"]) for a in self.of("artifact") if a["location"]["kind"] == "s3")

    @property
    def version_id(self) -> str | None:
        places = [a["location"] for a in self.of("artifact") if a["location"]["kind"] == "s3"]
        return places[0]["version_id"]

    def __repr__(self) -> str:
        return "\n".join(
            [repr(self.code), *(f"{e.kind} {dict(e.data)}" for e in self.events if e.kind != "progress")]
        )


class EngineHost(ABC):
    """One store of one host; a subclass is a dataclass with these fields and the store's server."""

    store_name: str
    s3: S3Service | None
    bucket: str | None
    env: str
    name: str
    options: dict[str, Any]
    """Changes to the store's options."""
    store: dict[str, Any]
    """Changes to the store's configuration."""
    s3_settings: dict[str, Any]

    def __post_init__(self) -> None:
        if not self.backups.is_dir():
            self.backups.mkdir(mode=0o700)
            give(self.backups, self.os_user)

    @property
    @abstractmethod
    def workdir(self) -> Path:
        """Return the directory that everything of the host is in."""

    @property
    @abstractmethod
    def data(self) -> Path:
        """Return the data directory."""

    @property
    @abstractmethod
    def os_user(self) -> str | None:
        """Return whom the server runs as."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return what the store's configuration has beside its directories and its bucket."""

    @property
    def backups(self) -> Path:
        return self.workdir / "backups"

    @property
    def config(self) -> Config:
        settings = {
            "store": self.store_name,
            "backup_dir": self.backups,
            "data_dir": self.data,
            "retention": Retention(),
            "s3": self.bucket is not None,
            "bucket": self.bucket,
            **self.settings(),
            **self.store,
        }
        s3 = None
        if self.s3 is not None:
            keys = {
                "access_key": self.s3.access_key,
                "secret_key": self.s3.secret_key,
                "endpoint": self.s3.endpoint,
            }
            s3 = S3Config(**{**keys, **self.s3_settings})
        stores = {self.store_name: StoreConfig(**settings)}
        return Config(self.env, self.name, timezone="UTC", s3=s3, stores=stores)

    def but(self, **changes: Any) -> Self:
        """Return the same host, differently configured."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    def job(self, verb: str, request: Any, run: str | None = None) -> Job:
        # Through JSON, as it travels: what does not survive that is found here.
        return Job.from_json(Job(verb, self.config, to_plain(request), run).to_json())

    def run(self, verb: str, request: Any, *, watch: Callable[[Event], None] | None = None) -> Outcome:
        """Run a job in this process."""
        events: list[Event] = []

        def sink(event: Event) -> None:
            json.loads(event.to_json())
            events.append(event)
            if watch is not None:
                watch(event)

        code = run_job(self.job(verb, request), sink)
        assert events[-1].kind == "result"
        assert events[-1].data["exit"] == code
        # In this process root wrote them; the app has a child of the server's user do it.
        for path in self.backups.iterdir() if self.backups.is_dir() else ():
            give(path, self.os_user)
        return Outcome(code, events)

    def run_as_owner(self, verb: str, request: Any) -> Outcome:
        """Run a job as the server's user: in a child when that is another one."""
        if not IS_ROOT:
            return self.run(verb, request)
        child = self.start_child(verb, request, user=self.os_user)
        out, _ = child.communicate(timeout=120)
        events = [Event.from_json(line) for line in out.decode().splitlines()]
        return Outcome(Exit(child.returncode), events)

    def start_child(self, verb: str, request: Any, *, user: str | None = None) -> subprocess.Popen[bytes]:
        """Start the engine as the bridge does."""
        child = subprocess.Popen(
            [sys.executable, "-I", entry.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd="/",
            env={"PATH": os.defpath, "LC_ALL": "C.UTF-8"},
            **as_user(user),
        )
        assert child.stdin is not None
        child.stdin.write(self.job(verb, request).to_json().encode() + b"\n")
        child.stdin.flush()
        return child

    def backup(self, type_: str = "daily", **request: Any) -> Outcome:
        return self.run(
            "backup", BackupRequest(self.store_name, type_, **{"upload": self.bucket is not None, **request})
        )

    def good_backup(self, type_: str = "daily", **request: Any) -> Outcome:
        done = self.backup(type_, **request)
        assert done.code is Exit.OK, done
        return done

    def catalog(self, source: str = "all") -> list[Mapping[str, Any]]:
        done = self.run("catalog", CatalogRequest((self.store_name,), source))
        assert done.code is Exit.OK, done
        return done.of("entry")

    def restore(
        self, name: str = "latest", *, select: Mapping[str, Any] | None = None, **request: Any
    ) -> Outcome:
        return self.run("restore", self.restore_request(name, select=select, **request))

    def restore_request(
        self, name: str = "latest", *, select: Mapping[str, Any] | None = None, **request: Any
    ) -> RestoreRequest:
        return RestoreRequest(Selection(self.store_name, name, **(select or {})), **request)

    def undo(self, **request: Any) -> Outcome:
        return self.run("undo", UndoRequest(self.store_name, **request))

    def upload(self) -> Outcome:
        return self.run("upload", UploadRequest(self.store_name))

    def verify(
        self, name: str = "latest", *, select: Mapping[str, Any] | None = None, deep: bool = False
    ) -> Outcome:
        return self.run("verify", VerifyRequest(Selection(self.store_name, name, **(select or {})), deep))

    # Looking around

    @property
    def artifact(self) -> Path:
        (path,) = (p for p in self.backups.iterdir() if not p.name.startswith("."))
        return path

    def leftovers(self) -> list[str]:
        """Return what of runs remains in the backup directory: hidden files that are no manifests."""
        hidden = [p.name for p in self.backups.iterdir() if p.name.startswith(".")]
        return sorted(n for n in hidden if not n.endswith((".gz.json", ".verified.json")))
