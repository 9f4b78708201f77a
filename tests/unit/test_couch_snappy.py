"""Snappy is unpacked to what it says, or refused."""

from __future__ import annotations

import contextlib
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hq_backups.engine.couch.snappy import decompress
from tests.testbed.erlang import compress

LIMIT = 1 << 20

literals = st.binary(min_size=1, max_size=300).map(lambda data: ("literal", data, 0))
copies = st.tuples(st.just("copy"), st.integers(1, 64), st.integers(1, 70_000))


def size_of(length: int) -> bytes:
    made = bytearray()
    while length >= 0x80:
        made.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes([*made, length])


def build(steps: list[tuple[str, object, int]]) -> tuple[bytes, bytes]:
    """Return snappy made of steps, in every form that each can have, and what it holds."""
    packed, plain = bytearray(), bytearray()
    for kind, what, offset in steps:
        if kind == "literal":
            assert isinstance(what, bytes)
            length = len(what) - 1
            packed += bytes([length << 2]) if length < 60 else b"\xf4" + length.to_bytes(2, "little")
            packed += what
            plain += what
        elif plain:
            assert isinstance(what, int)
            offset = min(offset, len(plain))
            if 4 <= what <= 11 and offset < 2048:
                packed += bytes([1 | (what - 4) << 2 | offset >> 8 << 5, offset & 0xFF])
            elif offset < 1 << 16:
                packed += bytes([2 | (what - 1) << 2]) + offset.to_bytes(2, "little")
            else:
                packed += bytes([3 | (what - 1) << 2]) + offset.to_bytes(4, "little")
            for _ in range(what):
                plain.append(plain[-offset])
    return size_of(len(plain)) + bytes(packed), bytes(plain)


@given(st.lists(literals | copies))
def test_literals_and_copies_of_every_form_unpack(steps: list[tuple[str, object, int]]) -> None:
    packed, plain = build(steps)
    assert decompress(packed, LIMIT) == plain


def test_a_copy_from_far_away_unpacks() -> None:
    steps = [("literal", bytes(range(250)), 0)] * 300 + [("copy", 64, 70_000)]
    packed, plain = build(steps)
    assert decompress(packed, LIMIT) == plain


@given(st.binary(max_size=3000))
def test_what_the_test_bed_packs_unpacks(data: bytes) -> None:
    assert decompress(compress(data), LIMIT) == data


@given(st.binary(max_size=200))
def test_garbage_unpacks_or_is_a_value_error(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        assert len(decompress(data, 1000)) <= 1000


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "size is not readable"),
        (b"\xff\xff\xff\xff\xff\x01", "size is not readable"),
        (b"\xff\xff\xff\xff\x0f", "more than"),
        (b"\x05\x10hell", "past the end"),
        (b"\x05\xff\xff", "past the end"),
        (b"\x05\x00a\x01", "past the end"),
        (b"\x05\x00a\x01\x00", "before the beginning"),
        (b"\x05\x00a\x01\x02", "before the beginning"),
        (b"\x02\x00a\x01\x01", "more than it says"),
        (b"\x05\x00a", "unpacks to 1 bytes, not 5"),
    ],
)
def test_what_is_wrong_is_said(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        decompress(data, LIMIT)


def test_more_than_the_limit_is_refused_before_it_is_made() -> None:
    began = time.monotonic()
    with pytest.raises(ValueError, match="more than"):
        decompress(size_of(1 << 31) + b"\x00a" + b"\xfe\x01\x00" * 100_000, LIMIT)
    assert time.monotonic() - began < 1
