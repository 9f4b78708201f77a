"""Bytes per second, kept over all threads that send."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Pace:
    """Makes senders wait so that together they stay below a rate."""

    def __init__(self, rate: int, stop: threading.Event, clock: Callable[[], float] = time.monotonic) -> None:
        """Allow ``rate`` bytes per second until ``stop`` is set."""
        self._rate = rate
        self._stop = stop
        self._clock = clock
        self._lock = threading.Lock()
        self._free_at = 0.0

    def __call__(self, n: int) -> None:
        """Wait until ``n`` more bytes may go."""
        with self._lock:
            now = self._clock()
            self._free_at = max(self._free_at, now) + n / self._rate
            wait = self._free_at - now
        self._stop.wait(wait)
