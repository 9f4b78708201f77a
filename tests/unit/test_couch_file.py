"""Database files: a real node's give what it said; damaged and hostile ones give CorruptBackup, never a hang."""

from __future__ import annotations

import hashlib
import io
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hq_backups.engine.couch import blocks
from hq_backups.engine.couch.couchfile import CouchFile, Doc, has_header
from hq_backups.engine.couch.terms import Atom
from hq_backups.engine.errors import CorruptBackup
from tests.testbed.couch_data import expected, unpack_fixture
from tests.testbed.couch_writer import NIL, Appender, CouchAppender, md5, write_couch
from tests.testbed.erlang import compress, encode

LEAF_SIZES = (10, 10)
REV = bytes(range(16))


@pytest.fixture(scope="module")
def moments(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the real node's directories."""
    root = tmp_path_factory.mktemp("couch")
    return {moment: unpack_fixture(moment, root / moment) for moment in ("t0", "t1")}


@pytest.fixture(scope="module")
def shard(moments: dict[str, Path]) -> bytes:
    """Return a real shard with nine headers."""
    (path,) = moments["t0"].glob("shards/00000000*/commcarehq__users.1*.couch")
    return path.read_bytes()


def everything(data: bytes | Path) -> list[Doc]:
    """Read all that a file can be asked for."""
    source = io.BytesIO(data) if isinstance(data, bytes) else data
    with CouchFile(source, "it") as file:
        docs = list(file.docs(bodies=True, deleted=True))
        assert sum(not doc.deleted for doc in docs) == file.doc_count()
        assert sum(doc.deleted for doc in docs) == file.deleted_count()
        assert file.trailing_bytes() >= 0
    return docs


@pytest.mark.parametrize("moment", ["t0", "t1"])
def test_every_database_of_the_real_node_is_what_it_said(moments: dict[str, Path], moment: str) -> None:
    for db, told in expected(moment).items():
        docs, counts = [], [0, 0]
        for path in moments[moment].glob(f"shards/*/{db}.1*.couch"):
            with CouchFile(path) as file:
                docs += list(file.docs(bodies=True))
                counts = [counts[0] + file.doc_count(), counts[1] + file.deleted_count()]
                assert file.trailing_bytes() == 0
        texts = [json.dumps(doc.to_json(), sort_keys=True) for doc in sorted(docs, key=lambda doc: doc.id)]
        assert counts == [told["doc_count"], told["doc_del_count"]]
        assert hashlib.sha256("".join(texts).encode()).hexdigest()[:16] == told["digest"]


def test_counts_read_neither_tree_nor_documents(shard: bytes) -> None:
    class Counting(io.BytesIO):
        read_bytes = 0

        def read(self, size: int | None = -1, /) -> bytes:
            data = super().read(size)
            Counting.read_bytes += len(data)
            return data

    padded = shard + bytes(-len(shard) % 4096) + bytes(4096) * 400
    with CouchFile(Counting(padded)) as file:
        assert (file.doc_count(), file.deleted_count()) == (38, 7)
    assert Counting.read_bytes < len(padded) + 4096


def test_deleted_documents_are_told_only_when_asked_for(shard: bytes) -> None:
    with CouchFile(io.BytesIO(shard)) as file:
        assert len(list(file.docs())) == 38
        gone = [doc for doc in file.docs(deleted=True) if doc.deleted]
        assert len(gone) == 7
        assert all(doc.body is None for doc in gone)
        assert next(doc for doc in file.docs(deleted=True, bodies=True) if doc.deleted).to_json()["_deleted"]


def test_attachments_are_told_as_stubs(moments: dict[str, Path]) -> None:
    stubs = {}
    for path in moments["t0"].glob("shards/*/commcarehq__apps.1*.couch"):
        for doc in everything(path):
            stubs |= {(doc.id, name): stub for name, stub in doc.attachments.items()}
    assert len(stubs) == 40
    assert all(
        stub["stub"] and stub["length"] > 0 and stub["digest"].startswith("md5-") for stub in stubs.values()
    )


def test_a_file_may_be_read_while_it_lies_in_one_that_is_open(shard: bytes) -> None:
    source = io.BytesIO(shard)
    with CouchFile(source) as file:
        assert file.update_seq == 52
        assert len(file.uuid) == 32
    assert not source.closed


def test_an_older_moment_is_in_the_newer_file(moments: dict[str, Path]) -> None:
    for old in moments["t0"].glob("shards/*/commcarehq.1*.couch"):
        new = moments["t1"] / old.relative_to(moments["t0"])
        assert everything(new.read_bytes()[: old.stat().st_size]) == everything(old)


def test_a_copy_cut_anywhere_is_an_earlier_moment_or_none(shard: bytes) -> None:
    sizes = [*range(0, 400, 7), *range(4000, len(shard), 509), len(shard)]
    headers: list[int] = []
    for size in sizes:
        cut = io.BytesIO(shard[:size])
        if not has_header(cut):
            assert size < 8300
            with pytest.raises(CorruptBackup, match="no header"):
                CouchFile(cut, "it")
            continue
        with CouchFile(cut, "it") as file:
            headers.append(file.update_seq)
            assert len(list(file.docs(bodies=True))) == file.doc_count()
            assert file.trailing_bytes() < size
    assert headers == sorted(headers)
    assert len(set(headers)) > 3


@pytest.mark.parametrize("size", [0, 1, 4, 5, 20, 100, 180])
def test_a_file_cut_before_its_first_header_has_none(shard: bytes, size: int) -> None:
    assert not has_header(io.BytesIO(shard[:size]))


def test_a_byte_changed_anywhere_never_changes_what_a_document_says(shard: bytes) -> None:
    # Documents are sealed, trees are not: ids and revisions may come out wrong, unseen. That is CouchDB's format,
    # and why a backup has a sum of its own. A header that was hit gives way to the one before, as on a node.
    ends = [*(at for at in range(8192, len(shard), 4096) if shard[at] == 1), len(shard)]
    written = {json.dumps(doc.body) for end in ends for doc in everything(shard[:end])}
    chance = random.Random(5)
    seen = 0
    for _ in range(400):
        damaged = bytearray(shard)
        damaged[chance.randrange(len(shard))] ^= 1 << chance.randrange(8)
        try:
            read = everything(bytes(damaged))
        except CorruptBackup:
            seen += 1
        else:
            assert {json.dumps(doc.body) for doc in read} <= written
    assert seen > 50


def test_a_changed_byte_in_a_document_is_seen_by_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "db.couch"
    write_couch(path, [{"_id": "doc", "text": "needle"}, {"_id": "other"}])
    damaged = path.read_bytes().replace(b"needle", b"needlf")
    with CouchFile(io.BytesIO(damaged), "it") as file:
        assert [doc.id for doc in file.docs()] == ["doc", "other"]
        with pytest.raises(CorruptBackup, match="it is damaged: its sum does not match"):
            list(file.docs(bodies=True))


def test_what_was_written_but_not_committed_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "db.couch"
    write_couch(path, [{"_id": "one"}])
    with CouchAppender(path) as writer:
        writer.put({"_id": "two"})
    with CouchFile(path) as file:
        assert [doc.id for doc in file.docs()] == ["one"]
        assert file.trailing_bytes() > 0
    with CouchAppender(path) as writer:
        writer.put({"_id": "two"})
        writer.commit()
    with CouchFile(path) as file:
        assert [doc.id for doc in file.docs()] == ["one", "two"]
        assert file.trailing_bytes() == 0


@pytest.mark.parametrize("seal", [md5, blocks.xxh3_128])
def test_both_seals_are_known_in_one_file(tmp_path: Path, seal: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "db.couch"
    write_couch(path, [{"_id": "old", "text": "x" * 9000}], seal=md5)
    with CouchAppender(path, seal) as writer:
        writer.put({"_id": "new"})
        writer.commit()
    assert [doc.id for doc in everything(path)] == ["new", "old"]


@pytest.mark.parametrize("length", [*range(3900, 4100, 3), 8180, 12_300, 100_000])
def test_documents_of_every_length_cross_blocks(tmp_path: Path, length: int) -> None:
    path = tmp_path / "db.couch"
    write_couch(path, [{"_id": f"{n}", "text": "é" * length} for n in range(3)])
    assert [doc.body for doc in everything(path)] == [{"text": "é" * length}] * 3


def test_the_winner_among_conflicts_is_the_nodes(tmp_path: Path) -> None:
    def leaf(rev: int, gone: int, at: int) -> Any:
        return (bytes([rev]) * 16, (gone, at, 1, LEAF_SIZES, []), [])

    def build(a: Appender) -> object:
        bodies = [a.chunk(encode((compress_term(([(b"n", n)],)), compress_term([])))) for n in range(4)]
        branches = [leaf(9, 1, bodies[0]), leaf(3, 0, bodies[1]), leaf(5, 0, bodies[2])]
        tree = [(2, (REV, [], branches)), (1, leaf(200, 0, bodies[3]))]
        return a, [(b"doc", (1, 0, LEAF_SIZES, tree))]

    docs = everything(hostile(tmp_path, build))
    assert [(doc.rev, doc.body) for doc in docs] == [("3-" + "05" * 16, {"n": 2})]


# What no node wrote.


def compress_term(term: object) -> bytes:
    return b"\x01" + compress(encode(term))


def root(at: int, present: object = 1, gone: object = 0) -> object:
    return (at, (present, gone, (Atom("size_info"), 1, 1)), 100)


def header(tree: object, **changed: object) -> tuple[object, ...]:
    fields = {"name": Atom("db_header"), "version": 8, "seq": 1, "unused": 0, "tree": tree, **changed}
    return (*fields.values(), NIL, NIL, NIL, NIL, NIL, 1000, b"uuid", [], 0, 1000, Atom("undefined"))


def hostile(tmp_path: Path, build: Callable[[Appender], Any]) -> Path:
    """Write a file: ``build`` returns the header, or an appender with the members of one leaf."""
    path = tmp_path / "hostile.couch"
    appender = Appender(path)
    made = build(appender)
    if isinstance(made[0], Appender):
        at = appender.term((Atom("kv_node"), made[1]))
        made = header(root(at, len(made[1])))
    appender.header(made)
    appender.file.close()
    return path


def member(name: bytes, at: object = Atom("nil"), gone: int = 0) -> tuple[bytes, object]:
    return name, (1, gone, LEAF_SIZES, [(1, (REV, (gone, at, 1, LEAF_SIZES, []), []))])


def end(appender: Appender) -> int:
    return appender.file.seek(0, 2)


def loop_to_itself(a: Appender) -> Any:
    at = end(a)
    a.term((Atom("kp_node"), [(b"k", root(at))]))
    return header(root(at))


def loop_of_two(a: Appender) -> Any:
    first = end(a)
    a.term((Atom("kp_node"), [(b"k", root(first + 61))]))
    second = a.term((Atom("kp_node"), [(b"k", root(first))]))
    return header(root(second))


def shared_child(a: Appender) -> Any:
    at = a.term((Atom("kv_node"), [member(b"k")]))
    for _ in range(40):  # 2 ** 40 paths to one leaf
        at = a.term((Atom("kp_node"), [(b"k", root(at)), (b"k", root(at))]))
    return header(root(at, 1 << 40))


def deep_chain(a: Appender) -> Any:
    at = a.term((Atom("kv_node"), [member(b"k")]))
    for _ in range(100):
        at = a.term((Atom("kp_node"), [(b"k", root(at))]))
    return header(root(at))


def huge_chunk(a: Appender) -> Any:
    at = end(a)
    a.file.write(b"\x00" * (at % 4096 == 0) + b"\xff\xff\xff\xff" + b"x" * 100)
    return header(root(at))


def long_chunk(a: Appender) -> Any:
    at = end(a)
    a.file.write(b"\x00" * (at % 4096 == 0) + b"\x03\x00\x00\x00" + b"x" * 100)
    return header(root(at))


def one(term: object) -> Callable[[Appender], Any]:
    """Return a file whose root is any term."""
    return lambda a: header(root(a.term(term)))


def only(*members: object) -> Callable[[Appender], Any]:
    """Return a file whose root is a leaf with any members."""
    return lambda a: (a, list(members))


def revs(tree: object) -> Callable[[Appender], Any]:
    """Return a file with one document of any revisions."""
    return only((b"k", (1, 0, LEAF_SIZES, tree)))


def body(stored: object) -> Callable[[Appender], Any]:
    """Return a file with one document of any body."""
    return lambda a: (a, [member(b"k", a.chunk(encode(stored)))])


EMPTY = compress_term([])
HOSTILE: dict[str, tuple[Callable[[Appender], Any], str]] = {
    "a loop": (loop_to_itself, "no readable root or branch"),
    "a loop of two": (loop_of_two, "no readable root or branch"),
    "a child of many": (shared_child, "out of order"),
    "a chain": (deep_chain, "levels"),
    "a huge length": (huge_chunk, "of 2147483647 bytes"),
    "a length past the end": (long_chunk, "past the end"),
    "a root behind the header": (lambda _: header(root(1 << 40)), "root or branch"),
    "a root before the file": (lambda _: header(root(-1)), "root or branch"),
    "a root that is none": (lambda _: header((1, 2, 3)), "root or branch"),
    "a root nowhere": (lambda a: header(root(a.chunk(b"\x83") + 3)), r"past the end|sum"),
    "negative counts": (lambda a: header(root(a.term(0), -1)), "root or branch"),
    "counts that lie": (
        lambda a: header(root(a.term((Atom("kv_node"), [member(b"k")])), 7)),
        "its root says 7",
    ),
    "deleted counts that lie": (
        lambda a: header(root(a.term((Atom("kv_node"), [member(b"k")])), 1, 3)),
        "its root says 1 and 3",
    ),
    "a header of another kind": (lambda _: header(NIL, name=Atom("mrheader")), "no database's"),
    "a short header": (lambda _: (Atom("db_header"), 8), "no database's"),
    "a header that is no tuple": (lambda _: [1, 2, 3], "no database's"),
    "a version to come": (lambda _: header(NIL, version=99), "disk version 99"),
    "no sequence": (lambda _: header(NIL, seq=b"x"), "update sequence"),
    "a node of no kind": (one((Atom("xx_node"), [])), "no node"),
    "an empty node": (one((Atom("kv_node"), [])), "no node"),
    "a node of no members": (one((Atom("kv_node"), [1, 2])), "no node"),
    "a node that is a number": (one(5), "no node"),
    "keys that are numbers": (only((1, 2)), "no node"),
    "keys in disorder": (only(member(b"b"), member(b"a")), "out of order"),
    "keys twice": (only(member(b"a"), member(b"a")), "out of order"),
    "an id that is no text": (only(member(b"\xff")), "no text"),
    "no revisions": (revs([]), "no readable revisions"),
    "only missing revisions": (revs([(1, (REV, [], []))]), "no readable revisions"),
    "revisions that are no tree": (revs([5]), "no tree"),
    "revisions of odd depth": (revs([(b"1", (REV, [], []))]), "no tree"),
    "revisions that are short": (revs([(1, (REV,))]), "no tree"),
    "a revision of a number": (revs([(1, (5, (0, 1, 1), []))]), "no tree"),
    "deleted here, present there": (revs([(1, (REV, (1, 0, 1), []))]), "no readable revisions"),
    "a body behind the header": (only(member(b"k", 1 << 50)), "behind the header"),
    "a body that is none": (body(5), "no document"),
    "a body that is no object": (body((compress_term([1]), EMPTY)), "no object"),
    "a body that is no json": (body((compress_term((5,)), EMPTY)), "no JSON"),
    "a body that is no term": (body((b"\x01\x05\x00a", EMPTY)), "not snappy"),
    "a body in zstandard": (body((b"\x28\xb5\x2f\xfd....", EMPTY)), "Zstandard"),
    "a body packed in nothing known": (body((b"plain", EMPTY)), "131"),
    "a snappy bomb": (body((b"\x01\xff\xff\xff\xff\x0f", EMPTY)), "more than"),
    "a deflate bomb": (body((b"\x83\x50\xff\xff\xff\xff", EMPTY)), "more than"),
    "attachments that are none": (body((compress_term(([],)), compress_term(5))), "attachments"),
    "attachments that are short": (
        body((compress_term(([],)), compress_term([(b"a", b"b")]))),
        "attachments",
    ),
    "attachments of odd kinds": (body((compress_term(([],)), compress_term([(1,) * 8]))), "attachments"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_no_node_wrote_is_refused_at_once(tmp_path: Path, what: str) -> None:
    build, reason = HOSTILE[what]
    path = hostile(tmp_path, build)
    began = time.monotonic()
    with pytest.raises(CorruptBackup, match=reason):
        everything(path)
    assert time.monotonic() - began < 5


def test_headers_without_end_are_given_up(tmp_path: Path) -> None:
    path = tmp_path / "headers.couch"
    path.write_bytes((b"\x01\x00\x00\xff\xff" + b"x" * 4091) * 5000)
    began = time.monotonic()
    with pytest.raises(CorruptBackup, match="all damaged"):
        CouchFile(path)
    assert time.monotonic() - began < 5
    with path.open("rb") as file:
        assert not has_header(file)


@pytest.mark.parametrize("blocks", [1, 7, 8, 9, 23, 24, 25, 255, 500, 511, 512, 513])
def test_a_header_is_found_however_much_was_written_after_it(shard: bytes, blocks: int) -> None:
    after = bytes(-len(shard) % 4096) + bytes(4096) * blocks
    with CouchFile(io.BytesIO(shard + after)) as late, CouchFile(io.BytesIO(shard)) as file:
        assert (late.update_seq, late.uuid) == (file.update_seq, file.uuid)


def test_a_header_torn_at_the_end_gives_way_to_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "db.couch"
    write_couch(path, [{"_id": "one"}])
    size = path.stat().st_size
    with CouchAppender(path) as writer:
        writer.put({"_id": "two"})
        writer.commit()
    torn = path.read_bytes()[:-3]
    assert [doc.id for doc in everything(torn)] == ["one"]
    with CouchFile(io.BytesIO(torn)) as file:
        assert file.trailing_bytes() == len(torn) - size


def test_garbage_in_a_tree_is_refused_or_read(tmp_path: Path) -> None:
    chance = random.Random(11)
    node = encode((Atom("kv_node"), [member(b"a"), member(b"b")]))
    for _ in range(400):
        damaged = bytearray(node)
        for _ in range(chance.randint(1, 4)):
            damaged[chance.randrange(1, len(node))] = chance.randrange(256)
        (tmp_path / "hostile.couch").unlink(missing_ok=True)
        path = hostile(tmp_path, lambda a, node=bytes(damaged): header(root(a.chunk(node), 2)))
        try:
            everything(path)
        except CorruptBackup:
            continue


def test_a_missing_file_is_not_called_damaged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        CouchFile(tmp_path / "none.couch")


def test_compaction_keeps_all_that_is_current(moments: dict[str, Path], tmp_path: Path) -> None:
    for old in moments["t0"].glob("**/*.couch"):
        copy = tmp_path / old.name
        copy.write_bytes(old.read_bytes())
        inode = copy.stat().st_ino
        with CouchAppender(copy) as writer:
            writer.compact()
        assert copy.stat().st_ino != inode
        assert everything(copy) == everything(old)


def test_appending_changes_nothing_that_is_there(tmp_path: Path) -> None:
    path = tmp_path / "db.couch"
    write_couch(path, ({"_id": f"doc{n:03}", "n": n} for n in range(200)))
    before = path.read_bytes()
    with CouchAppender(path) as writer:
        second = writer.put({"_id": "doc007", "n": -1})
        writer.put({"_id": "doc008", "_deleted": True})
        writer.commit()
    assert path.read_bytes().startswith(before)
    docs = {doc.id: doc for doc in everything(path)}
    assert docs["doc007"].rev == second
    assert second.startswith("2-")
    assert docs["doc008"].deleted
