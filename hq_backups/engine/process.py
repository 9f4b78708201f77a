"""The one way to run other programs: argv lists, never a shell, a clean environment, no secrets in errors."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fcntl import F_SETPIPE_SZ, fcntl
from pathlib import Path
from typing import IO

from hq_backups.engine.child import DRAIN_SECONDS, Child, Collector, file_tail

OUTPUT_LIMIT = 64 << 20
EXIT_SECONDS = 60.0
"""How long a child may live after it has closed its output."""


@dataclass(frozen=True)
class Completed:
    """What a program that ran to its end left behind."""

    status: int
    """The exit status; negative is the signal that ended it."""
    stdout: str
    stderr_tail: str


def run(
    argv: Sequence[str | Path],
    *,
    input: str | bytes | None = None,
    env: Mapping[str, str] | None = None,
    user: str | None = None,
    timeout: float | None = None,
    check: bool = True,
    cwd: str | Path = "/",
    leaves_daemon: bool = False,
) -> Completed:
    """Run a program to its end and return what it said; raises ProducerFailed with the tail of its stderr.

    ``user`` is who to become when we are root. ``leaves_daemon`` gives the child files instead of pipes: a
    server that it starts would hold a pipe open for ever.
    """
    with contextlib.ExitStack() as stack:
        stdin: int | IO[bytes] = subprocess.DEVNULL
        if input is not None:
            stdin = stack.enter_context(os.fdopen(os.memfd_create("input"), "w+b"))
            stdin.write(input.encode() if isinstance(input, str) else input)
            stdin.seek(0)
        out = err = None
        if leaves_daemon:
            out, err = (stack.enter_context(tempfile.TemporaryFile()) for _ in "oe")
        child = stack.enter_context(
            Child(argv, stdin=stdin, stdout=out, stderr=err, env=env, user=user, cwd=cwd)
        )
        said = None if out is not None else Collector(child.popen.stdout, OUTPUT_LIMIT, keep_tail=False)
        if not child.wait(timeout):
            child.kill()
            raise child.failure(f"it took longer than {timeout:g} seconds and was stopped")
        if said is not None and not said.join(DRAIN_SECONDS):
            child.kill()
        status = child.reap()
        if said is not None and said.overflow:
            raise child.failure(f"it wrote more than {OUTPUT_LIMIT} bytes")
        if check and status != 0:
            raise child.failure()
        raw = file_tail(out, OUTPUT_LIMIT) if out is not None else said.data() if said is not None else b""
        return Completed(status, raw.decode("utf-8", "replace"), child.stderr_tail)


class Producer(Child):
    """A program whose standard output is read as a stream that never ends before it is known to be whole.

    End of file is reported only when the child has exited with status 0; anything else raises ProducerFailed.
    A program that says in another way what was wrong has a subclass with its own :meth:`ended_well`.
    """

    def __init__(
        self,
        argv: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
        cwd: str | Path = "/",
        pipe_size: int = 1 << 20,
        exit_timeout: float = EXIT_SECONDS,
        feed: bool = False,
        fds: Sequence[int] = (),
    ) -> None:
        """Start it; ``feed`` keeps its standard input open, to be written through :attr:`stdin`.

        ``fds`` stay open in it, under their numbers.
        """
        self._exit_timeout = exit_timeout
        stdin = subprocess.PIPE if feed else subprocess.DEVNULL
        super().__init__(argv, stdin=stdin, env=env, user=user, cwd=cwd, fds=fds)
        stdout = self.popen.stdout
        assert stdout is not None  # noqa: S101  it was asked for
        self._stdout = stdout.fileno()
        self.roomy = False
        """Whether the pipe holds as much as was asked for."""
        # More than /proc/sys/fs/pipe-max-size is refused to other users than root.
        with contextlib.suppress(OSError):
            self.roomy = fcntl(self._stdout, F_SETPIPE_SZ, pipe_size) >= pipe_size

    @property
    def stdin(self) -> IO[bytes]:
        """Return the unbuffered pipe to the child's standard input."""
        if self.popen.stdin is None:
            raise ValueError("the child was started without an input")
        return self.popen.stdin

    def readable(self, timeout: float) -> bool:
        """Tell whether output, or its end, comes within ``timeout`` seconds."""
        return bool(select.select([self._stdout], [], [], timeout)[0])

    def readinto(self, buffer: memoryview | bytearray) -> int:
        """Fill some of ``buffer`` and return how much; 0 only after an exit status of 0."""
        return os.readv(self._stdout, [buffer]) or self._ended()

    def read(self, n: int, /) -> bytes:
        """Return up to ``n`` bytes; none only after an exit status of 0."""
        data = os.read(self._stdout, n)
        if not data:
            self._ended()
        return data

    def _ended(self) -> int:
        if not self.wait(self._exit_timeout):
            self.kill()
            raise self.failure(f"it closed its output but did not exit within {self._exit_timeout:g} seconds")
        if not self.ended_well(self.reap()):
            raise self.failure()
        return 0

    def ended_well(self, status: int) -> bool:
        """Tell whether the exit status says that the output is whole; may raise an error that says more."""
        return status == 0


class Consumer(Child):
    """A program that is fed a stream; :meth:`finish` says whether it took all of it."""

    def __init__(
        self,
        argv: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
        cwd: str | Path = "/",
    ) -> None:
        """Start it; the first 64 MiB of its standard output are kept."""
        super().__init__(argv, stdin=subprocess.PIPE, env=env, user=user, cwd=cwd)
        self._said = Collector(self.popen.stdout, OUTPUT_LIMIT, keep_tail=False)

    def write(self, data: bytes | memoryview) -> None:
        """Feed all of ``data``; raises ProducerFailed when the child no longer reads."""
        assert self.popen.stdin is not None  # noqa: S101  it was asked for
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self.popen.stdin.fileno(), view) :]
        except BrokenPipeError:
            if not self.wait(EXIT_SECONDS):
                self.kill()
            raise self.failure("" if self.wait(0) and self.reap() else "it stopped reading") from None

    def finish(self, timeout: float | None = None) -> Completed:
        """End the input and wait for the exit; raises ProducerFailed unless the status is 0."""
        assert self.popen.stdin is not None  # noqa: S101  it was asked for
        self.popen.stdin.close()
        if not self.wait(timeout):
            self.kill()
            raise self.failure(f"it did not exit within {timeout:g} seconds")
        self._said.join(DRAIN_SECONDS)
        if self.reap() != 0:
            raise self.failure()
        return Completed(0, self._said.data().decode("utf-8", "replace"), self.stderr_tail)
