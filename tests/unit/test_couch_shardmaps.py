"""Shard maps are read and renamed as they are; one by which documents would vanish is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hq_backups.engine.couch.shardmaps import ShardMap, renamed, shard_maps
from tests.testbed.couch_data import FIXTURE_NODE, FIXTURES, shard_map, spans, unpack_fixture

NEW = "couchdb@new.example"
names = st.text(st.characters(blacklist_characters="\0/", blacklist_categories=["Cs"]), min_size=1).filter(
    lambda name: name not in (".", "..")
)
paths = st.lists(names, min_size=1, max_size=3).map("/".join)
nodes = st.lists(names.map(lambda name: f"couchdb@{name}"), min_size=1, max_size=4, unique=True)


@st.composite
def maps(draw: st.DrawFn) -> dict[str, Any]:
    holders = draw(nodes)
    doc = shard_map(
        draw(paths),
        q=draw(st.integers(1, 9)),
        n=draw(st.integers(1, len(holders))),
        nodes=holders,
        suffix=draw(st.sampled_from(["", ".1795351694"])),
    )
    return doc | {"_rev": draw(st.sampled_from(["1-abc", "17-" + "0" * 32]))}


@pytest.fixture(scope="module")
def real() -> dict[str, Any]:
    """Return the maps that a real node gave."""
    told: dict[str, Any] = json.loads((FIXTURES / "dbs-docs.json").read_text())
    return told


def test_a_file_of_maps_gives_what_its_node_gave(tmp_path: Path, real: dict[str, Any]) -> None:
    assert shard_maps(unpack_fixture("t0", tmp_path) / "_dbs.couch") == real


@pytest.mark.parametrize("moment", ["t0", "t1"])
def test_every_shard_of_every_map_has_its_file(tmp_path: Path, moment: str) -> None:
    root = unpack_fixture(moment, tmp_path)
    files = {name for doc in shard_maps(root / "_dbs.couch").values() for name in ShardMap.parse(doc).files()}
    assert files == {str(path.relative_to(root)) for path in root.glob("shards/**/*.couch")}


def test_a_real_map_says_what_it_holds(real: dict[str, Any]) -> None:
    found = ShardMap.parse(real["commcarehq"])
    assert (found.name, found.suffix, found.nodes) == ("commcarehq", ".1795351694", [FIXTURE_NODE])
    assert found.ranges == ["00000000-7fffffff", "80000000-ffffffff"]


def test_a_real_map_renamed_differs_in_the_name_only(real: dict[str, Any]) -> None:
    for doc in real.values():
        assert json.dumps(renamed(doc, NEW)) == json.dumps(doc).replace(FIXTURE_NODE, NEW)


@given(maps())
def test_renaming_keeps_all_but_the_nodes(doc: dict[str, Any]) -> None:
    before = copy.deepcopy(doc)
    made = renamed(doc, NEW)
    assert doc == before
    assert list(made) == list(doc)
    assert {key: made[key] for key in ("_id", "_rev", "shard_suffix", "props")} == {
        key: doc[key] for key in ("_id", "_rev", "shard_suffix", "props")
    }
    assert made["by_range"] == {span: [NEW] for span in doc["by_range"]}
    assert list(made["by_node"]) == [NEW]
    assert sorted(made["by_node"][NEW]) == sorted(doc["by_range"])
    assert sorted(map(tuple, made["changelog"])) == sorted({("add", span, NEW) for span in doc["by_range"]})
    assert json.loads(json.dumps(made)) == made


@given(maps())
def test_a_renamed_map_has_the_same_files_and_stays_as_it_is(doc: dict[str, Any]) -> None:
    made = renamed(doc, NEW)
    assert ShardMap.parse(made).files() == ShardMap.parse(doc).files()
    assert ShardMap.parse(made).nodes == [NEW]
    assert renamed(made, NEW) == made


@given(maps(), st.data())
def test_a_map_that_lost_a_range_is_refused(doc: dict[str, Any], data: st.DataObject) -> None:
    lost = data.draw(st.sampled_from(sorted(doc["by_range"])))
    del doc["by_range"][lost]
    doc["by_node"] = {node: [span for span in held if span != lost] for node, held in doc["by_node"].items()}
    with pytest.raises(ValueError, match=r"nowhere|empty"):
        renamed(doc, NEW)


@given(maps(), st.data())
def test_a_map_that_disagrees_with_itself_is_refused(doc: dict[str, Any], data: st.DataObject) -> None:
    node = data.draw(st.sampled_from(sorted(doc["by_node"])))
    doc["by_node"][node].pop()
    with pytest.raises(ValueError, match="disagree"):
        renamed(doc, NEW)


@pytest.mark.parametrize("name", ["my-db-two", "a/b", "a/b-c/d-e", "plus+$()", "ünï/cödé", "x" * 230])
def test_names_go_into_paths_as_they_are(name: str) -> None:
    doc = shard_map(name, q=2, suffix=".1234567890")
    assert ShardMap.parse(doc).files() == [f"shards/{span}/{name}.1234567890.couch" for span in spans(2)]


def test_copies_split_each_by_itself_are_a_whole_map() -> None:
    by_range = {
        "00000000-7fffffff": ["one"],
        "00000000-3fffffff": ["two"],
        "40000000-7fffffff": ["two"],
        "80000000-ffffffff": ["one", "two"],
    }
    by_node = {
        node: [span for span, holders in by_range.items() if node in holders] for node in ("one", "two")
    }
    found = ShardMap.parse({"_id": "db", "by_range": by_range, "by_node": by_node})
    assert len(found.files()) == 4


def test_a_suffix_given_as_text_or_not_at_all_is_read() -> None:
    doc = shard_map("db")
    assert ShardMap.parse(doc | {"shard_suffix": ".1795351694"}).suffix == ".1795351694"
    del doc["shard_suffix"]
    assert ShardMap.parse(doc).suffix == ""


def changed(**values: Any) -> dict[str, Any]:
    return shard_map("db", q=1) | values


@pytest.mark.parametrize(
    ("doc", "reason"),
    [
        ({}, "no name"),
        (changed(_id=5), "no name"),
        (changed(_id=""), "no name"),
        (changed(_id="/etc/passwd"), "no database's name"),
        (changed(_id="a/../../b"), "no database's name"),
        (changed(_id="a\0b"), "no database's name"),
        (changed(by_range=None), "by_range is missing"),
        (changed(by_node={}), "by_node is missing"),
        (changed(by_range=[]), "by_range is missing"),
        (changed(by_range={"00000000-ffffffff": "n"}), "no list of names"),
        (changed(by_range={"00000000-ffffffff": [5]}), "no list of names"),
        (changed(by_range={"../../x": ["n"]}, by_node={"n": ["../../x"]}), "no range"),
        (changed(by_range={"ffffffff-00000000": ["n"]}, by_node={"n": ["ffffffff-00000000"]}), "no range"),
        (changed(by_range={"00000000-7fffffff": ["n"]}, by_node={"n": ["00000000-7fffffff"]}), "80000000 on"),
        (changed(by_range={"00000000-ffffffff": []}, by_node={"n": []}), "no node has"),
        (changed(shard_suffix="/../x"), "shard_suffix"),
        (changed(shard_suffix=[46, 47]), "shard_suffix"),
        (changed(shard_suffix=[46, "1"]), "shard_suffix"),
        (changed(shard_suffix=5), "shard_suffix"),
        (changed(changelog=5), "changelog"),
        (changed(changelog=[["add"]]), "changelog"),
    ],
)
def test_what_is_no_map_is_refused_with_the_reason(doc: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        ShardMap.parse(doc)
