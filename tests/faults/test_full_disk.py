"""Disks that are full from the start, fill up at any byte of a backup, or fill up under a restore."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hq_backups.engine.errors import DiskFull
from hq_backups.engine.streams import ArtifactWriter
from tests.faults.engine_process import Hold
from tests.faults.test_kills import SWEEP
from tests.faults.victim import VICTIMS, HostVictim, Victim
from tests.testbed.places import server_user
from tests.testbed.process import give, run_here, wait_until
from tests.testbed.s3 import S3Service

pytestmark = [pytest.mark.faults, pytest.mark.postgres15, pytest.mark.root]
MODES = ("plain", "dump", "blobdb", "couch")
MIB = 1 << 20
PAGE = 4096
BALLAST = "ballast"


def free(place: Path) -> int:
    stat = os.statvfs(place)
    return stat.f_bavail * stat.f_frsize


@contextmanager
def only(place: Path, left: int) -> Iterator[None]:
    """Fill a disk up to so many free bytes for the length of a block."""
    path = place / BALLAST
    size = 0
    with path.open("wb") as file:
        # In pieces: somebody else may be writing too.
        while (room := free(place) - left) > 0:
            try:
                os.posix_fallocate(file.fileno(), size, min(room, 4 * MIB))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                break
            size += min(room, 4 * MIB)
    yield
    path.unlink()


@pytest.fixture
def on_small_disk(victim: Victim, small_disk: Callable[[str], Path]) -> Victim:
    """Move the victim's backup directory to a disk of its own."""
    disk = small_disk("160m")
    victim.backups = disk / "backups"
    victim.backups.mkdir(mode=0o700)
    give(victim.backups, victim.user)
    return victim


def lefts(artifact: int) -> list[int]:
    """Return how much is left free: less than the artifact, just as much, and a little more for its manifest."""
    if SWEEP:
        anywhere = {round(artifact * n / SWEEP) for n in range(SWEEP)}
        return sorted(anywhere | {artifact + n * PAGE for n in range(-2, 20)})
    return [artifact // 2, artifact, artifact + PAGE, artifact + 3 * PAGE]


def test_a_disk_that_fills_up_at_any_byte_of_a_backup(
    on_small_disk: Victim, s3: S3Service, versioned_bucket: str
) -> None:
    victim = on_small_disk
    victim.use_bucket(s3, versioned_bucket)
    victim.run(victim.backup("weekly")).expect(0)
    (before,) = victim.good()
    disk = victim.backups.parent
    failed = 0
    for left in lefts(before["size"]):
        objects = victim.objects()
        # The check for space comes before the first byte: the disk fills up after it.
        with Hold(victim.tmp, 1) as hold, victim.engine(victim.backup(), hold.plan) as engine:
            wait_until(lambda: hold.reached or not engine.running, what="the first byte")
            with only(disk, left):
                hold.go()
                outcome = engine.wait()
                listed = [e["run"] for e in victim.good()]
        assert outcome.status in (0, 1, 7), outcome.errors
        if outcome.status == 0:
            assert listed == [outcome.events[0]["run"], before["run"]]
            victim.assert_survived({outcome.events[0]["run"]})
            for entry in victim.good():
                if entry["type"] == "daily":
                    for path in (victim.backups / entry["name"], *victim.backups.glob(f".{entry['name']}.*")):
                        path.unlink()
        elif outcome.status == 1:
            failed += 1
            assert "DiskFull: no space left on the disk of" in outcome.errors
            assert listed == [before["run"]]
            assert victim.objects() == objects
        victim.assert_clean()
    assert failed >= 2
    victim.run(victim.backup()).expect(0)
    victim.assert_clean()


@pytest.mark.parametrize("codec", ["gzip", "zstd"])
def test_a_disk_that_is_full_at_an_artifact_s_last_bytes(
    codec: str, small_disk: Callable[[str], Path]
) -> None:
    disk = small_disk("1m")
    with only(disk, 0):
        writer = ArtifactWriter(disk / "artifact", codec, 1)
        buffer = writer.buffer()
        # So little comes out of zstd when it is flushed, and not before; of gzip its header does.
        writer.put(buffer, 100)
        with pytest.raises(DiskFull):
            writer.finish()
        writer.close()


def test_too_little_space_from_the_start_is_told_before_anything_happens(on_small_disk: Victim) -> None:
    victim = on_small_disk
    victim.run(victim.backup("weekly")).expect(0)
    names = victim.names()
    with only(victim.backups.parent, 4 * MIB):
        outcome = victim.run(victim.backup()).expect(5)
    assert "NotEnoughSpace" in outcome.errors
    assert "prune_backups --dry-run" in outcome.errors
    assert victim.names() == names


def test_a_disk_without_a_single_byte_still_lists_and_verifies(on_small_disk: Victim) -> None:
    victim = on_small_disk
    victim.run(victim.backup()).expect(0)
    with only(victim.backups.parent, 0):
        victim.run(victim.verify()).expect(0)
        assert len(victim.good()) == 1
    victim.assert_clean()


@pytest.mark.parametrize("deep", [False, True])
def test_a_disk_that_fills_up_under_a_deep_verify(on_small_disk: Victim, deep: bool) -> None:
    victim = on_small_disk
    victim.run(victim.backup()).expect(0)
    if not deep:
        with only(victim.backups.parent, 30 * MIB):
            assert "NotEnoughSpace" in victim.run(victim.verify(deep=True)).expect(5).errors
        return
    disk = victim.backups.parent
    disk_size = free(disk)
    run_here("mount", "-o", "remount,size=400m", disk)
    assert free(disk) > disk_size
    with victim.engine(victim.verify(deep=True)) as engine:
        wait_until(lambda: any(victim.backups.glob(".verify-*/data/*")), what="the unpacking", interval=0.001)
        # It stands still while the disk is filled, however quickly it unpacks.
        os.kill(engine.pid, signal.SIGSTOP)
        with only(disk, 0):
            os.kill(engine.pid, signal.SIGCONT)
            outcome = engine.wait().expect(1)
    assert "DiskFull" in outcome.errors
    victim.assert_clean()


@pytest.fixture
def server_on_small_disk(
    small_disk: Callable[[str], Path], pg_template: Callable[[int], Path], mode: str
) -> Iterator[HostVictim]:
    """Serve data whose directory is on a small disk of its own."""
    disk = small_disk("400m")
    give(disk, server_user())
    with VICTIMS[mode].serve(disk / "w", pg_template) as server:
        made = VICTIMS[mode](disk / "w", server)
        made.make_data(80 if mode == "blobdb" else 2)
        yield made


def test_a_disk_that_fills_up_while_a_restore_unpacks_changes_nothing(
    server_on_small_disk: HostVictim,
) -> None:
    victim = server_on_small_disk
    victim.run(victim.backup()).expect(0)
    victim.change_data()
    data, work = victim.fingerprint(), victim.server.workdir
    before = {p.name for p in work.iterdir()}
    with victim.engine(victim.restore()) as engine:
        wait_until(
            lambda: [*work.glob(".data.*staging-*")] or not engine.running, what="the staging directory"
        )
        # It must not be ahead of the ballast.
        engine.stop()
        with only(work, 8 * MIB):
            engine.go_on()
            outcome = engine.wait().expect(1)
            assert victim.is_serving()
    assert "DiskFull: no space left on the disk of" in outcome.errors
    assert victim.fingerprint() == data
    assert {p.name for p in work.iterdir() if not p.name.endswith(".lock")} == before
    victim.run(victim.restore()).expect(0)
    assert victim.fingerprint() != data


def test_too_little_space_for_a_restore_is_told_before_anything_happens(
    server_on_small_disk: HostVictim,
) -> None:
    victim = server_on_small_disk
    victim.run(victim.backup()).expect(0)
    victim.change_data()
    data, beside = victim.fingerprint(), victim.beside()
    with only(victim.server.workdir, 4 * MIB):
        outcome = victim.run(victim.restore()).expect(5)
        assert victim.is_serving()
    assert "NotEnoughSpace" in outcome.errors
    assert victim.fingerprint() == data
    assert victim.beside() == beside
