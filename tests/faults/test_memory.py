"""Memory does not grow with the data: the engine and its children stay below 256 MiB."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.victim import HostVictim
from tests.testbed.s3 import S3Service

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.postgres15]
MODES = ("plain", "dump", "tablespaces", "blobdb", "couch")
MIB = 1 << 20
BOUND = 256 * MIB
PAGE = os.sysconf("SC_PAGE_SIZE")


class Peak:
    """Samples what a process and all its children hold, without what they share with files."""

    def __init__(self, pid: int) -> None:
        self.pid, self.most, self.samples = pid, 0, 0
        self.then: list[tuple[str, int]] = []
        """What each process held when it was most, in MiB."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.01):
            held = {each: resident(each) for each in family(self.pid)}
            if sum(held.values()) > self.most:
                self.most = sum(held.values())
                self.then = [(name(each), size // MIB) for each, size in held.items()]
            self.samples += 1


def resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
    except (OSError, IndexError):
        return 0


def family(pid: int) -> list[int]:
    """Return a process and its descendants, but for a server that a restore started.

    One that was forked and has not begun its program yet holds nothing but its parent's memory.
    """
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
        children = [int(c) for t in tasks for c in Path(f"/proc/{pid}/task/{t}/children").read_text().split()]
    except OSError:
        return []
    own = [child for child in children if name(child) != "postgres" and stack(child) != stack(pid)]
    return [pid, *(p for child in own for p in family(child))]


def stack(pid: int) -> str:
    """Return where a process's stack begins, which is elsewhere for every program that is run (proc(5), stat)."""
    try:
        begins = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[25]
    except (OSError, IndexError):
        return f"{pid} is gone"
    return begins if begins != "0" else f"{pid} does not tell"


def name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


@pytest.mark.parametrize("megabytes", [16, 550], ids=["64-MiB", "600-MiB"])
def test_the_engine_and_its_children_stay_small(
    own_victim: Callable[..., HostVictim], s3: S3Service, versioned_bucket: str, megabytes: int
) -> None:
    victim = own_victim(compression="gzip")
    victim.make_data(megabytes)
    victim.use_bucket(s3, versioned_bucket)
    beside = victim.home / "beside"
    jobs = [victim.backup(), victim.verify(source="s3"), victim.restore(source="s3", target_dir=beside)]
    peaks = {}
    for job in jobs:
        with victim.engine(job) as engine, Peak(engine.pid) as peak:
            engine.wait(300).expect(0)
        assert peak.samples > 5
        peaks[job.verb] = peak.most
        print(f"{job.verb}: {peak.most / MIB:.0f} MiB, {peak.then}")
    assert max(peaks.values()) <= BOUND, peaks
