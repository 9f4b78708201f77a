"""Do something for a bounded time: what hangs is left behind, and stops nobody."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

from django.db import connections

T = TypeVar("T")


def within(seconds: float, work: Callable[[], T], *, what: str) -> T:
    """Return what ``work`` returns or raise what it raises; TimeoutError when it takes longer.

    It is done in a thread of its own, which nobody waits for at the end of the process.
    """
    done: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:
            failed.append(error)
        finally:
            with contextlib.suppress(Exception):
                connections.close_all()

    thread = threading.Thread(target=run, name=what, daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not done:
        raise TimeoutError(f"{what} took more than {seconds:g} s")
    return done[0]
