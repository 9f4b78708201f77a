"""Headers of tar archives: read as GNU tar and Python's tarfile do, and never twice in two ways."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hq_backups.engine.blobs.headers import DIRECTORY, FILE, Member, inside, members
from hq_backups.engine.blobs.unpack import Root
from hq_backups.engine.errors import CorruptBackup, UnsafeArchive
from hq_backups.engine.streams import PlainReader

FORMATS = (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT)
PART = st.text(
    st.characters(blacklist_characters="/\0", blacklist_categories=["Cs"]), min_size=1, max_size=40
).filter(lambda part: part not in (".", ".."))
NAMES = st.lists(PART, min_size=1, max_size=6).map("/".join)


def pack(entries: list[tuple[str, bytes]], format_: int) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=format_) as archive:
        for name, body in entries:
            made = tarfile.TarInfo(name)
            made.size, made.mode, made.mtime = len(body), 0o640, 12345
            archive.addfile(made, io.BytesIO(body))
    return packed.getvalue()


def read(raw: bytes) -> list[tuple[Member, bytes]]:
    plain = PlainReader(io.BytesIO(raw), "none", "it")
    try:
        return [(m, b"".join(plain.pieces(m.size))) for m in members(plain)]
    finally:
        plain.close()


@settings(deadline=None)
@given(
    st.lists(st.tuples(NAMES, st.binary(max_size=2000)), max_size=8),
    st.sampled_from((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)),
)
def test_whatever_tarfile_writes_is_read(entries: list[tuple[str, bytes]], format_: int) -> None:
    found = read(pack(entries, format_))
    assert [(m.name.decode(), body) for m, body in found] == entries
    assert all((m.kind, m.mode, m.mtime) == (FILE, 0o640, 12345) for m, _ in found)


def test_a_name_in_two_halves_is_put_together() -> None:
    name = "/".join(["d" * 60] * 3)
    assert [m.name.decode() for m, _ in read(pack([(name, b"x")], tarfile.USTAR_FORMAT))] == [name]


def test_what_gnu_tar_writes_is_read(tmp_path: Path) -> None:
    names = [b"a", b"-rf", b"n\nl", b"\xff\xfe", b"x" * 255, "\u00fc\u4e2d".encode(), b"d/" + b"y" * 200]
    (tmp_path / "d").mkdir()
    for name in names:
        Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))).write_bytes(name)
    for format_ in ("gnu", "posix"):
        raw = subprocess.run(
            ["tar", "-cf", "-", f"--format={format_}", "-C", tmp_path, "."], check=True, capture_output=True
        ).stdout
        found = {inside(m.name, "it"): (m.kind, body) for m, body in read(raw)}
        assert found[b""][0] == found[b"d"][0] == DIRECTORY
        assert {n: b for n, (k, b) in found.items() if k == FILE} == {n: n for n in names}


@settings(deadline=None)
@given(st.integers(0, 511), st.integers(1, 255))
def test_a_header_with_another_byte_is_refused(place: int, change: int) -> None:
    raw = bytearray(pack([("name", b"x")], tarfile.GNU_FORMAT))
    raw[place] ^= change
    try:
        found = read(bytes(raw))
    except (CorruptBackup, UnsafeArchive):
        return
    # Of the checksum's own field, what stands around its digits says nothing.
    assert 148 <= place < 156
    assert [(m.name, m.size) for m, _ in found] == [(b"name", 1)]


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\0" * 512,
        b"\0" * 1024 + b"x" * 512,
        pack([("a", b"x" * 5000)], tarfile.GNU_FORMAT)[:2048],
        pack([("a" * 300, b"x")], tarfile.GNU_FORMAT)[:512],
    ],
    ids=["nothing", "half-an-end", "more-after-the-end", "cut-in-data", "cut-in-a-name"],
)
def test_an_archive_that_is_not_whole_is_refused(raw: bytes) -> None:
    with pytest.raises(CorruptBackup):
        read(raw)


@pytest.mark.parametrize(
    "name", [b"/a", b"..", b"../a", b"a/../../b", b"", b"a\0b", b"./..", b"a/" * 200 + b"a"]
)
def test_a_path_that_leaves_the_tree_is_refused(name: bytes) -> None:
    with pytest.raises(UnsafeArchive):
        inside(name, "it")


@pytest.mark.parametrize(
    ("name", "key"),
    [(b"./", b""), (b".", b""), (b"./a", b"a"), (b"a//b/", b"a/b"), (b"./a/./b", b"a/b"), (b".//a", b"a")],
)
def test_paths_are_brought_into_one_form(name: bytes, key: bytes) -> None:
    assert inside(name, "it") == key


def test_only_what_is_wanted_comes_and_what_did_not_come_is_known() -> None:
    root = Root("it", only=["a/b", "c", "d/"])
    keys = [root.key(Member(n, FILE, 0o600, 0, 0)) for n in (b"./a/b", b"./a/bb", b"./c/x/y", b"./e")]
    assert keys == [b"a/b", None, b"c/x/y", None]
    assert root.key(Member(b"./a/", DIRECTORY, 0o700, 0, 0)) == b"a"
    assert root.missing == ["d"]
