"""Write CouchDB's database files as a node does: append, commit, compact into a new file."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from hq_backups.engine.couch.blocks import BLOCK, BlockFile, unpack
from hq_backups.engine.couch.terms import Atom
from hq_backups.engine.couch.xxh3 import xxh3_128
from tests.testbed.erlang import encode, from_json, packed

Seal = Callable[[bytes], bytes]
NIL = Atom("nil")
_FANOUT = 12
_MISSING: list[object] = []


def md5(data: bytes) -> bytes:
    """Return the seal of CouchDB before 3.5."""
    return hashlib.md5(data, usedforsecurity=False).digest()


def blocked(position: int, data: bytes) -> bytes:
    """Return bytes with a zero at the beginning of every block, as they lie from a position on."""
    made = bytearray()
    while data:
        offset = (position + len(made)) % BLOCK
        if not offset:
            made.append(0)
            offset = 1
        made += data[: BLOCK - offset]
        data = data[BLOCK - offset :]
    return bytes(made)


class Appender:
    """Appends terms and headers to a file; nothing that is in it is ever changed."""

    def __init__(self, path: Path, seal: Seal = xxh3_128) -> None:
        """Open a file for appending, made when it is not there."""
        self.path = path
        self.seal = seal
        self.file: BinaryIO = path.open("a+b")

    def chunk(self, data: bytes) -> int:
        """Append a sealed chunk, as of a document, and return its offset."""
        at = self.file.seek(0, os.SEEK_END)
        word = (1 << 31 | len(data)).to_bytes(4, "big")
        self.file.write(blocked(at, word + self.seal(data) + data))
        return at

    def term(self, term: object) -> int:
        """Append a packed term without a seal, as of a tree, and return its offset."""
        at = self.file.seek(0, os.SEEK_END)
        data = packed(term)
        self.file.write(blocked(at, len(data).to_bytes(4, "big") + data))
        return at

    def header(self, term: object) -> None:
        """Append a header at the next block, on disk when this returns."""
        at = self.file.seek(0, os.SEEK_END)
        data = encode(term)
        data = self.seal(data) + data
        self.file.write(bytes(-at % BLOCK) + b"\x01" + len(data).to_bytes(4, "big") + blocked(5, data))
        self.file.flush()
        os.fdatasync(self.file.fileno())


class CouchAppender:
    """One database file, written as by the node that owns it.

    What was put is in the file at once, but counts only after :meth:`commit`, as with a real node.
    """

    def __init__(self, path: Path | str, seal: Seal = xxh3_128) -> None:
        """Open a file; one that is empty or has no header becomes an empty database, silently."""
        self._open(Path(path), seal)

    def _open(self, path: Path, seal: Seal) -> None:
        self._appender = Appender(path, seal)
        blocks = BlockFile(self._appender.file)
        found = blocks.last_header()
        self._docs: dict[bytes, tuple[Any, ...]] = {}
        if found is None:
            self.uuid, self.seq = secrets.token_hex(16).encode(), 0
            self._write_header(NIL, NIL)
        else:
            header: Any = found.term
            self.seq, self.uuid = header[2], header[11]
            self._docs = dict(_members(blocks, header[4]))

    @property
    def path(self) -> Path:
        """Return the file."""
        return self._appender.path

    def close(self) -> None:
        """Close the file; what was not committed stays behind the last header."""
        self._appender.file.close()

    def __enter__(self) -> CouchAppender:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def put(self, doc: Mapping[str, Any]) -> str:
        """Append a new revision of a document after the one there is; return its name.

        A document that is not there yet may come with any ``_rev``.
        """
        name = str(doc["_id"]).encode("utf-8")
        body = {key: value for key, value in doc.items() if key not in ("_id", "_rev", "_deleted")}
        gone = bool(doc.get("_deleted"))
        before = self._docs.get(name)
        parent = _winner(before[3]) if before else None
        if before is None and "_rev" in doc:
            start, _, text = str(doc["_rev"]).partition("-")
            depth, rev = int(start), bytes.fromhex(text)
        else:
            depth = parent[0] + 1 if parent else 1
            rev = md5(json.dumps([gone, parent and parent[1].hex(), body], sort_keys=True).encode())
        self.seq += 1
        stored = packed(from_json(body))
        at = self._appender.chunk(encode((stored, packed([]))))
        sizes = (len(stored), len(json.dumps(body)))
        leaf = (rev, (int(gone), at, self.seq, sizes, []), [])
        tree = _grown(before[3], parent[1], leaf) if before and parent else [(depth, leaf)]
        left = [value for _, value in _leaves(tree) if not value[0]]
        self._docs[name] = (self.seq, int(not left), sizes, tree)
        self._appender.file.flush()
        return f"{depth}-{rev.hex()}"

    def commit(self) -> None:
        """Append the trees and a header, as a node does after every second or so."""
        by_id = sorted(self._docs.items())
        by_seq = sorted((info[0], (name, *info[1:])) for name, info in by_id)
        ids = self._tree(by_id, _counted)
        self._write_header(ids, self._tree(by_seq, len))

    def _write_header(self, ids: object, seqs: object) -> None:
        undefined = Atom("undefined")
        epochs = [(Atom("couchdb@127.0.0.1"), 0)]
        self._appender.header(
            (
                *(Atom("db_header"), 8, self.seq, 0, ids, seqs, NIL, NIL, NIL, NIL),
                *(1000, self.uuid, epochs, 0, 1000, undefined),
            )
        )

    def _tree(self, members: list[Any], reduce: Callable[[list[Any]], Any]) -> object:
        """Append a tree's nodes, the leaves first, and return its state."""
        if not members:
            return NIL
        kind = "kv_node"
        below = [(members[at : at + _FANOUT]) for at in range(0, len(members), _FANOUT)]
        reduced = [reduce(group) for group in below]
        while True:
            starts = self._appender.file.seek(0, os.SEEK_END)
            pointers = []
            for group, value in zip(below, reduced, strict=True):
                at = self._appender.term((Atom(kind), group))
                size = self._appender.file.seek(0, os.SEEK_END) - starts
                pointers.append((group[-1][0], (at, value, size)))
            if len(pointers) == 1:
                return pointers[0][1]
            kind = "kp_node"
            below = [pointers[at : at + _FANOUT] for at in range(0, len(pointers), _FANOUT)]
            reduced = [_summed([pointer[1] for _, pointer in group]) for group in below]

    def compact(self) -> None:
        """Write what is current into a new file and put that in the old one's place, as smoosh does.

        The name is gone for a moment in between: the old file is moved away first.
        """
        target = self.path.with_name(self.path.name + ".compact")
        blocks = BlockFile(self._appender.file)
        with CouchAppender(target, self._appender.seal) as new:
            new.uuid, new.seq = self.uuid, self.seq
            for name, (seq, gone, sizes, tree) in sorted(self._docs.items()):
                moved = _moved(tree, blocks, new._appender)
                new._docs[name] = (seq, gone, sizes, moved)
            new.commit()
        owner = self.path.stat()
        os.chown(target, owner.st_uid, owner.st_gid)
        root = _root_of(self.path)
        (root / ".delete").mkdir(exist_ok=True)
        old = root / ".delete" / secrets.token_hex(16)
        self.path.rename(old)
        target.rename(self.path)
        old.unlink()
        self.close()
        self._open(self.path, self._appender.seal)


def write_couch(path: Path | str, docs: Iterable[Mapping[str, Any]] = (), seal: Seal = xxh3_128) -> None:
    """Write a database file with documents, in place of what is there."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    with CouchAppender(target, seal) as new:
        for doc in docs:
            new.put(doc)
        new.commit()


def _counted(members: list[Any]) -> tuple[Any, ...]:
    gone = sum(info[1] for _, info in members)
    active, external = (sum(info[2][at] for _, info in members) for at in (0, 1))
    return len(members) - gone, gone, (Atom("size_info"), active, external)


def _summed(reductions: list[Any]) -> Any:
    if isinstance(reductions[0], int):
        return sum(reductions)
    present, gone = (sum(red[at] for red in reductions) for at in (0, 1))
    sizes = (sum(red[2][at] for red in reductions) for at in (1, 2))
    return present, gone, (Atom("size_info"), *sizes)


def _members(blocks: BlockFile, state: Any) -> Iterator[tuple[bytes, tuple[Any, ...]]]:
    if state == "nil":
        return
    node: Any = blocks.term(state[0])
    if node[0] == "kv_node":
        yield from node[1]
        return
    for _, pointer in node[1]:
        yield from _members(blocks, pointer)


def _leaves(tree: Any) -> Iterator[tuple[tuple[int, bytes], Any]]:
    waiting = list(tree)
    while waiting:
        depth, (rev, value, children) = waiting.pop()
        if children:
            waiting += [(depth + 1, child) for child in children]
        elif value != _MISSING:
            yield (depth, rev), value


def _winner(tree: Any) -> tuple[int, bytes]:
    return max(_leaves(tree), key=lambda leaf: (not leaf[1][0], *leaf[0]))[0]


def _grown(tree: Any, parent: bytes, leaf: Any) -> Any:
    """Return a tree with a leaf after the leaf ``parent``."""

    def grown(node: Any) -> Any:
        rev, value, children = node
        if not children and rev == parent:
            return rev, value, [leaf]
        return rev, value, [grown(child) for child in children]

    return [(depth, grown(node)) for depth, node in tree]


def _moved(tree: Any, old: BlockFile, new: Appender) -> Any:
    """Copy a document's current bodies and attachments into another file; older bodies stay behind."""

    def moved(node: Any) -> Any:
        rev, value, children = node
        if children:
            return rev, _MISSING, [moved(child) for child in children]
        if value == _MISSING or not isinstance(value[1], int):
            return node
        stored: Any = old.term(value[1])
        return rev, (value[0], new.chunk(encode(_with_attachments(stored, old, new))), *value[2:]), []

    return [(depth, moved(node)) for depth, node in tree]


def _with_attachments(stored: Any, old: BlockFile, new: Appender) -> Any:
    listed: Any = unpack(stored[1])
    if not listed:
        return stored
    copied = []
    for name, kind, places, *rest in listed:
        put = [(new.chunk(old.chunk(at)), length) for at, length in places]
        copied.append((name, kind, put, *rest))
    return stored[0], packed(copied)


def _root_of(path: Path) -> Path:
    """Return the data directory that a database's file is in."""
    return next((parent.parent for parent in path.parents if parent.name == "shards"), path.parent)
