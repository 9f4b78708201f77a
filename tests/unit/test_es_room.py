"""How much a snapshot adds to its repository, and how much of the nodes' disks may be written."""

from __future__ import annotations

import pytest

from hq_backups.engine.elasticsearch.room import Disks, kept_free
from hq_backups.engine.stores.elasticsearch_outlook import added

GIB = 1 << 30


@pytest.mark.parametrize(
    ("live", "stored", "bytes_"),
    [
        ({}, {}, 0),
        ({"a": 5, "b": 7}, {}, 12),
        # A merge makes every byte of an index new, however much of it is stored.
        ({"a": 5, "b": 7}, {"a": 5, "b": 7}, 7),
        ({"a": 5, "b": 7, "c": 9}, {"a": 1}, 20),
        # What a deletion freed in one index does not make room for another.
        ({"a": 5, "b": 7}, {"a": 50}, 7),
        # Nothing can be asked: all that is certain is that one index must have room.
        ({"a": 5, "b": 7}, None, 7),
    ],
)
def test_what_no_snapshot_holds_is_added_and_never_less_than_the_largest_index(
    live: dict[str, int], stored: dict[str, int] | None, bytes_: int
) -> None:
    assert added(live, stored) == bytes_


@pytest.mark.parametrize(
    ("stage", "kept"),
    [
        ("95%", 5 * GIB),
        ("0.9", 10 * GIB),
        ("10gb", 10 * GIB),
        ("512mb", GIB // 2),
        ("7b", 7),
        ("", 0),
        ("?", 0),
    ],
)
def test_a_flood_stage_is_a_part_that_is_used_or_bytes_that_are_free(stage: str, kept: int) -> None:
    assert kept_free(stage, 100 * GIB) == pytest.approx(kept, abs=1)


def test_no_two_copies_of_a_shard_lie_on_one_node() -> None:
    assert [Disks(0, nodes).copies(2) for nodes in (1, 2, 3, 9)] == [1, 2, 3, 3]
