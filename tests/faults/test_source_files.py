"""Files that vanish, shrink, grow or cannot be read while a backup reads them; servers copy theirs themselves."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import require_service
from tests.faults.engine_process import Hold, Outcome
from tests.faults.victim import VICTIMS, HostVictim
from tests.testbed.places import server_user
from tests.testbed.process import short_directory, wait_until
from tests.testbed.s3 import S3Service
from tests.testbed.system import TornDisk

pytestmark = pytest.mark.faults
MODES = ("blobdb", "couch")
MIB = 1 << 20


@pytest.fixture
def reading(
    pg_template: Callable[[int], Path], s3: S3Service, versioned_bucket: str, mode: str
) -> Iterator[HostVictim]:
    """Return a victim of one large file that takes a while to be read, backed up once."""
    with short_directory(server_user()) as workdir, VICTIMS[mode].serve(workdir, pg_template) as server:
        victim = VICTIMS[mode](workdir, server)
        if mode == "blobdb":
            # All in one blob: the reader must be in the middle of it.
            server.write("large", os.urandom(32 * MIB))
        else:
            victim.make_data(2)
        victim.use_bucket(s3, versioned_bucket)
        victim.run(victim.backup("weekly")).expect(0)
        yield victim


def late_file(victim: HostVictim) -> Path:
    """Return the large file of which the end has not been read when the first bytes have."""
    data: Path = victim.server.data_dir
    return max(
        (path for path in data.rglob("*") if path.is_file()), key=lambda path: (path.stat().st_size, path)
    )


def meanwhile(victim: HostVictim, change: Callable[[], object]) -> Outcome:
    """Change something when a backup has read its first bytes."""
    with Hold(victim.tmp, 1) as hold, victim.engine(victim.backup(), hold.plan) as engine:
        wait_until(lambda: hold.reached or not engine.running, what="the first bytes")
        change()
        hold.go()
        return engine.wait()


def assert_nothing_came(victim: HostVictim, objects: dict[str, int]) -> None:
    """Demand that the weekly backup is all there is, here and in the bucket, and that it is good."""
    assert [entry["type"] for entry in victim.entries("all")] == ["weekly"]
    assert victim.objects() == objects
    victim.assert_clean()
    victim.here(victim.verify()).expect(0)


@pytest.mark.parametrize("how", ["vanishes", pytest.param("grows", marks=pytest.mark.slow)])
def test_a_file_that_vanishes_or_grows_while_it_is_read_is_in_the_backup_as_it_was(
    reading: HostVictim, how: str
) -> None:
    path = late_file(reading)
    relative, before = path.relative_to(reading.server.data_dir), path.read_bytes()

    def grow() -> None:
        with path.open("ab") as file:
            file.write(b"more" * MIB)

    meanwhile(reading, path.unlink if how == "vanishes" else grow).expect(0)
    reading.assert_clean()
    beside = reading.home / "beside"
    reading.run(reading.restore(source="s3", target_dir=beside)).expect(0)
    assert (beside / relative).read_bytes() == before


def test_a_file_that_shrinks_while_it_is_read_leaves_no_backup(reading: HostVictim) -> None:
    path, objects = late_file(reading), reading.objects()
    outcome = meanwhile(reading, lambda: os.truncate(path, path.stat().st_size - 1)).expect(1)
    assert path.name in outcome.errors
    assert_nothing_came(reading, objects)


@pytest.fixture
def torn(reading: HostVictim) -> Iterator[TornDisk]:
    """Put the victim's files on a disk that breaks."""
    reason = TornDisk.unavailable()
    require_service("a loop device", not reason, reason)
    reading.server.stop()
    with short_directory() as place, TornDisk(reading.server.data_dir, place / "image") as disk:
        reading.server.start()
        yield disk
        reading.server.stop()


@pytest.mark.root
@pytest.mark.parametrize("when", [pytest.param("before", marks=pytest.mark.slow), "meanwhile"])
def test_a_disk_that_cannot_be_read_leaves_no_backup(reading: HostVictim, torn: TornDisk, when: str) -> None:
    reading.run(reading.verify()).expect(0)
    objects = reading.objects()
    if when == "before":
        torn.tear()
        outcome = reading.run(reading.backup())
    else:
        outcome = meanwhile(reading, torn.tear)
    assert outcome.status in (1, 5), outcome
    assert "Input/output error" in outcome.errors
    assert outcome.stderr == ""
    assert_nothing_came(reading, objects)
