"""What a data directory holds, told from headers that passed by and from shard maps."""

from __future__ import annotations

import io
import os
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hq_backups.engine.couch import layout, union
from hq_backups.engine.couch.contents import Contents
from hq_backups.engine.couch.headers import KEPT, Header, HeaderWatch, header_of
from hq_backups.engine.couch.shardmaps import ShardMap
from hq_backups.engine.errors import BadManifest, CorruptBackup
from tests.testbed.couch_data import shard_map
from tests.testbed.couch_writer import CouchAppender

A, B = "couchdb@10.0.0.1", "couchdb@10.0.0.2"


def passed(data: bytes, *cuts: int) -> Header | None:
    watch, places = HeaderWatch(), [0, *sorted(cuts), len(data)]
    for start, end in pairwise(places):
        watch.feed(memoryview(data)[start:end])
    return watch.header()


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return a file with more headers than are kept, some back to back, some far apart."""
    path = tmp_path_factory.mktemp("couch") / "d.couch"
    with CouchAppender(path) as file:
        for n in range(2 * KEPT):
            file.put({"_id": f"d{n}", "text": "x" * (n * 1500)})
            file.commit()
            if n % 3 == 0:
                file.commit()
    return path.read_bytes()


@given(share=st.floats(0, 1), cuts=st.lists(st.floats(0, 1), max_size=6))
def test_a_stream_tells_the_header_that_the_file_would(
    database: bytes, share: float, cuts: list[float]
) -> None:
    data = database[: int(share * len(database))]
    assert passed(data, *(int(cut * len(data)) for cut in cuts)) == header_of(io.BytesIO(data), "it")


def test_a_torn_end_falls_back_to_the_header_before(database: bytes) -> None:
    whole = passed(database)
    torn = passed(database + b"\x01" + struct.pack(">I", 300) + os.urandom(5000))
    assert whole == torn == header_of(io.BytesIO(database), "it")


def test_nothing_and_noise_have_no_header() -> None:
    assert passed(b"") is None
    assert passed(b"\x01" * 4096 * (KEPT + 5)) is None


def contents(*docs: dict[str, Any], lacks: str = "", seq: int = 1) -> Contents:
    maps = [ShardMap.parse(doc) for doc in docs]
    files = [path for each in maps for path in each.files() if not lacks or not path.startswith(lacks)]
    return Contents(maps, {path: Header(1, 0, seq) for path in [*files, layout.DBS]})


def test_whose_part_it_is_shows_by_what_is_missing() -> None:
    both = shard_map("d", q=2, nodes=[A, B])
    first, second = contents(both, lacks="shards/8"), contents(both, lacks="shards/0")
    assert (first.node(), second.node()) == (A, B)
    assert first.problems() == second.problems() == []
    assert "has no file" in first.problems(B)[0]
    # Each has one of the two here, both ranges of a third database are gone: nobody's directory is whole.
    other = shard_map("e", q=1, nodes=[A])
    neither = Contents([*first.maps, ShardMap.parse(other)], {})
    assert neither.problems()


def test_copies_on_two_nodes_leave_open_whose_it_is_and_nothing_is_wrong() -> None:
    both = contents(shard_map("d", n=2, nodes=[A, B]))
    assert both.node() is None
    assert both.problems() == []


def test_a_union_takes_the_maps_that_know_most_databases() -> None:
    older, newer = shard_map("d", q=2, nodes=[A, B]), shard_map("late", q=1, nodes=[A])
    first, second = (
        contents(older, newer, lacks="shards/8"),
        contents(older, lacks="shards/00000000-7", seq=9),
    )
    for parts in ([first, second], [second, first]):
        whole = union.contents(parts, union.choose(parts), "both")
        assert [each.name for each in whole.maps] == ["d", "late"]


def test_a_union_that_lacks_a_range_names_it_and_who_has_it() -> None:
    part = contents(shard_map("d", q=2, nodes=[A, B]), lacks="shards/8")
    with pytest.raises(CorruptBackup, match=rf"80000000-ffffffff of database 'd' \(of node {B}\)"):
        union.contents([part, part], union.choose([part, part]), "both")


def test_what_is_recorded_is_read_back_as_it_was() -> None:
    before = contents(shard_map("a/b", q=4), shard_map("x"))
    assert Contents.recorded(before.to_source(), "it") == before


@pytest.mark.parametrize(
    "source",
    [
        {"databases": 1},
        {"databases": {"d": 1}},
        {"databases": {"d": {"suffix": "", "ranges": [1]}}},
        {"shards": {"f": 1}},
        {"shards": {"f": ["x", 1, 1]}},
    ],
)
def test_a_manifest_s_nonsense_is_a_bad_manifest(source: dict[str, Any]) -> None:
    with pytest.raises(BadManifest, match="makes no sense"):
        Contents.recorded(source, "it")


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("_dbs.couch", layout.Kind.MAPS),
        ("_users.couch", layout.Kind.TOP),
        ("shards/00000000-7fffffff/a/b.1795351694.couch", layout.Kind.SHARD),
        (".shards/00000000-7fffffff/d.17_design/mrview/0a.view", layout.Kind.VIEW),
        ("shards/00000000-7fffffff/d.17.couch.compact", None),
        ("shards/00000000-7fffffff/d.17.couch.compact.data", None),
        (".shards/00000000-7fffffff/d.17_design/mrview/0a.compact.view", None),
        (".delete/0a.couch", None),
        ("elsewhere/d.couch", None),
        ("shards/d.couch", None),
    ],
)
def test_what_a_file_is(path: str, kind: layout.Kind | None) -> None:
    assert layout.kind(path) is kind


def test_views_are_before_shards_and_the_maps_are_last(tmp_path: Path) -> None:
    paths = ["_dbs.couch", "_users.couch", "shards/0-7/d.1.couch", ".shards/0-7/d.1_design/mrview/a.view"]
    assert [layout.kind(path) for path in sorted(paths, key=layout.order)] == list(layout.Kind)
