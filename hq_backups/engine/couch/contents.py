"""What a data directory holds: its databases by their shard maps, how many documents, and what of them is missing.

CouchDB says nothing of it: a shard whose file is missing or has no header is made anew, empty, without a word.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, BinaryIO

from hq_backups.engine.couch import layout
from hq_backups.engine.couch.headers import Header
from hq_backups.engine.couch.shardmaps import ShardMap, shard_file, shard_maps
from hq_backups.engine.errors import BadManifest, CorruptBackup

SHOWN = 10
"""How many names a message lists."""

Headers = Mapping[str, Header | None]
"""The last header of every database file by its path; None of one without any."""


@dataclass(frozen=True)
class Missing:
    """A part of a database for which there is no file."""

    database: str
    span: str
    nodes: tuple[str, ...]
    """Who has it."""

    def __str__(self) -> str:
        return f"range {self.span} of database {self.database!r} (of node {' or '.join(self.nodes)})"


@dataclass(frozen=True)
class Contents:
    """The databases of a data directory."""

    maps: Sequence[ShardMap]
    headers: Headers

    @classmethod
    def read(cls, dbs: BinaryIO, headers: Headers, name: str) -> Contents:
        """Read the shard maps from ``_dbs.couch``; raises CorruptBackup for what no node writes."""
        try:
            maps = [ShardMap.parse(doc) for _, doc in sorted(shard_maps(dbs).items())]
        except ValueError as error:
            raise CorruptBackup(f"its shard maps make no sense: {error}", name=name) from error
        return cls(maps, headers)

    @property
    def nodes(self) -> list[str]:
        """Return the nodes that any database is mapped to."""
        return sorted({node for each in self.maps for node in each.nodes})

    def missing(self) -> list[Missing]:
        """Return every range that has no file here."""
        return [
            Missing(each.name, span, nodes)
            for each in self.maps
            for span, nodes in each.by_range.items()
            if shard_file(span, each.name, each.suffix) not in self.headers
        ]

    def node(self, told: str | None = None) -> str | None:
        """Return whose directory this is: of the node that was ``told``, else of the one that lacks least here.

        None when several lack the same.
        """
        if told in self.nodes:
            return told
        lacks = self._lacks()
        best = [node for node in lacks if lacks[node] == min(lacks.values())]
        return best[0] if len(best) == 1 else None

    def _lacks(self) -> dict[str, int]:
        missing = self.missing()
        return {node: sum(node in each.nodes for each in missing) for node in self.nodes}

    def problems(self, told: str | None = None) -> list[str]:
        """Return what a node would turn into empty databases; what only other nodes have is none of it."""
        node, missing = self.node(told), self.missing()
        if node is not None:
            missing = [each for each in missing if node in each.nodes]
        elif 0 in self._lacks().values():
            missing = []
        found = [f"{each} has no file" for each in missing]
        return found + [
            f"{path} has no header: a node takes it for an empty database"
            for path, header in self.headers.items()
            if header is None
        ]

    @classmethod
    def recorded(cls, source: Mapping[str, Any], name: str) -> Contents:
        """Return what a manifest recorded by :meth:`to_source`; raises BadManifest."""
        try:
            maps = [
                ShardMap(
                    str(db),
                    str(told["suffix"]),
                    {span: tuple(map(str, told["ranges"][span])) for span in sorted(told["ranges"])},
                )
                for db, told in sorted(source.get("databases", {}).items())
            ]
            headers = {
                str(path): Header(*map(int, counts)) for path, counts in source.get("shards", {}).items()
            }
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise BadManifest(f"what it says of databases makes no sense ({error!r})", name=name) from error
        return cls(maps, headers)

    def to_source(self, told: str | None = None) -> dict[str, Any]:
        """Return it as plain data for the manifest; ``told`` is the name that the node gave itself."""
        return {
            "databases": self.databases(),
            "shards": {
                path: [header.doc_count, header.doc_del_count, header.update_seq]
                for path, header in self.headers.items()
                if header is not None
            },
            "nodes": self.nodes,
            "of_node": self.node(told),
        }

    def databases(self) -> dict[str, dict[str, Any]]:
        """Return each database as plain data, for the manifest: its counts and where its ranges are."""
        return {each.name: self._described(each) for each in self.maps}

    def _described(self, each: ShardMap) -> dict[str, Any]:
        headers = [
            header
            for span in each.by_range
            if (header := self.headers.get(shard_file(span, each.name, each.suffix))) is not None
        ]
        told: dict[str, Any] = {
            "suffix": each.suffix,
            "ranges": {span: list(nodes) for span, nodes in each.by_range.items()},
        }
        # Between splitting shards and dropping the old ones, ranges lie over each other: a node counts some of them.
        if len(headers) == len(each.by_range) and _tiles(each.ranges):
            told["doc_count"] = sum(header.doc_count for header in headers)
            told["doc_del_count"] = sum(header.doc_del_count for header in headers)
        return told


def _tiles(ranges: Iterable[str]) -> bool:
    bounds = [[int(bound, 16) for bound in span.split("-")] for span in sorted(ranges)]
    return all(before[1] + 1 == after[0] for before, after in pairwise(bounds))


def listed(texts: Sequence[object]) -> str:
    """Return the first of several things as one text."""
    more = f", and {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
    return "; ".join(str(text) for text in texts[:SHOWN]) + more


def needs_header(path: str) -> bool:
    """Tell whether a file is a database's: a view that is not begun yet has no header, and none is missed."""
    return layout.kind(path) in (layout.Kind.SHARD, layout.Kind.TOP, layout.Kind.MAPS)
