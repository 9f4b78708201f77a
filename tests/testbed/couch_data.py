"""Make data directories of CouchDB nodes: from a real node's, or from documents."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.testbed.couch_writer import write_couch
from tests.testbed.process import give, run_here

FIXTURES = Path(__file__).parents[1] / "data" / "couchdb"
FIXTURE_NODE = "couchdb@127.0.0.1"
"""The node that the fixtures are from."""
SUFFIX = ".1795351694"
AUTH = {"_id": "_design/_auth", "language": "javascript", "validate_doc_update": "function() {}"}

Docs = Iterable[Mapping[str, Any]]


def unpack_fixture(moment: str, target: Path, os_user: str | None = None) -> Path:
    """Lay the real node's data directory of "t0" or "t1" into a directory, made when it is not there."""
    target.mkdir(parents=True, exist_ok=True)
    run_here("tar", "-xzf", FIXTURES / f"data-{moment}.tar.gz", "-C", target)
    give_tree(target, os_user)
    return target


def expected(moment: str) -> dict[str, dict[str, Any]]:
    """Return what the real node said of each database at "t0" or "t1"."""
    told: dict[str, dict[str, Any]] = json.loads((FIXTURES / f"expected-{moment}.json").read_text())
    return told


def give_tree(path: Path, os_user: str | None) -> None:
    """Make a user the owner of a directory and all that is in it."""
    for one in (path, *path.rglob("*")):
        give(one, os_user)


def spans(q: int) -> list[str]:
    """Return the ranges of a database of ``q`` shards, as a node makes them."""
    width = (1 << 32) // q
    ends = [*(width * (n + 1) - 1 for n in range(q - 1)), (1 << 32) - 1]
    return [f"{width * n:08x}-{end:08x}" for n, end in enumerate(ends)]


def span_of(doc_id: str, ranges: Iterable[str]) -> str | None:
    """Return the range that a document belongs to (mem3_hash: the id's CRC-32); None when there is none."""
    place = zlib.crc32(doc_id.encode("utf-8"))
    for span in ranges:
        start, end = (int(bound, 16) for bound in span.split("-"))
        if start <= place <= end:
            return span
    return None


def shard_map(
    name: str, *, q: int = 2, n: int = 1, nodes: Sequence[str] = (FIXTURE_NODE,), suffix: str = SUFFIX
) -> dict[str, Any]:
    """Return the document of a database in ``_dbs``, its shards dealt to the nodes in turn."""
    by_range = {
        span: sorted(nodes[(at + copy) % len(nodes)] for copy in range(n)) for at, span in enumerate(spans(q))
    }
    by_node = {
        node: [span for span, holders in by_range.items() if node in holders]
        for node in sorted({node for holders in by_range.values() for node in holders})
    }
    changelog = sorted(["add", span, node] for span, holders in by_range.items() for node in holders)
    codes = [ord(letter) for letter in suffix]
    return {
        "_id": name,
        "shard_suffix": codes,
        "changelog": changelog,
        "by_node": by_node,
        "by_range": by_range,
        "props": {},
    }


def make_data_dir(
    path: Path,
    databases: Mapping[str, Docs],
    *,
    q: int = 2,
    n: int = 1,
    nodes: Sequence[str] = (FIXTURE_NODE,),
    node: str | None = None,
    os_user: str | None = None,
) -> Path:
    """Make the data directory of one of ``nodes`` (the first unless named) that holds databases by name.

    Each database is its documents; ``_users`` and ``_replicator`` are there too. With several nodes only the
    shards of the one are made.
    """
    node = node or nodes[0]
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    everything: dict[str, list[Mapping[str, Any]]] = {"_users": [AUTH], "_replicator": []}
    everything |= {name: list(docs) for name, docs in databases.items()}
    maps = [shard_map(name, q=q, n=n, nodes=nodes) for name in sorted(everything)]
    for doc in maps:
        write_shards(path, doc, everything[doc["_id"]], node)
    write_couch(path / "_dbs.couch", maps)
    write_couch(path / "_nodes.couch", [{"_id": one} for one in nodes])
    write_couch(path / "_users.couch", [AUTH])
    give_tree(path, os_user)
    return path


def write_shards(root: Path, doc: Mapping[str, Any], docs: Docs, node: str) -> None:
    """Write the files of a database's shards that a node has, its design documents in the right one too."""
    suffix = "".join(map(chr, doc["shard_suffix"]))
    listed = list(docs)
    for span, holders in doc["by_range"].items():
        if node in holders:
            mine = [one for one in listed if span_of(one["_id"], doc["by_range"]) == span]
            write_couch(root / "shards" / span / f"{doc['_id']}{suffix}.couch", mine)
