from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hq_backups.engine import space
from hq_backups.engine.errors import NotEnoughSpace
from tests.testbed.system import tmpfs, tmpfs_unavailable

needs_tmpfs = pytest.mark.skipif(bool(tmpfs_unavailable()), reason=tmpfs_unavailable() or "tmpfs")


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"), (512, "512 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"),
        (1024**2 - 1, "1.0 MiB"), (1024**2, "1.0 MiB"), (3 * 1024**3, "3.0 GiB"), (1024**6, "1024.0 PiB"),
    ],
)  # fmt: skip
def test_sizes_are_readable(n: int, text: str) -> None:
    assert space.human_bytes(n) == text


@given(st.integers(0, 2**60 - 2**50))
def test_sizes_stay_short_and_close(n: int) -> None:
    number, unit = space.human_bytes(n).split()
    assert float(number) < 1024
    factor = 1024 ** space.UNITS.index(unit)
    assert abs(float(number) * factor - n) <= 0.051 * factor


def test_free_space_is_asked_above_what_is_missing(tmp_path: Path) -> None:
    there, missing = space.free_bytes(tmp_path), space.free_bytes(tmp_path / "not" / "yet")
    assert there > 0
    assert missing == pytest.approx(there, rel=0.1)


def test_too_little_is_told_with_both_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(space, "free_bytes", lambda _: 1024**3)
    space.require(tmp_path, 1024**3, "the backup")
    with pytest.raises(NotEnoughSpace) as caught:
        space.require(tmp_path, 1024**3 + 1024**2 * 512, "the unpacked backup", "Use --staging-dir.")
    assert str(caught.value) == f"{tmp_path} has 1.0 GiB free, 1.5 GiB for the unpacked backup are needed"
    assert caught.value.hint == "Use --staging-dir."
    assert caught.value.exit_code == 5


def test_too_few_files_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(space, "free_files", lambda _: 10)
    space.require(tmp_path, 0, "blobs", files=10)
    with pytest.raises(NotEnoughSpace, match="has 10 inodes free, 11 for blobs are needed"):
        space.require(tmp_path, 0, "blobs", files=11)
    monkeypatch.setattr(space, "free_files", lambda _: None)
    space.require(tmp_path, 0, "blobs", files=11)


def test_directories_of_one_filesystem(tmp_path: Path) -> None:
    assert space.same_filesystem(tmp_path, tmp_path / "not" / "yet")
    assert not space.same_filesystem(tmp_path, Path("/proc"))
    assert space.filesystem_of(Path("/proc/self")).type == "proc"
    assert space.filesystem_of(Path("/proc/self")).mount_point == Path("/proc")
    assert space.is_mount_point(Path("/proc"))
    assert not space.is_mount_point(tmp_path)
    assert not space.is_mount_point(tmp_path / "missing")


@needs_tmpfs
def test_a_mount_with_odd_characters_is_seen(tmp_path: Path) -> None:
    with tmpfs("4m") as mount:
        inner = mount / "with space"
        inner.mkdir()
        (tmp_path / "link").symlink_to(inner)
        assert space.is_mount_point(mount)
        assert space.filesystem_of(tmp_path / "link").mount_point == mount.resolve()
        assert not space.same_filesystem(tmp_path, tmp_path / "link")
        assert space.free_bytes(inner) <= 4 << 20
        with pytest.raises(NotEnoughSpace):
            space.require(inner, 5 << 20, "a backup")


@needs_tmpfs
def test_two_mounts_of_one_device_are_two(tmp_path: Path) -> None:
    with tmpfs("4m") as mount:
        (mount / "a b").mkdir()
        (mount / "c").mkdir()
        os.system(f"mount --bind {str(mount)!r}/'a b' {str(mount)!r}/c")  # noqa: S605
        try:
            assert space.is_mount_point(mount / "c")
            assert not space.same_filesystem(mount / "a b", mount / "c")
        finally:
            os.system(f"umount {str(mount)!r}/c")  # noqa: S605
