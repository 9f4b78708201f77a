"""The engine as a child process: a job in, events out, a line to cancel it."""

from __future__ import annotations

import contextlib
import io
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

from hq_backups.engine.child import Child
from hq_backups.engine.errors import Exit, ProtocolMismatch
from hq_backups.engine.events import Event

CANCEL = b'{"cancel": true}\n'


class EngineProcess(Child):
    """One engine in a session of its own: this terminal's signals reach it only as a cancel line.

    Iterating yields events, a signal's number when this process was asked to stop, and a ProtocolMismatch.
    """

    def __init__(
        self, argv: Sequence[str | Path], *, user: str | None = None, env: Mapping[str, str] | None = None
    ) -> None:
        """Start it; as root it becomes ``user``."""
        super().__init__(argv, stdin=subprocess.PIPE, env=env, user=user, cwd="/")
        self.spoke = False
        self.noise = ""
        self._items: queue.SimpleQueue[Event | int | ProtocolMismatch | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name="hqb-events", daemon=True)
        self._reader.start()

    def __iter__(self) -> Iterator[Event | int | ProtocolMismatch]:
        """Yield what comes until the process has closed its output."""
        while True:
            # Not for ever: a signal that came right before the wait, or to another thread, is seen after it.
            with contextlib.suppress(queue.Empty):
                item = self._items.get(timeout=0.5)
                if item is None:
                    return
                yield item

    def give(self, job: str) -> None:
        """Hand the process its job; its standard input stays open, for closing it says that we are gone."""
        self._write(job.encode() + b"\n")

    def cancel(self) -> None:
        """Ask the process to stop and clean up."""
        self._write(CANCEL)

    def interrupt(self, signum: int, frame: FrameType | None = None) -> None:
        """Pass a signal on to whoever iterates: SimpleQueue.put may be called in a handler."""
        self._items.put(signum)

    def try_kill(self) -> bool:
        """Kill the process and its children; False when it belongs to another user."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except PermissionError:
            return False
        except ProcessLookupError:
            pass
        return True

    def ended(self) -> Exit | None:
        """Wait for the end; return the exit code that its status is, when it is one that says a failure."""
        self.wait(None)
        status = self.reap()
        self._reader.join()
        # Not by a ``with`` block: whatever goes wrong in here, a restore must not be killed for it.
        self.close()
        return Exit(status) if status > 0 and status in list(Exit) else None

    def _write(self, line: bytes) -> None:
        view = memoryview(line)
        # A process that is gone is found out by its status.
        with contextlib.suppress(OSError, ValueError):
            while view:
                view = view[os.write(_pipe(self.popen.stdin).fileno(), view) :]

    def _read(self) -> None:
        try:
            for line in io.BufferedReader(io.FileIO(_pipe(self.popen.stdout).fileno(), closefd=False)):
                self._take(line)
        finally:
            self._items.put(None)

    def _take(self, line: bytes) -> None:
        try:
            event = Event.from_json(line.decode())
        except ProtocolMismatch as error:
            self._items.put(error)
        except (ValueError, KeyError, TypeError, AttributeError):
            self.noise = line[:500].decode(errors="replace").strip()
        else:
            self.spoke = True
            self._items.put(event)


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise ValueError("the process was started without this pipe")
    return pipe
