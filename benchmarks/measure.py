"""Time a piece of work and watch how much memory and disk it takes."""

from __future__ import annotations

import contextlib
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

INTERVAL = 0.1
"""Seconds: watching more often takes a noticeable part of a small machine."""


@dataclass(frozen=True)
class Measured:
    """What one run of something took."""

    seconds: float
    peak_rss: int
    """Bytes: this process's children, theirs and so on, together; servers are not among them."""
    peak_disk: int
    """Bytes taken from the filesystem of the watched directory, beyond what was taken before."""


def measure(work: Callable[[], None], directory: Path) -> Measured:
    """Run ``work`` and watch its child processes and ``directory`` meanwhile."""
    peak = {"rss": 0, "disk": 0}
    before = _taken(directory)
    servers = set(_descendants(os.getpid()))
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(INTERVAL):
            ours = [pid for pid in _descendants(os.getpid()) if pid not in servers]
            peak["rss"] = max(peak["rss"], sum(map(_resident, ours)))
            peak["disk"] = max(peak["disk"], _taken(directory) - before)

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


def median(runs: list[Measured]) -> Measured:
    """Return the medians of several runs' times, and the largest of their peaks."""
    return Measured(
        statistics.median(r.seconds for r in runs),
        max(r.peak_rss for r in runs),
        max(r.peak_disk for r in runs),
    )


def _descendants(root: int) -> Iterator[int]:
    parents: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            with contextlib.suppress(OSError, ValueError, IndexError):
                stat = Path("/proc", entry, "stat").read_text()
                parents[int(entry)] = int(stat.rpartition(")")[2].split()[1])
    for pid in parents:
        above = pid
        while above in parents:
            above = parents[above]
            if above == root:
                yield pid
                break


def _resident(pid: int) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc", str(pid), "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _taken(directory: Path) -> int:
    facts = os.statvfs(directory)
    return (facts.f_blocks - facts.f_bfree) * facts.f_frsize
