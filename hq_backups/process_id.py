"""Which process does a run: enough to tell, later and from another process, whether it is still there (proc(5))."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
_DEAD = "ZXx"
_STATE, _STARTED = 0, 19
"""Fields of /proc/PID/stat, counted from the one after the name."""


@dataclass(frozen=True)
class ProcessId:
    """A process that no other one can be taken for."""

    boot: str
    """The kernel's boot id: after a restart of the host every number may be another process's."""
    namespace: str
    """The pid namespace: a container's numbers are its own."""
    pid: int
    started: str
    """Clock ticks from boot to its start: numbers are used again."""

    @classmethod
    def mine(cls) -> ProcessId | None:
        """Return this process's; None where the kernel does not tell."""
        with contextlib.suppress(OSError):
            return cls(_boot(), _namespace(), os.getpid(), _stat(os.getpid())[_STARTED])
        return None

    @classmethod
    def parse(cls, text: str) -> ProcessId | None:
        """Return what was written; None when that was no process."""
        with contextlib.suppress(ValueError):
            boot, namespace, pid, started = text.split()
            return cls(boot, namespace, int(pid), started)
        return None

    def __str__(self) -> str:
        return f"{self.boot} {self.namespace} {self.pid} {self.started}"

    @property
    def is_alive(self) -> bool | None:
        """Tell whether it is still there; None when that cannot be seen from here."""
        try:
            if self.boot != _boot():
                return False
            if self.namespace != _namespace():
                return None
        except OSError:
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        try:
            fields = _stat(self.pid)
        except ProcessLookupError:
            return False
        except OSError:
            # Some hosts hide other users' processes: that it exists was just said.
            return True
        return fields[_STATE] not in _DEAD and fields[_STARTED] == self.started


def _boot() -> str:
    return (PROC / "sys/kernel/random/boot_id").read_text().strip()


def _namespace() -> str:
    return os.readlink(PROC / "self/ns/pid").strip("pid:[]")


def _stat(pid: int) -> list[str]:
    # A name may hold spaces and parentheses.
    return (PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
