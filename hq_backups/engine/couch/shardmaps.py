"""Shard maps: which node has which part of which database, as ``_dbs`` keeps them.

docs.couchdb.org, cluster/sharding: a document of ``_dbs`` is named like its database and says it three times,
in ``changelog``, ``by_node`` and ``by_range``. A node takes a map in which a range is missing, and the
documents of that range are gone from then on: so such a map is refused here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

from hq_backups.engine.couch.couchfile import CouchFile

_RANGE = re.compile(r"([0-9a-f]{8})-([0-9a-f]{8})", re.ASCII)
_SUFFIX = re.compile(r"(\.[0-9]+)?", re.ASCII)
_END = 1 << 32


@dataclass(frozen=True)
class ShardMap:
    """One database's map."""

    name: str
    suffix: str
    """What stands between a database's name and ``.couch`` in its files: a dot and the time it was made."""
    by_range: Mapping[str, tuple[str, ...]]
    """The nodes that hold each range, in the order of the ranges."""

    @classmethod
    def parse(cls, doc: Mapping[str, Any]) -> Self:
        """Read a document of ``_dbs``; raise ValueError unless it gives every range to somebody, consistently."""
        name = doc.get("_id")
        if not isinstance(name, str) or not name:
            msg = "a shard map has no name"
            raise ValueError(msg)
        if name.startswith("/") or "\0" in name or any(part in (".", "..") for part in name.split("/")):
            msg = f"{name!r} is no database's name"
            raise ValueError(msg)
        by_range = _names(doc, "by_range", name)
        by_node = _names(doc, "by_node", name)
        pairs = {(node, span) for span, nodes in by_range.items() for node in nodes}
        others = {(node, span) for node, spans in by_node.items() for span in spans}
        if pairs != others:
            node, span = sorted(pairs ^ others)[0]
            msg = f"shard map of {name}: by_range and by_node disagree on {span} of {node}"
            raise ValueError(msg)
        _whole(by_range, name)
        _changelog(doc, name)
        return cls(name, _suffix(doc, name), {span: by_range[span] for span in sorted(by_range)})

    @property
    def ranges(self) -> list[str]:
        """Return the ranges, from the lowest."""
        return list(self.by_range)

    @property
    def nodes(self) -> list[str]:
        """Return the nodes that hold any part."""
        return sorted({node for nodes in self.by_range.values() for node in nodes})

    def files(self) -> list[str]:
        """Return the paths of all shards' files, relative to the data directory."""
        return [shard_file(span, self.name, self.suffix) for span in self.by_range]


def shard_file(span: str, name: str, suffix: str) -> str:
    """Return the path of one shard's file, relative to the data directory."""
    return f"shards/{span}/{name}{suffix}.couch"


def renamed(doc: Mapping[str, Any], new_node: str) -> dict[str, Any]:
    """Return a map in which every node is ``new_node``; the rest of it, ``_id`` and ``_rev`` too, is kept.

    Several copies, and several nodes, become the one; raise ValueError where :meth:`ShardMap.parse` does.
    """
    found = ShardMap.parse(doc)
    made = dict(doc)
    if "changelog" in doc:
        made["changelog"] = _unique(
            [*entry[:2], new_node, *entry[3:]] for entry in _changelog(doc, found.name)
        )
    made["by_node"] = {new_node: list(doc["by_range"])}
    made["by_range"] = {span: [new_node] for span in doc["by_range"]}
    return made


def shard_maps(file: Path | str | BinaryIO) -> dict[str, Mapping[str, Any]]:
    """Return every document of ``_dbs.couch`` by its id, as a node's ``_dbs/_all_docs`` gives them."""
    with CouchFile(file, name=None if not isinstance(file, (str, Path)) else str(file)) as dbs:
        return {doc.id: doc.to_json() for doc in dbs.docs(bodies=True) if not doc.id.startswith("_design/")}


def _suffix(doc: Mapping[str, Any], name: str) -> str:
    """Return the suffix as text: it is kept as a list of characters."""
    given = doc.get("shard_suffix", [])
    if isinstance(given, list) and all(isinstance(code, int) and 0 <= code < 128 for code in given):
        given = "".join(map(chr, given))
    if not isinstance(given, str) or not _SUFFIX.fullmatch(given):
        msg = f"shard map of {name}: shard_suffix is no time"
        raise ValueError(msg)
    return given


def _names(doc: Mapping[str, Any], key: str, name: str) -> dict[str, tuple[str, ...]]:
    found = doc.get(key)
    if not isinstance(found, dict) or not found:
        msg = f"shard map of {name}: {key} is missing or empty"
        raise ValueError(msg)
    for one, several in found.items():
        if not isinstance(several, list) or not all(isinstance(other, str) and other for other in several):
            msg = f"shard map of {name}: {key} of {one} is no list of names"
            raise ValueError(msg)
    return {one: tuple(dict.fromkeys(several)) for one, several in found.items()}


def _changelog(doc: Mapping[str, Any], name: str) -> list[list[Any]]:
    found = doc.get("changelog", [])
    if not isinstance(found, list) or not all(isinstance(entry, list) and len(entry) >= 3 for entry in found):
        msg = f"shard map of {name}: changelog is not readable"
        raise ValueError(msg)
    return found


def _whole(by_range: Mapping[str, tuple[str, ...]], name: str) -> None:
    """Raise ValueError unless ranges lead from 0 to the top, each on some node.

    They may overlap: when shards are split, each copy is split by itself (cluster/sharding, Splitting shards).
    """
    reached = {0}
    for span in sorted(by_range):
        bounds = _RANGE.fullmatch(span)
        start, end = (int(bound, 16) for bound in bounds.groups()) if bounds else (1, 0)
        if end < start:
            msg = f"shard map of {name}: {span!r} is no range"
            raise ValueError(msg)
        if not by_range[span]:
            msg = f"shard map of {name}: no node has {span}"
            raise ValueError(msg)
        if start in reached:
            reached.add(end + 1)
    if _END not in reached:
        msg = f"shard map of {name}: documents from {max(reached):08x} on are nowhere"
        raise ValueError(msg)


def _unique(entries: Iterable[list[Any]]) -> list[list[Any]]:
    made: list[list[Any]] = []
    for entry in entries:
        if entry not in made:
            made.append(entry)
    return made
