"""A host that backs Elasticsearch up: a node, its settings, and the commands as an operator types them."""

from __future__ import annotations

import io
import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from django.core.management import call_command
from django.test import override_settings

from tests.conftest import require_service
from tests.testbed.elasticsearch import ElasticsearchNode
from tests.testbed.process import short_directory

ENV = "monolith"
REPOSITORY = "monolith_es_snapshot"


@dataclass
class Ended:
    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err


@dataclass
class Host:
    """The commands of a host with settings of its own."""

    node: ElasticsearchNode
    home: Path
    settings: dict[str, Any] = field(default_factory=dict)

    def run(self, *words: str, **changes: Any) -> Ended:
        out, err = io.StringIO(), io.StringIO()
        with (
            override_settings(HQ_BACKUPS={**self.settings, **changes}, SERVER_ENVIRONMENT=ENV),
            pytest.raises(SystemExit) as ended,
        ):
            call_command(*words, stdout=out, stderr=err)
        assert isinstance(ended.value.code, int)
        return Ended(ended.value.code, out.getvalue(), err.getvalue())

    def good(self, *words: str, **changes: Any) -> Ended:
        ended = self.run(*words, **changes)
        assert ended.code == 0, ended.text
        return ended

    def restore(self, *words: str, **changes: Any) -> Ended:
        confirmed = ("--noinput", "--confirm-env", ENV)
        return self.run("restore_backup", "elasticsearch", *words, *confirmed, **changes)

    def entries(self, **changes: Any) -> list[dict[str, Any]]:
        """Return the catalog, oldest first."""
        found: list[dict[str, Any]] = json.loads(
            self.good("list_backups", "elasticsearch", "--json", **changes).out
        )
        return found

    @property
    def records(self) -> Path:
        return Path(self.settings["elasticsearch_backup_dir"])

    @property
    def repository(self) -> Path:
        """Return the directory that the snapshots lie in."""
        return self.node.repositories / str(self.settings["es_repository_location"])


@contextmanager
def own_node(version: int, **settings: str) -> Iterator[ElasticsearchNode]:
    """Run a node of a test's own, with some settings of its own."""
    reason = ElasticsearchNode.unavailable(version)
    require_service(f"Elasticsearch {version}", not reason, reason)
    with short_directory() as workdir, ElasticsearchNode(version, workdir / "es", settings=settings) as made:
        yield made


@contextmanager
def host_of(node: ElasticsearchNode) -> Iterator[Host]:
    """Make a host for an empty node, with a repository directory of its own."""
    node.wipe()
    with short_directory() as home:
        location = f"r{secrets.token_hex(4)}"
        yield Host(
            node,
            home,
            {
                "deploy_env": ENV,
                "backup_postgres": False,
                "es_local_repo": True,
                "es_repository_location": location,
                "elasticsearch_url": node.url,
                "elasticsearch_backup_dir": str(home / "records"),
                "elasticsearch_data_dir": str(node.data),
                "backup_host_name": "es0",
            },
        )
        node.wipe()


def fill(node: ElasticsearchNode, *, documents: int = 30) -> None:
    """Make three small indices, one with an alias, one with a mapping of nested documents."""
    kind = {} if node.version > 6 else {"_doc": {}}
    nested = {"properties": {"parts": {"type": "nested", "properties": {"n": {"type": "long"}}}}}
    for name, shards in (("forms", 2), ("cases", 1), ("users.2024", 1)):
        settings = {"number_of_shards": shards, "number_of_replicas": 1, "refresh_interval": "5s"}
        body: dict[str, Any] = {"settings": settings}
        if name == "cases":
            body["mappings"] = {"_doc": nested} if kind else nested
        node.request("PUT", f"/{name}", body)
        rows = {
            str(n): {"name": f"{name}-{n}", "parts": [{"n": n}, {"n": n + 1}]}
            if name == "cases"
            else {"name": f"{name}-{n}"}
            for n in range(documents)
        }
        node.bulk(name, rows)
    node.request("POST", "/_aliases", {"actions": [{"add": {"index": "forms", "alias": "all-forms"}}]})


def contents(node: ElasticsearchNode) -> dict[str, Any]:
    """Return everything that an operator would miss: documents by a scan, mappings, settings, aliases."""
    found = {}
    for index in node.indices():
        settings = node.request("GET", f"/{index}/_settings")[index]["settings"]["index"]
        for changing in ("uuid", "creation_date", "version", "provided_name", "resize", "routing", "history"):
            settings.pop(changing, None)
        found[index] = {
            "documents": node.documents(index),
            "mappings": node.request("GET", f"/{index}/_mapping")[index]["mappings"],
            "settings": settings,
            "aliases": node.request("GET", f"/{index}/_alias")[index]["aliases"],
        }
    return found
