"""Read a database file of CouchDB 3, of a whole node or of one shard, without a node.

What a header, a tree and a document are is in CouchDB's src/couch/src: couch_bt_engine_header.erl,
couch_btree.erl, couch_bt_engine.erl. Everything read is untrusted: what does not fit raises CorruptBackup.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Self

from hq_backups.engine.couch.attachments import stubs
from hq_backups.engine.couch.blocks import BlockFile, Damaged, FoundHeader, unpack
from hq_backups.engine.couch.ejson import to_json
from hq_backups.engine.couch.idtree import Counts, Info, infos, root_counts
from hq_backups.engine.errors import CorruptBackup

DISK_VERSIONS = range(5, 9)
_SMALLEST = 11
"""Fields of a header of disk version 5; later ones have more."""


@dataclass(frozen=True)
class Doc:
    """One document: the revision that a node would answer with."""

    id: str
    rev: str
    deleted: bool
    body: Mapping[str, Any] | None = None
    """What the user stored, without ``_id``, ``_rev``, ``_attachments``; None unless bodies were asked for."""
    attachments: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Their stubs by name, as a node shows them in ``_attachments``; only with bodies."""

    def to_json(self) -> dict[str, Any]:
        """Return the document as a node gives it."""
        made = {"_id": self.id, "_rev": self.rev, **(self.body or {})}
        if self.deleted:
            made["_deleted"] = True
        if self.attachments:
            made["_attachments"] = dict(self.attachments)
        return made


@dataclass(frozen=True)
class DatabaseHeader:
    """What of a database's header is of use here."""

    update_seq: int
    counts: Counts
    tree: int | None
    uuid: str


class CouchFile:
    """A database file as of its last whole header; closes the file when it opened it."""

    def __init__(self, source: Path | str | BinaryIO, name: str | None = None) -> None:
        """Open a path, or take an open seekable file; ``name`` is what errors call it."""
        self._close = contextlib.ExitStack()
        if isinstance(source, (str, Path)):
            file: BinaryIO = self._close.enter_context(open(source, "rb"))  # noqa: SIM115
        else:
            file = source
        self.name = name or str(getattr(file, "name", "the database file"))
        try:
            with self._explained():
                self._blocks = BlockFile(file)
                found = self._blocks.last_header()
                if found is None:
                    msg = "it has no header: a node takes it for an empty database"
                    raise Damaged(msg)
                self._found = found
                self._header = read_header(found)
        except BaseException:
            self._close.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close.close()

    @property
    def update_seq(self) -> int:
        """Return how many changes the database has seen."""
        return self._header.update_seq

    @property
    def uuid(self) -> str:
        """Return the file's own id, which compaction keeps; empty in old ones."""
        return self._header.uuid

    @property
    def header_position(self) -> int:
        """Return the offset of the last whole header."""
        return self._found.position

    def doc_count(self) -> int:
        """Return how many documents there are, from the tree's root: nothing else is read."""
        return self._header.counts.present

    def deleted_count(self) -> int:
        """Return how many deleted documents are remembered, from the tree's root."""
        return self._header.counts.deleted

    def trailing_bytes(self) -> int:
        """Return how many bytes follow the last header: writes not yet committed, or a torn copy."""
        return self._blocks.size - self._found.end

    def docs(self, *, bodies: bool = False, deleted: bool = False) -> Iterator[Doc]:
        """Yield the documents in the order of their ids, deleted ones when asked for.

        Reads the whole tree; at its end the number of documents must be the one of its root.
        """
        with self._explained():
            present = gone = 0
            for info in infos(self._blocks, self._header.tree):
                present, gone = present + (not info.deleted), gone + info.deleted
                if deleted or not info.deleted:
                    body, attachments = self._stored(info) if bodies else (None, {})
                    yield Doc(info.id, info.rev, info.deleted, body, attachments)
            if Counts(present, gone) != self._header.counts:
                told = self._header.counts
                msg = (
                    f"it holds {present} documents and {gone} deleted ones, "
                    f"its root says {told.present} and {told.deleted}"
                )
                raise Damaged(msg)

    def _stored(self, info: Info) -> tuple[Mapping[str, Any], Mapping[str, Mapping[str, Any]]]:
        if info.body is None:
            return {}, {}
        if info.body >= self._found.position:
            msg = f"document {info.id!r} lies behind the header"
            raise Damaged(msg)
        stored = self._blocks.term(info.body)
        if not isinstance(stored, tuple) or len(stored) != 2:
            msg = f"at {info.body} is no document"
            raise Damaged(msg)
        body, attachments = (unpack(part) if isinstance(part, bytes) else part for part in stored)
        made = to_json(body)
        if not isinstance(made, dict):
            msg = f"document {info.id!r} is no object"
            raise Damaged(msg)
        return made, stubs(attachments)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise CorruptBackup(str(error), name=self.name) from error


def has_header(file: BinaryIO) -> bool:
    """Tell whether a file has any whole header; without one a node serves an empty database, silently."""
    try:
        return BlockFile(file).last_header() is not None
    except Damaged:
        return False


def read_header(found: FoundHeader) -> DatabaseHeader:
    """Return what a header says; raise ValueError when it is no database's."""
    term = found.term
    if not isinstance(term, tuple) or len(term) < _SMALLEST or term[0] != "db_header":
        msg = f"the header at {found.position} is no database's"
        raise Damaged(msg)
    version, seq, tree, uuid = term[1], term[2], term[4], term[11] if len(term) > _SMALLEST else b""
    if version not in DISK_VERSIONS:
        msg = f"it is of disk version {version}, known are {DISK_VERSIONS[0]} to {DISK_VERSIONS[-1]}"
        raise Damaged(msg)
    if not isinstance(seq, int):
        msg = "its header has no update sequence"
        raise Damaged(msg)
    position, counts = root_counts(tree, found.position)
    return DatabaseHeader(seq, counts, position, uuid.decode("latin-1") if isinstance(uuid, bytes) else "")
