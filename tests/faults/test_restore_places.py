"""Restores over a data directory that is a mount point or a link: done where it lies, or refused and nothing changed.

A place with too little space is in test_full_disk; nodes that the new one could meet are in test_couch_restore.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.victim import HostVictim
from tests.testbed.process import run_here

pytestmark = [pytest.mark.faults, pytest.mark.postgres15]
MODES = ("plain", "dump", "blobdb", "couch")
# Its own tests say the same.
LONG = ("plain",)
ONLY = {"test_what_is_missing_is_merged_into_a_mount_point": ("blobdb",)}


@contextmanager
def mounted(victim: HostVictim, kind: str) -> Iterator[None]:
    """Serve the data from a filesystem that is mounted at the data directory itself, for the length of a block."""
    data: Path = victim.server.data_dir
    victim.server.stop()
    if kind == "tmpfs":
        away = data.rename(data.with_name("away"))
        data.mkdir()
        run_here("mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", data)
        run_here("cp", "--archive", f"{away}/.", data)
        shutil.rmtree(away)
    else:
        run_here("mount", "--bind", data, data)
    try:
        victim.server.start()
        yield
    finally:
        victim.server.stop()
        run_here("umount", "--lazy", data)


@pytest.fixture
def backed(own_victim: Callable[..., HostVictim]) -> HostVictim:
    """Return a victim with one backup whose data have changed since."""
    victim = own_victim()
    victim.run(victim.backup()).expect(0)
    return victim


def assert_refused(victim: HostVictim, words: str) -> None:
    """Demand that a restore changes nothing at all, and says why."""
    victim.change_data()
    data, beside = victim.fingerprint(), victim.beside()
    inode = victim.server.data_dir.stat()
    outcome = victim.run(victim.restore()).expect(5)
    assert words in outcome.errors
    assert "--target-dir" in outcome.errors
    assert victim.is_serving()
    assert victim.fingerprint() == data
    assert victim.beside() == beside
    now = victim.server.data_dir.stat()
    assert (now.st_dev, now.st_ino, now.st_mode, now.st_uid) == (
        inode.st_dev, inode.st_ino, inode.st_mode, inode.st_uid,
    )  # fmt: skip


@pytest.mark.root
@pytest.mark.parametrize("kind", ["tmpfs", pytest.param("bind", marks=pytest.mark.slow)])
def test_a_mount_point_is_refused_and_nothing_changed(backed: HostVictim, kind: str) -> None:
    with mounted(backed, kind):
        assert_refused(backed, "is a mount point")


@pytest.mark.root
@pytest.mark.slow
def test_a_link_to_a_mount_point_is_refused_and_nothing_changed(backed: HostVictim) -> None:
    link = backed.server.workdir / "link"
    link.symlink_to(backed.server.data_dir)
    with mounted(backed, "tmpfs"):
        backed.settings["store"] = {"data_dir": link}
        assert_refused(backed, "is a mount point")
    assert link.is_symlink()


@pytest.mark.root
def test_what_is_missing_is_merged_into_a_mount_point(backed: HostVictim) -> None:
    data = backed.fingerprint()
    with mounted(backed, "tmpfs"):
        shutil.rmtree(next(iter(backed.server.data_dir.glob("small/*"))))
        assert backed.fingerprint() != data
        backed.run(backed.restore(merge=True)).expect(0)
        assert backed.fingerprint() == data


def test_a_link_is_kept_and_what_it_points_to_is_exchanged_and_given_back(backed: HostVictim) -> None:
    data: Path = backed.server.data_dir
    then = backed.fingerprint()
    backed.change_data()
    now = backed.fingerprint()
    elsewhere = backed.server.workdir / "disk"
    elsewhere.mkdir(mode=0o755)
    backed.server.stop()
    data.rename(elsewhere / "real")
    data.symlink_to(elsewhere / "real")
    backed.server.start()
    assert backed.fingerprint() == now
    backed.run(backed.restore()).expect(0)
    assert data.readlink() == elsewhere / "real"
    assert backed.fingerprint() == then
    assert [p.name for p in elsewhere.iterdir() if p.name.startswith("real.before-")]
    backed.run(backed.undo()).expect(0)
    assert data.readlink() == elsewhere / "real"
    assert backed.fingerprint() == now
