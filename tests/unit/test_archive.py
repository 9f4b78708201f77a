"""Archives are untrusted: nothing of them leaves the tree that they are unpacked into."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hq_backups.engine.archive import TarWatch, extract, members
from hq_backups.engine.errors import CorruptBackup, UnsafeArchive
from hq_backups.engine.streams import PlainReader


def tar(*entries: tuple[str, bytes] | tarfile.TarInfo, format: int = tarfile.GNU_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as archive:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                archive.addfile(entry)
            else:
                info = tarfile.TarInfo(entry[0])
                info.size = len(entry[1])
                archive.addfile(info, io.BytesIO(entry[1]))
    return out.getvalue()


def special(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def plain(raw: bytes) -> PlainReader:
    return PlainReader(io.BytesIO(gzip.compress(raw, 1)), "gzip", "artifact")


def test_files_and_directories_come_out_as_they_went_in(tmp_path: Path) -> None:
    deep = "/".join(["d" * 60] * 5) + "/" + "f" * 200
    raw = tar(
        ("a", b"1" * 1000), special("empty", tarfile.DIRTYPE), ("b/c d'\"é\n", b"2"), (deep, b"3"), ("z", b"")
    )
    assert extract(plain(raw), tmp_path) == 4
    assert (tmp_path / "a").read_bytes() == b"1" * 1000
    assert (tmp_path / "empty").is_dir()
    assert (tmp_path / "b/c d'\"é\n").read_bytes() == b"2"
    assert (tmp_path / deep).read_bytes() == b"3"


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_tar_format_is_read(tmp_path: Path, format: int) -> None:
    extract(plain(tar(("x/" + "n" * 90, b"data" * 333), format=format)), tmp_path)
    assert (tmp_path / "x" / ("n" * 90)).read_bytes() == b"data" * 333


@pytest.mark.parametrize(
    "entry",
    [
        ("/etc/cron.d/evil", b"x"),
        ("../evil", b"x"),
        ("a/../../evil", b"x"),
        special("link", tarfile.SYMTYPE, "/etc"),
        special("link", tarfile.SYMTYPE, "inside"),
        special("hard", tarfile.LNKTYPE, "/etc/passwd"),
        special("fifo", tarfile.FIFOTYPE),
        special("disk", tarfile.BLKTYPE),
        special("tty", tarfile.CHRTYPE),
    ],
    ids=lambda e: e[0] if isinstance(e, tuple) else f"{e.name}-{e.linkname}",
)
def test_a_member_that_could_leave_the_tree_is_refused(tmp_path: Path, entry: tuple[str, bytes]) -> None:
    inside = tmp_path / "tree"
    inside.mkdir()
    with pytest.raises(UnsafeArchive):
        extract(plain(tar(("good", b"1"), entry)), inside)
    assert {p.name for p in tmp_path.iterdir()} == {"tree"}


def test_a_link_that_is_already_in_the_way_is_not_followed(tmp_path: Path) -> None:
    tree, outside = tmp_path / "tree", tmp_path / "outside"
    tree.mkdir()
    outside.mkdir()
    (tree / "dir").symlink_to(outside)
    with pytest.raises(UnsafeArchive):
        extract(plain(tar(("dir/file", b"x"))), tree)
    assert not list(outside.iterdir())


@pytest.mark.parametrize("second", [("a", b"2"), ("a/b", b"2"), special("a", tarfile.DIRTYPE)])
def test_the_same_path_twice_is_refused(tmp_path: Path, second: tuple[str, bytes]) -> None:
    with pytest.raises(UnsafeArchive):
        extract(plain(tar(("a", b"1"), second)), tmp_path)
    assert (tmp_path / "a").read_bytes() == b"1"


def test_modes_never_give_anything_to_the_world(tmp_path: Path) -> None:
    info = tarfile.TarInfo("set-id")
    info.mode = 0o6777
    extract(plain(tar(info)), tmp_path)
    assert (tmp_path / "set-id").stat().st_mode & 0o7777 == 0o670


@pytest.mark.parametrize("keep", [100, 512, 700, 1024, 1535])
def test_an_archive_cut_short_is_corrupt(tmp_path: Path, keep: int) -> None:
    with pytest.raises(CorruptBackup):
        extract(plain(tar(("a", b"1" * 1024), ("b", b"2" * 1024))[:keep]), tmp_path)


def test_what_the_consumer_does_not_read_is_skipped() -> None:
    assert [m.name for m in members(plain(tar(("a", b"1" * 5000), ("b", b"2"), ("c", b"3" * 512))))] == [
        "a",
        "b",
        "c",
    ]


def watch(raw: bytes, cut: Callable[[int], int]) -> TarWatch:
    seen = TarWatch(frozenset({"backup_label"}))
    position = 0
    while position < len(raw):
        step = max(1, cut(position))
        seen.feed(memoryview(raw)[position : position + step])
        position += step
    return seen


@given(step=st.integers(1, 3000))
def test_a_watch_sees_the_same_whatever_the_pieces(step: int) -> None:
    raw = tar(
        ("PG_VERSION", b"15\n"),
        ("base/1/2", b"x" * 777),
        ("backup_label", b"START\n"),
        ("pg_wal/0", b"w" * 512),
    )
    seen = watch(raw, lambda _: step)
    assert seen.ended
    assert seen.names == {"PG_VERSION", "backup_label", "pg_wal/0"}
    assert seen.kept == {"backup_label": b"START\n"}
    assert seen.files == 4


def test_a_watch_knows_that_the_end_did_not_come() -> None:
    raw = tar(("PG_VERSION", b"15\n"))
    whole = 1024 + 1024
    assert not watch(raw[: whole - 512], lambda _: 512).ended
    assert watch(raw[:whole], lambda _: 512).ended
    assert not watch(raw[:1000], lambda _: 512).ended


def test_a_watch_refuses_what_follows_the_end() -> None:
    raw = tar(("a", b"1"))
    with pytest.raises(CorruptBackup):
        watch(raw + tar(("b", b"2")), lambda _: 512)
