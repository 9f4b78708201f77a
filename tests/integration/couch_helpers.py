"""A CouchDB host as the engine sees it: its node, its backup directory, its bucket, and what ran there."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hq_backups.engine import entry
from hq_backups.engine.config import Config, Job, Retention, S3Config, StoreConfig, to_plain
from hq_backups.engine.couch.node import Node
from hq_backups.engine.entry import run_job
from hq_backups.engine.errors import Exit
from hq_backups.engine.events import Event
from hq_backups.engine.requests import (
    BackupRequest,
    CatalogRequest,
    RestoreRequest,
    Selection,
    UndoRequest,
    VerifyRequest,
)
from tests.integration.pg_helpers import Outcome
from tests.testbed.couch import CouchNode
from tests.testbed.couch_data import expected
from tests.testbed.places import IS_ROOT
from tests.testbed.process import as_user, give
from tests.testbed.s3 import S3Service

ENV = "icds_new_prod"
OTHER = "couchdb@restored.example"
"""The name of another node than the fixtures'."""


@dataclass
class CouchHost:
    """One host with a node; everything of it is in the node's work directory."""

    couch: CouchNode
    s3: S3Service | None = None
    bucket: str | None = None
    env: str = ENV
    name: str = "couch0"
    options: dict[str, Any] = field(default_factory=dict)
    """Changes to the store's options."""
    store: dict[str, Any] = field(default_factory=dict)
    """Changes to the store's configuration."""

    def __post_init__(self) -> None:
        if not self.backups.is_dir():
            self.backups.mkdir(mode=0o700)
            give(self.backups, self.couch.os_user)

    @property
    def backups(self) -> Path:
        return self.couch.workdir / "backups"

    @property
    def data(self) -> Path:
        return self.couch.data_dir

    @property
    def node(self) -> Node:
        return self.couch.node()

    @property
    def config(self) -> Config:
        stop, start = self.couch.commands()
        options = {
            "url": self.couch.url,
            "username": self.couch.username,
            "password": self.couch.password,
            **self.options,
        }
        settings = {
            "store": "couch",
            "mode": "tar",
            "backup_dir": self.backups,
            "data_dir": self.data,
            "retention": Retention(),
            "s3": self.bucket is not None,
            "bucket": self.bucket,
            "stop_command": stop,
            "start_command": start,
            "options": options,
            **self.store,
        }
        s3 = None
        if self.s3 is not None:
            s3 = S3Config(
                access_key=self.s3.access_key, secret_key=self.s3.secret_key, endpoint=self.s3.endpoint
            )
        return Config(self.env, self.name, timezone="UTC", s3=s3, stores={"couch": StoreConfig(**settings)})

    def but(self, **changes: Any) -> CouchHost:
        """Return the same host, differently configured."""
        return dataclasses.replace(self, **changes)

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
        # In this process root wrote them; the app has a child of the node's user do it.
        for path in self.backups.iterdir() if self.backups.is_dir() else ():
            give(path, self.couch.os_user)
        return Outcome(code, events)

    def run_as_owner(self, verb: str, request: Any) -> Outcome:
        """Run a job as the node's user: in a child when that is another one."""
        if not IS_ROOT:
            return self.run(verb, request)
        child = subprocess.Popen(
            [sys.executable, "-I", entry.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd="/",
            env={"PATH": os.defpath, "LC_ALL": "C.UTF-8"},
            **as_user(self.couch.os_user),
        )
        out, _ = child.communicate(self.job(verb, request).to_json().encode() + b"\n", timeout=120)
        return Outcome(Exit(child.returncode), [Event.from_json(line) for line in out.decode().splitlines()])

    def backup(self, type_: str = "daily", **request: Any) -> Outcome:
        return self.run(
            "backup", BackupRequest("couch", type_, **{"upload": self.bucket is not None, **request})
        )

    def good_backup(self, type_: str = "daily", **request: Any) -> Outcome:
        done = self.backup(type_, **request)
        assert done.code is Exit.OK, done
        return done

    def catalog(self, source: str = "all") -> list[Mapping[str, Any]]:
        done = self.run("catalog", CatalogRequest(("couch",), source))
        assert done.code is Exit.OK, done
        return done.of("entry")

    def restore(
        self, name: str = "latest", *, select: Mapping[str, Any] | None = None, **request: Any
    ) -> Outcome:
        return self.run("restore", RestoreRequest(Selection("couch", name, **(select or {})), **request))

    def undo(self, **request: Any) -> Outcome:
        return self.run("undo", UndoRequest("couch", **request))

    def verify(
        self, name: str = "latest", *, select: Mapping[str, Any] | None = None, deep: bool = False
    ) -> Outcome:
        return self.run("verify", VerifyRequest(Selection("couch", name, **(select or {})), deep))

    # Looking around

    @property
    def artifact(self) -> Path:
        (path,) = (p for p in self.backups.iterdir() if not p.name.startswith("."))
        return path

    def leftovers(self) -> list[str]:
        """Return what of runs remains in the backup directory: hidden files that are no manifests."""
        hidden = [p.name for p in self.backups.iterdir() if p.name.startswith(".")]
        return sorted(n for n in hidden if not n.endswith((".gz.json", ".verified.json")))

    def beside(self) -> list[str]:
        """Return what a restore left beside the data directory, but for locks."""
        ours = self.data.name
        return sorted(
            p.name
            for p in self.data.parent.iterdir()
            if p.name.lstrip(".").startswith(ours) and not p.name.endswith(".lock")
        )


def digest(docs: list[dict[str, Any]]) -> str:
    """Return a digest as the fixtures' were made: of the documents' JSON in the order of their ids."""
    ordered = sorted(docs, key=lambda doc: doc["_id"])
    text = "".join(json.dumps(doc, sort_keys=True) for doc in ordered)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def told(node: Node, databases: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what a node says of each of some databases, in the fixtures' form."""
    made = {}
    for db in databases:
        docs = node.read_docs(db, limit=1000)
        present, gone = node.counts(db)
        made[db] = {"rows": len(docs), "doc_count": present, "doc_del_count": gone, "digest": digest(docs)}
    return made


def assert_serves(node: Node, moment: str) -> None:
    """Compare all that a node says with what the real one said at "t0" or "t1"."""
    assert sorted(node.databases()) == sorted(expected(moment))
    assert told(node, expected(moment)) == expected(moment)
