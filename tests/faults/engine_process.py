"""The engine as a real process: the job on standard input, events on standard output."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hq_backups.engine.config import Job
from tests.testbed.process import as_user

ROOT = Path(__file__).resolve().parents[2]
ENTRY = ROOT / "hq_backups/engine/entry.py"
DRIVER = Path(__file__).with_name("engine_driver.py")
PATIENCE = 120.0


@dataclass
class Outcome:
    """What a run left behind on its way out."""

    status: int
    """The exit status; negative is the signal that ended it."""
    events: list[dict[str, Any]]
    stdout: str = field(repr=False)
    stderr: str

    @property
    def killed(self) -> bool:
        return self.status == -signal.SIGKILL

    def kind(self, kind: str) -> list[dict[str, Any]]:
        return [e for e in self.events if e["kind"] == kind]

    @property
    def errors(self) -> str:
        """Return codes, messages and hints of all errors in one text."""
        return "\n".join(f"{e['code']}: {e['message']} | {e['hint']}" for e in self.kind("error"))

    @property
    def warnings(self) -> str:
        return "\n".join(f"{e['code']}: {e['message']}" for e in self.kind("warning"))

    def expect(self, status: int) -> Outcome:
        """Demand an exit status, that the events tell the same, and that no traceback was printed."""
        said = f"status {self.status}, wanted {status}\n{self.errors}\n{self.warnings}\n{self.stderr}"
        assert self.status == status, said
        assert self.kind("result")[-1:] == self.events[-1:], said
        assert self.events[-1]["exit"] == status, said
        assert self.events[-1]["ok"] is (status == 0), said
        assert self.stderr == "", said
        if status:
            assert self.errors, "it failed and did not say why"
        return self


class Hold:
    """A point in a backup, counted in plain bytes, where the engine stands still until it may go on."""

    def __init__(self, tmp: Path, after: int) -> None:
        self._reached, self._go = tmp / "reached", tmp / "go"
        self.plan: dict[str, Any] = {"hold": [after, str(self._reached), str(self._go)]}

    @property
    def reached(self) -> bool:
        return self._reached.exists()

    def go(self) -> None:
        """Let it go on."""
        self._go.touch()

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *_: object) -> None:
        for path in (self._reached, self._go):
            path.unlink(missing_ok=True)


class Engine:
    """One running engine; a ``with`` block never leaves it behind."""

    def __init__(self, job: Job, user: str | None, tmp: Path, plan: Mapping[str, Any] | None = None) -> None:
        program = [str(ENTRY)] if plan is None else [str(DRIVER), json.dumps(dict(plan))]
        # Files, not pipes: nobody has to drain them, and a child that lives on cannot hold the test.
        self._out, self._err = (tempfile.TemporaryFile() for _ in "oe")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-I", *program],
            stdin=subprocess.PIPE,
            stdout=self._out,
            stderr=self._err,
            cwd="/",
            env={"PATH": os.defpath, "TMPDIR": str(tmp), "HOME": "/nonexistent"},
            start_new_session=True,
            **as_user(user),
        )
        assert self.process.stdin is not None
        self.process.stdin.write(job.to_json().encode() + b"\n")
        self.process.stdin.flush()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        """Kill the engine alone with -9; its children find out by their pipes."""
        self.process.kill()

    def stop(self) -> None:
        """Have the engine and its children stand still."""
        for pid in _family(self.pid):
            os.kill(pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """Let them go on."""
        for pid in _family(self.pid):
            os.kill(pid, signal.SIGCONT)

    def cancel(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b'{"cancel": true}\n')
        self.process.stdin.flush()

    def said(self) -> list[dict[str, Any]]:
        """Return the events so far."""
        raw = os.pread(self._out.fileno(), 1 << 26, 0).decode()
        return [json.loads(line) for line in raw.splitlines(keepends=True) if line.endswith("\n")]

    def wait(self, timeout: float = PATIENCE) -> Outcome:
        """Wait for the end with standard input still open, as the bridge does."""
        status = self.process.wait(timeout)
        self._out.seek(0)
        self._err.seek(0)
        raw, err = self._out.read().decode(), self._err.read().decode()
        events = [json.loads(line) for line in raw.splitlines(keepends=True) if line.endswith("\n")]
        return Outcome(status, events, raw, err)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        if self.running:
            self.process.kill()
            self.process.wait(10)
        if self.process.stdin is not None:
            self.process.stdin.close()
        self._out.close()
        self._err.close()


def _family(pid: int) -> list[int]:
    """Return a process and those below it; one that stands still has no new ones."""
    found = [pid]
    for each in found:
        for children in Path("/proc", str(each), "task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += map(int, children.read_text().split())
    return found
