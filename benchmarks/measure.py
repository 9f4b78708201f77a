"""Time a piece of work and watch how much memory and disk it takes."""

from __future__ import annotations

import contextlib
import mmap
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

INTERVAL = 0.1
TOUCHED = 14 << 30
"""Bytes: more than a contender reads and writes here."""
DISK_TURNS = 10
"""Watching more often takes a noticeable part of a small machine."""


@dataclass(frozen=True)
class Measured:
    """What one run of something took."""

    seconds: float
    peak_rss: int
    """Bytes: this process's children, theirs and so on, together; servers are not among them."""
    peak_disk: int
    """Bytes in the watched directory, beyond what was there before."""


def measure(work: Callable[[], None], directory: Path) -> Measured:
    """Run ``work`` and watch its child processes and ``directory`` meanwhile."""
    peak = {"rss": 0, "disk": 0}
    before = _size(directory)
    servers = set(_descendants(os.getpid()))
    ended = threading.Event()

    def watch() -> None:
        turn = 0
        while not ended.wait(INTERVAL):
            ours = [pid for pid in _descendants(os.getpid()) if pid not in servers]
            peak["rss"] = max(peak["rss"], sum(map(_resident, ours)))
            turn += 1
            if turn % DISK_TURNS == 0:
                peak["disk"] = max(peak["disk"], _size(directory) - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.monotonic()
    try:
        work()
        seconds = time.monotonic() - began
    finally:
        ended.set()
        watcher.join()
    return Measured(seconds, peak["rss"], peak["disk"])


def forget_files() -> bool:
    """Bring everything to the disk and empty the page cache; False for users who may not.

    What a backup reads at night was last read a day ago, and is larger than memory.
    """
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def take_memory_back() -> None:
    """Touch what memory is free: a virtual machine may have given it to its host, and takes it back page by page.

    Who comes later in turns would pay for it while others worked.
    """
    free = next(
        line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemFree:")
    )
    size = min(int(free.split()[1]) * 1024 * 3 // 4, TOUCHED)
    with mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE):
        pass


def median(runs: list[Measured]) -> Measured:
    """Return the medians of several runs' times, and the largest of their peaks."""
    return Measured(
        statistics.median(r.seconds for r in runs),
        max(r.peak_rss for r in runs),
        max(r.peak_disk for r in runs),
    )


def _descendants(root: int) -> Iterator[int]:
    for children in Path("/proc", str(root), "task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in children.read_text().split():
                yield int(child)
                yield from _descendants(int(child))


def _resident(pid: int) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc", str(pid), "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _size(directory: Path) -> int:
    total = 0
    for place, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_blocks * 512
    return total
