"""Signals during work that must not be torn: kept back, and let through only where it can be undone."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

from hq_backups.engine.errors import Cancelled

DEFERRED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """Keeps signals back inside a ``with`` block; what was not acted upon is sent again at its end.

    Handlers are used, not a signal mask: children would inherit a mask, and a server must stay stoppable.
    """

    def __init__(self) -> None:
        self._pending: list[int] = []
        self._allowed = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in DEFERRED:
                # What nohup ignores stays ignored.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for number in dict.fromkeys(self._pending):
            os.kill(os.getpid(), number)

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """Raise Cancelled inside this block as soon as a signal is there, or was before it."""
        self._allowed = True
        try:
            self._act()
            yield
        finally:
            self._allowed = False

    def _receive(self, number: int, _: FrameType | None) -> None:
        self._pending.append(number)
        if self._allowed:
            self._act()

    def _act(self) -> None:
        if self._pending:
            number = self._pending[0]
            self._pending.clear()
            self._allowed = False
            raise Cancelled(by=signal.Signals(number).name)
