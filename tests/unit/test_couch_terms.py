"""Terms as Erlang writes them are read; anything else is refused, quickly."""

from __future__ import annotations

import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hq_backups.engine.couch.ejson import to_json
from hq_backups.engine.couch.terms import Atom, decode
from tests.testbed.erlang import encode, from_json

scalars = (
    st.integers()
    | st.integers(min_value=2**2000, max_value=2**2050)
    | st.floats(allow_nan=False)
    | st.binary()
    | st.text(max_size=60).map(Atom)
)
keys = st.binary() | st.integers() | st.text(max_size=20).map(Atom)
all_terms = st.recursive(
    scalars,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(keys, inner, max_size=5),
    max_leaves=30,
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=30,
)


@given(all_terms)
def test_what_was_written_is_read(term: object) -> None:
    assert decode(encode(term)) == term


@given(all_terms)
def test_a_packed_term_is_the_same_term(term: object) -> None:
    plain = encode(term)[1:]
    packed = b"\x83\x50" + len(plain).to_bytes(4, "big") + zlib.compress(plain)
    assert decode(packed) == term


@given(json_values)
def test_json_comes_back_as_it_was(value: object) -> None:
    assert to_json(decode(encode(from_json(value)))) == value


@given(st.binary(max_size=300))
def test_garbage_is_a_term_or_a_value_error(data: bytes) -> None:
    for given_bytes in (data, b"\x83" + data, b"\x83\x50\x00\x00\x00\x20" + data):
        try:
            decode(given_bytes)
        except ValueError:
            continue


@given(all_terms, st.data())
def test_a_term_cut_anywhere_is_refused(term: object, data: st.DataObject) -> None:
    whole = encode(term)
    with pytest.raises(ValueError, match=r"cut short|no term"):
        decode(whole[: data.draw(st.integers(0, len(whole) - 1))])


@pytest.mark.parametrize(
    ("data", "term"),
    [
        (b"\x83d\x00\x03nil", Atom("nil")),
        (b"\x83d\x00\x01\xe9", Atom("é")),
        (b"\x83s\x01\xe9", Atom("é")),
        (b"\x83w\x02\xc3\xa9", Atom("é")),
        (b"\x83v\x00\x02\xc3\xa9", Atom("é")),
        (b"\x83k\x00\x03\x01\x02\xff", [1, 2, 255]),
        (b"\x83b\xff\xff\xff\xfe", -2),
        (b"\x83n\x08\x01" + b"\x00" * 7 + b"\x01", -(1 << 56)),
        (b"\x83c1.50000000000000000000e+00" + b"\x00" * 5, 1.5),
        (b"\x83l\x00\x00\x00\x01a\x01a\x02", [1, 2]),
        (b"\x83h\x00", ()),
        (b"\x83i\x00\x00\x00\x00", ()),
        (b"\x83t\x00\x00\x00\x00", {}),
    ],
)
def test_each_spelling_is_known(data: bytes, term: object) -> None:
    read = decode(data)
    assert (read, type(read)) == (term, type(term))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no term"),
        (b"\x82a\x01", "no term"),
        (b"\x83", "cut short"),
        (b"\x83a\x01a", "follow"),
        (b"\x83\xff", "begins with 255"),
        (b"\x83l\xff\xff\xff\xff" + b"j" * 100, "cut short"),
        (b"\x83i\xff\xff\xff\xff", "cut short"),
        (b"\x83t\xff\xff\xff\xff", "cut short"),
        (b"\x83m\xff\xff\xff\xffabc", "cut short"),
        (b"\x83o\xff\xff\xff\xff\x00", "number of 4294967295 bytes"),
        (b"\x83l\x00\x00\x00\x01a\x01k\x00\x01a", "tail"),
        (b"\x83t\x00\x00\x00\x01ja\x01", "key"),
        (b"\x83w\x01\xff", "utf-8"),
        (b"\x83c" + b"x" * 31, "float"),
        (b"\x83\x50\xff\xff\xff\xff", "unpacks to 4294967295"),
        (b"\x83\x50\x00\x00\x00\x01" + zlib.compress(b"a" * 1000), "does not unpack"),
        (b"\x83\x50\x00\x00\x00\x09" + zlib.compress(b"a\x01"), "does not unpack"),
        (b"\x83\x50\x00\x00\x00\x02" + zlib.compress(b"a\x01") + b"more", "does not unpack"),
        (b"\x83\x50\x00\x00\x00\x02garbage", "incorrect header"),
    ],
)
def test_what_is_wrong_is_said(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        decode(data)


def test_revisions_thousands_deep_are_read() -> None:
    data = b"\x83" + b"h\x01" * 50_000 + b"j"
    term = decode(data)
    for _ in range(50_000):
        assert isinstance(term, tuple)
        (term,) = term
    assert term == []


def test_a_term_without_an_end_to_its_depth_is_refused() -> None:
    with pytest.raises(ValueError, match="deep"):
        decode(b"\x83" + b"h\x01" * 1_000_000 + b"j")


def test_too_many_terms_in_one_are_refused() -> None:
    with pytest.raises(ValueError, match="more than"):
        decode(b"\x83l" + (5_000_000).to_bytes(4, "big") + b"j" * 5_000_001)


def test_deep_documents_become_json() -> None:
    term: object = []
    for _ in range(20_000):
        term = [term]
    made = to_json(term)
    for _ in range(20_000):
        (made,) = made
    assert made == []


@pytest.mark.parametrize(
    "term", [(), (1,), ([1],), ([(1, 2)],), ([(b"a",)],), Atom("undefined"), {}, b"\xff", [(b"a", b"b")]]
)
def test_what_is_no_json_is_refused(term: object) -> None:
    with pytest.raises(ValueError, match=r"JSON|pair|utf-8"):
        to_json(term)
