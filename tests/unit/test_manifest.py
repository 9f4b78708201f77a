"""A manifest is untrusted until it was read; what it says names nothing but a file beside it."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hq_backups.engine import manifest as module
from hq_backups.engine.errors import BadManifest, NewerManifest
from hq_backups.engine.manifest import load_manifest
from tests.factories import manifest


def raw(**changes: Any) -> bytes:
    body = json.loads(manifest().to_json())
    body.update(changes)
    return json.dumps(body).encode()


def test_what_is_written_is_read_again() -> None:
    made = manifest(source={"databases": [{"name": 'a "b" ✓', "size": 1}]}, warnings=["one"])
    assert load_manifest(made.to_json(), "x") == made


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "../../etc/passwd"},
        {"name": "/etc/passwd"},
        {"name": ".."},
        {"name": ""},
        {"name": "a\x00b"},
        {"name": "a\x1b[2Jb"},
        {"name": "x" * 300},
        {"name": 7},
        {"size": -1},
        {"size": True},
        {"size": "1"},
        {"size": 1.5},
        {"plain_size": -1},
        {"sha256": "A" * 64},
        {"sha256": "0" * 63},
        {"crc32": "xyz"},
        {"store": "mysql"},
        {"type": "yearly"},
        {"started_at": "yesterday"},
        {"local_date": "2026-13-01"},
        {"schema": 0},
        {"schema": None},
        {"schema": "1"},
        {"source": []},
        {"warnings": {"a": 1}},
        {"more": 1},
    ],
    ids=str,
)
def test_a_hostile_or_broken_field_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(BadManifest) as caught:
        load_manifest(raw(**changes), "where")
    assert "where" in str(caught.value)


def test_a_missing_field_is_refused() -> None:
    body = json.loads(manifest().to_json())
    del body["sha256"]
    with pytest.raises(BadManifest):
        load_manifest(json.dumps(body).encode(), "x")


@pytest.mark.parametrize("text", [b"", b"null", b"[]", b"{", b"\xff\xfe", b'"x"', b"[" * 100_000])
def test_what_is_not_a_manifest_is_refused(text: bytes) -> None:
    with pytest.raises(BadManifest):
        load_manifest(text, "x")


@pytest.mark.parametrize("number", [b"1e999", b"-1e999", b"Infinity", b"NaN"])
def test_a_number_beyond_all_bounds_is_refused_wherever_it_is(number: bytes) -> None:
    made = raw(source={"counts": [1.5, "HERE"]})
    load_manifest(made.replace(b'"HERE"', b"1e99"), "x")
    with pytest.raises(BadManifest):
        load_manifest(made.replace(b'"HERE"', number), "x")


def test_a_huge_manifest_is_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 100)
    with pytest.raises(BadManifest, match="larger than"):
        load_manifest(manifest().to_json(), "x")


def test_a_newer_schema_says_to_update() -> None:
    with pytest.raises(NewerManifest) as caught:
        load_manifest(raw(schema=2, entirely_new=1), "x")
    assert "Update hq_backups" in caught.value.hint


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda c: st.lists(c) | st.dictionaries(st.text(), c),
    )
)
def test_no_json_whatever_gives_anything_but_a_manifest_or_a_refusal(value: Any) -> None:
    with contextlib.suppress(BadManifest):
        load_manifest(json.dumps(value).encode(), "x")
