"""One child process: started without a shell, its stderr drained, always killed and reaped.

Children sit in a session of their own, so that a terminal's signals reach only us. When the engine is killed
with -9 they end by their pipes: the next write is a SIGPIPE, the next read of standard input an end of file.
PR_SET_PDEATHSIG is not used: it would need code between fork and exec, which is unsafe with threads, and the
kernel sends it when the *thread* that made the child ends, not the process (prctl(2)).
"""

from __future__ import annotations

import contextlib
import os
import pwd
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self

from hq_backups.engine import accounts
from hq_backups.engine.errors import ProducerFailed

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
TAIL_BYTES = 64 << 10
MESSAGE_CHARS = 2000
KILL_SECONDS = 10.0
DRAIN_SECONDS = 5.0
"""How long a pipe may stay open after the child's end, held by a child of its own."""

NOT_STARTED = 127
LOST = 256
"""Stands for an exit status that something else in this process has reaped, or SIGCHLD ignored away."""


class Collector:
    """Reads a pipe to its end in a thread; keeps up to ``limit`` bytes, the first or the last ones."""

    def __init__(self, pipe: IO[bytes] | None, limit: int, *, keep_tail: bool) -> None:
        self.overflow = False
        self._pipe, self._limit, self._keep_tail = pipe, limit, keep_tail
        self._data = bytearray()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._drain, name="hqb-drain", daemon=True)
        self._thread.start()

    def data(self) -> bytes:
        """Return what is kept so far."""
        with self._lock:
            return bytes(self._data)

    def join(self, timeout: float) -> bool:
        """Wait for the pipe's end; tell whether it came."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _drain(self) -> None:
        if self._pipe is None:
            return
        with contextlib.suppress(OSError, ValueError):
            while chunk := os.read(self._pipe.fileno(), 1 << 16):
                with self._lock:
                    self._data += chunk
                    excess = len(self._data) - self._limit
                    if excess > 0:
                        self.overflow = True
                        del self._data[slice(None, excess) if self._keep_tail else slice(self._limit, None)]


class Child:
    """One running program; a ``with`` block always ends and reaps it."""

    def __init__(
        self,
        argv: Sequence[str | Path],
        *,
        stdin: int | IO[bytes],
        stdout: int | IO[bytes] | None = None,
        stderr: IO[bytes] | None = None,
        env: Mapping[str, str] | None,
        user: str | None,
        cwd: str | Path,
        fds: Sequence[int] = (),
    ) -> None:
        self.program = Path(argv[0]).name
        self.status: int | None = None
        self._lock = threading.Lock()
        self._stderr_file = stderr
        identity, home = _become(user)
        try:
            self.popen = subprocess.Popen(
                [str(word) for word in argv],
                stdin=stdin,
                stdout=subprocess.PIPE if stdout is None else stdout,
                stderr=subprocess.PIPE if stderr is None else stderr,
                env={"PATH": PATH, "LC_ALL": "C", "HOME": home, **(env or {})},
                cwd=cwd,
                start_new_session=True,
                bufsize=0,
                pass_fds=fds,
                **identity,
            )
        except (OSError, subprocess.SubprocessError) as error:
            why = (error.strerror if isinstance(error, OSError) else None) or type(error).__name__
            raise ProducerFailed(
                program=self.program, status=NOT_STARTED, tail=f"it could not be started: {why}"
            ) from None
        self._stderr = Collector(self.popen.stderr, TAIL_BYTES, keep_tail=True) if stderr is None else None

    @property
    def pid(self) -> int:
        """Return the child's process id, which is its group's and session's too."""
        return self.popen.pid

    @property
    def stderr_tail(self) -> str:
        """Return the last 64 KiB that the child wrote to standard error."""
        raw = self._stderr.data() if self._stderr else file_tail(self._stderr_file, TAIL_BYTES)
        return raw.decode("utf-8", "replace").strip()

    def wait(self, timeout: float | None) -> bool:
        """Wait for the end, but do not reap: the group's id stays ours to kill. Tell whether it came."""
        if self.status is not None:
            return True
        look = os.WEXITED | os.WNOWAIT
        with contextlib.suppress(ChildProcessError):  # gone without us: reap() says so
            if timeout is None:
                os.waitid(os.P_PID, self.pid, look)
                return True
            deadline, pause = time.monotonic() + timeout, 0.001
            while os.waitid(os.P_PID, self.pid, look | os.WNOHANG) is None:
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                time.sleep(min(pause, left))
                pause = min(pause * 2, 0.05)
        return True

    def reap(self) -> int:
        """Return the exit status of a child that has ended."""
        if self._stderr is not None and self.status is None:
            self._stderr.join(DRAIN_SECONDS)
        with self._lock:
            if self.status is None:
                self.status = self.popen.returncode = _exit_status(self.pid)
            return self.status

    def kill(self) -> None:
        """End the whole process group at once; may be called again, and from any thread."""
        with self._lock:
            if self.status is None:
                # A child under sudo is another user's: it ends by its pipes.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self.pid, signal.SIGKILL)

    def failure(self, why: str = "") -> ProducerFailed:
        """Return the error that says how the child ended, with the tail of its stderr."""
        status = self.reap() if self.wait(KILL_SECONDS) else None
        full = self.stderr_tail
        if not why and status is not None and status < 0:
            why = f"killed by {_signal_name(-status)}"
        if not why and status == LOST:
            why = "its exit status is lost: something else waits for this process's children, or ignores them"
        shown = full[-MESSAGE_CHARS:]
        tail = "; ".join(part for part in (why, shown) if part) or "it said nothing"
        return ProducerFailed(program=self.program, status=status, tail=tail, stderr=full)

    def close(self) -> None:
        """Kill what still runs, reap it and close the pipes."""
        self.kill()
        if self.wait(KILL_SECONDS):
            self.reap()
        drained = self._stderr is None or self._stderr.join(0)
        for pipe in (self.popen.stdin, self.popen.stdout, self.popen.stderr if drained else None):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _become(user: str | None) -> tuple[dict[str, Any], str]:
    """Return the subprocess arguments that change the user when we are root, and the home directory."""
    if user is None or os.geteuid() != 0:
        with contextlib.suppress(KeyError):
            return {}, pwd.getpwuid(os.geteuid()).pw_dir
        return {}, "/"
    account = accounts.find(user)
    return {"user": account.uid, "group": account.gid, "extra_groups": account.groups}, account.home


def file_tail(file: IO[bytes] | None, limit: int) -> bytes:
    """Return the last ``limit`` bytes of a file; nothing of none."""
    if file is None:
        return b""
    file.seek(max(0, file.seek(0, os.SEEK_END) - limit))
    return file.read(limit)


def _exit_status(pid: int) -> int:
    """Reap a child; Popen.wait() would take a status that it cannot get for 0."""
    try:
        ended = os.waitid(os.P_PID, pid, os.WEXITED)
    except ChildProcessError:
        return LOST
    if ended is None:
        return LOST
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
