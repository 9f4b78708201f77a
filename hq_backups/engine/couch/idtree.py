"""The tree of a database's documents by their ids (CouchDB's couch_btree.erl, couch_bt_engine.erl)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hq_backups.engine.couch.blocks import BlockFile, Damaged

MOST_LEVELS = 64
"""A tree of 64 levels would be larger than any disk."""


@dataclass(frozen=True)
class Counts:
    """How many documents are below a node of the tree."""

    present: int
    deleted: int


@dataclass(frozen=True)
class Info:
    """What the tree says of one document."""

    id: str
    rev: str
    deleted: bool
    body: int | None
    """The offset of the winning revision's body."""


@dataclass(frozen=True, order=True)
class _Leaf:
    """A revision that nothing follows; the greatest wins (couch_doc:to_doc_info_path)."""

    present: bool
    depth: int
    rev: bytes
    body: int | None


def root_counts(state: object, before: int) -> tuple[int | None, Counts]:
    """Return the root's offset, None for an empty tree, and its counts."""
    if state == "nil":
        return None, Counts(0, 0)
    position, counts = _pointer(state, before)
    return position, counts


def infos(file: BlockFile, root: int | None) -> Iterator[Info]:
    """Yield every document in the order of the ids.

    A node refers to older nodes only, and ids only ascend: so no loop, however it is made, goes on.
    """
    last: bytes | None = None
    waiting = [] if root is None else [(root, 1)]
    while waiting:
        position, level = waiting.pop()
        if level > MOST_LEVELS:
            msg = f"its tree is more than {MOST_LEVELS} levels deep"
            raise Damaged(msg)
        kind, members = _node(file.term(position), position)
        if kind == "kp_node":
            below = [_pointer(value, position)[0] for _, value in members]
            waiting += [(child, level + 1) for child in reversed(below)]
            continue
        for key, value in members:
            if last is not None and key <= last:
                msg = f"its tree is out of order at {position}"
                raise Damaged(msg)
            last = key
            yield _info(key, value)


def _node(term: object, position: int) -> tuple[str, list[tuple[bytes, object]]]:
    if isinstance(term, tuple) and len(term) == 2 and term[0] in ("kp_node", "kv_node"):
        members = term[1]
        if (
            isinstance(members, list)
            and members
            and all(isinstance(m, tuple) and len(m) == 2 and isinstance(m[0], bytes) for m in members)
        ):
            return str(term[0]), members
    msg = f"at {position} is no node of the tree of documents"
    raise Damaged(msg)


def _pointer(state: object, before: int) -> tuple[int, Counts]:
    """Read an offset with its reduction: ``{Pos, {Present, Deleted, Sizes}, Size}``, shorter before 1.2."""
    if isinstance(state, tuple) and len(state) in (2, 3):
        position, reduction = state[0], state[1]
        if (
            _whole(position, before)
            and isinstance(reduction, tuple)
            and len(reduction) in (2, 3)
            and all(_whole(n) for n in reduction[:2])
        ):
            return int(position), Counts(int(reduction[0]), int(reduction[1]))
    msg = "its tree has no readable root or branch"
    raise Damaged(msg)


def _whole(value: object, below: int | None = None) -> bool:
    return isinstance(value, int) and value >= 0 and (below is None or value < below)


def _info(key: bytes, value: object) -> Info:
    try:
        name = key.decode("utf-8")
    except UnicodeDecodeError as error:
        msg = "a document's id is no text"
        raise Damaged(msg) from error
    if (
        isinstance(value, tuple)
        and len(value) in (3, 4)
        and value[1] in (0, 1)
        and isinstance(value[-1], list)
    ):
        leaves = list(_leaves(value[-1]))
        if leaves:
            best = max(leaves, key=lambda leaf: (leaf.present, leaf.depth, leaf.rev))
            if best.present is (value[1] == 0):
                return Info(name, f"{best.depth}-{_rev(best.rev)}", not best.present, best.body)
    msg = f"document {name!r} has no readable revisions"
    raise Damaged(msg)


def _leaves(tree: list[object]) -> Iterator[_Leaf]:
    """Yield the ends of ``[{Depth, {Rev, Value, Children}}]``; Value is ``{Deleted, Body, Seq, …}`` or []."""
    waiting: list[tuple[int, object]] = []
    for branch in tree:
        if not (isinstance(branch, tuple) and len(branch) == 2 and _whole(branch[0])):
            raise Damaged(_NO_TREE)
        waiting.append((branch[0], branch[1]))
    while waiting:
        depth, node = waiting.pop()
        if not (isinstance(node, tuple) and len(node) == 3 and isinstance(node[2], list)):
            raise Damaged(_NO_TREE)
        rev, value, children = node
        if children:
            waiting += [(depth + 1, child) for child in children]
        elif isinstance(value, tuple) and len(value) >= 3 and value[0] in (0, 1) and isinstance(rev, bytes):
            body = value[1]
            yield _Leaf(value[0] == 0, depth, rev, body if _whole(body) else None)
        elif value != []:
            raise Damaged(_NO_TREE)


def _rev(rev: bytes) -> str:
    """Return a revision as a node does: 16 bytes in hex, anything else (replicated from 0.9) as it is."""
    return rev.hex() if len(rev) == 16 else rev.decode("latin-1")


_NO_TREE = "a document's revisions are no tree"
