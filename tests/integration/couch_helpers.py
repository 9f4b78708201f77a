"""A CouchDB host as the engine sees it: its node, its backup directory, its bucket, and what ran there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hq_backups.engine.couch.node import Node
from tests.integration.engine_host import ENV, EngineHost
from tests.testbed.couch import CouchNode
from tests.testbed.couch_data import expected
from tests.testbed.s3 import S3Service

OTHER = "couchdb@restored.example"
"""The name of another node than the fixtures'."""


@dataclass
class CouchHost(EngineHost):
    """One host with a node; everything of it is in the node's work directory."""

    store_name = "couch"
    couch: CouchNode
    s3: S3Service | None = None
    bucket: str | None = None
    env: str = ENV
    name: str = "couch0"
    options: dict[str, Any] = field(default_factory=dict)
    store: dict[str, Any] = field(default_factory=dict)
    s3_settings: dict[str, Any] = field(default_factory=dict)

    @property
    def workdir(self) -> Path:
        return self.couch.workdir

    @property
    def data(self) -> Path:
        return self.couch.data_dir

    @property
    def os_user(self) -> str | None:
        return self.couch.os_user

    @property
    def node(self) -> Node:
        return self.couch.node()

    def settings(self) -> dict[str, Any]:
        stop, start = self.couch.commands()
        options = {
            "url": self.couch.url,
            "username": self.couch.username,
            "password": self.couch.password,
            **self.options,
        }
        return {"mode": "tar", "stop_command": stop, "start_command": start, "options": options}

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
