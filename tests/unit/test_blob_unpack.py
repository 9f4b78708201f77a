"""Hostile archives straight into the unpacking of blobs, with no count or sum that would stop them before."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from pathlib import Path

import pytest

from hq_backups.engine.blobs.unpack import Root, Unpacked, unpack
from hq_backups.engine.errors import CorruptBackup, DiskFull
from hq_backups.engine.streams import PlainReader
from tests.faults.test_hostile import ARCHIVES, FINE, member, tar

FORBIDDEN = sorted(set(ARCHIVES) - {"not-a-cluster", "only-an-end"})


def unpacked(raw: bytes, target: Path, codec: str = "none") -> Unpacked:
    plain = PlainReader(io.BytesIO(raw), codec, "it")
    try:
        return unpack(plain, target, Root("it"))
    finally:
        plain.close()


@pytest.mark.parametrize("size", [1, 1 << 20], ids=["small", "large"])
@pytest.mark.parametrize("kind", FORBIDDEN)
def test_a_hostile_archive_reaches_nothing_outside(tmp_path: Path, kind: str, size: int) -> None:
    target, outside = tmp_path / "tree", tmp_path / "outside"
    target.mkdir()
    outside.mkdir()
    # Something before it, which is small or large: each is written in its own way.
    before = tar((member("before"), b"x" * size))[: -(-size // 512) * 512 + 512]
    with pytest.raises(CorruptBackup):
        unpacked(before + ARCHIVES[kind](outside), target)
    assert os.listdir(outside) == []
    assert sorted(os.listdir(tmp_path)) == ["outside", "tree"]


@pytest.mark.parametrize("size", [1, 1 << 20], ids=["small", "large"])
def test_a_path_that_is_there_twice_is_refused(tmp_path: Path, size: int) -> None:
    with pytest.raises(CorruptBackup, match="there twice"):
        unpacked(tar((member("a"), b"x" * size), (member("a"), b"y" * size)), tmp_path)


def test_a_file_is_never_written_through_a_link_that_somebody_made_meanwhile(tmp_path: Path) -> None:
    tree, outside = tmp_path / "tree", tmp_path / "outside"
    tree.mkdir()
    (tree / "PG_VERSION").symlink_to(outside)
    with pytest.raises(CorruptBackup):
        unpacked(tar(FINE), tree)
    assert not outside.exists()


def test_files_and_directories_come_with_their_modes_but_not_with_all_of_them(tmp_path: Path) -> None:
    entries = [
        (member("d", tarfile.DIRTYPE, mode=0o2777), b""),
        (member("d/a", mode=0o6777), b"x"),
        (member("d/b", mode=0o400), b"y" * (1 << 20)),
        (member("e/f", mode=0o644), b"z"),
    ]
    assert unpacked(gzip.compress(tar(*entries)), tmp_path, "gzip") == (3, 1, 2 + (1 << 20))
    modes = {str(p.relative_to(tmp_path)): oct(p.stat().st_mode & 0o7777) for p in tmp_path.rglob("*")}
    assert modes == {"d": "0o775", "d/a": "0o775", "d/b": "0o400", "e": "0o700", "e/f": "0o644"}


def test_a_full_disk_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("hq_backups.engine.streams.os.write", full)
    for size in (1, 1 << 20):
        tree = tmp_path / str(size)
        tree.mkdir()
        with pytest.raises(DiskFull):
            unpacked(tar((member("a"), b"x" * size)), tree)
