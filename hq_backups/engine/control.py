"""Stopping and starting a server around a restore, and keeping its monitor from starting it in the middle."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hq_backups.engine import child, process
from hq_backups.engine.errors import HQBackupsError, ServiceError

STOP_SECONDS = 600.0
START_SECONDS = 3600.0
"""A base backup replays its WAL before the server lets anyone in."""
_FAILED_STOP_SECONDS = 5.0
_POLL_SECONDS = 0.1
_MONIT_SECONDS = 30.0

Argv = tuple[str, ...]


class Service(Protocol):
    """A server whose data directory is exchanged; what is watched is told by the monitor's names."""

    def describe(self) -> str:
        """Name the server, shortly, for people."""

    def facts(self) -> Mapping[str, Any]:
        """Return it with its commands as plain data, for the plan and the journal: ``stop``, ``start``."""

    def is_running(self) -> bool:
        """Tell whether any process of the server works on the data directory."""

    def stop(self) -> None:
        """Stop it and prove it; do nothing when it is down; raises ServiceError."""

    def start(self) -> None:
        """Start it; do nothing when it is up; raises ServiceError."""

    def watched(self) -> tuple[str, ...]:
        """Return the names under which a monitor watches it now."""

    def hold(self, names: Sequence[str]) -> None:
        """Make the monitor look away; raises ServiceError."""

    def release(self, names: Sequence[str]) -> None:
        """Make the monitor watch again; raises ServiceError."""


def planned(service: Service) -> dict[str, Any]:
    """Return what a plan says of how a server is stopped and started."""
    commands = service.facts()
    return {
        "service": service.describe(),
        "stopped_by": [" ".join(argv) for argv in commands.get("stop", ())],
        "started_by": " ".join(commands.get("start", ())),
        "monit_paused": list(service.watched()),
    }


@dataclass(frozen=True)
class Monit:
    """The monitor that commcare-cloud installs: it restarts what it finds down."""

    program: str
    names: re.Pattern[str]
    """Which of its services are ours, matched whole."""

    @classmethod
    def find(cls, names: str) -> Monit | None:
        """Return the host's monit; None without one."""
        program = shutil.which("monit", path=child.PATH)
        return None if program is None else cls(program, re.compile(names))

    def watched(self) -> tuple[str, ...]:
        """Return our services that are monitored now; none when the daemon is not running."""
        rows = self._summary()
        return tuple(name for name in rows if self.names.fullmatch(name) and _is_watched(rows[name]))

    def unmonitor(self, name: str) -> None:
        """Stop watching ``name``, and wait until that is so: until its next cycle it restarts what is down."""
        self._order("unmonitor", name)
        deadline = time.monotonic() + _MONIT_SECONDS
        while "not monitored" not in self._summary().get(name, "not monitored").lower():
            if time.monotonic() >= deadline:
                raise ServiceError(
                    f"monit still watches {name} {_MONIT_SECONDS:.0f} seconds after it was told not to",
                    hint=f"Look at it as root: monit summary; monit unmonitor {name}",
                )
            time.sleep(_POLL_SECONDS)

    def _summary(self) -> dict[str, str]:
        done = self._run("-B", "summary")
        rows = (line.split(None, 1) for line in done.stdout.splitlines() if done.status == 0)
        return {row[0]: row[1] for row in rows if len(row) == 2}

    def monitor(self, name: str) -> None:
        """Watch ``name`` again."""
        self._order("monitor", name)

    def _order(self, verb: str, name: str) -> None:
        done = self._run(verb, name)
        if done.status != 0:
            raise ServiceError(
                f"monit does not {verb} {name}: {done.stderr_tail or done.stdout.strip()}",
                hint=f"Try it by hand as root: monit {verb} {name}",
            )

    def _run(self, *words: str) -> process.Completed:
        return process.run([self.program, *words], timeout=_MONIT_SECONDS, check=False)


@dataclass(frozen=True)
class CommandService:
    """A server that is stopped and started by commands and recognised by its processes."""

    name: str
    stop_commands: tuple[Argv, ...]
    """Tried in this order until it is down."""
    start_command: Argv
    running: Callable[[], bool]
    user: str | None = None
    """Who runs the commands when we are root; None means root."""
    monit: Monit | None = None
    log: Path | None = None
    """Where a start that fails says why."""
    stop_seconds: float = STOP_SECONDS
    start_seconds: float = START_SECONDS

    def describe(self) -> str:
        """Name the server."""
        return self.name

    def facts(self) -> Mapping[str, Any]:
        """Return the commands as plain data."""
        return {
            "name": self.name,
            "stop": [list(argv) for argv in self.stop_commands],
            "start": list(self.start_command),
            "user": self.user,
        }

    def is_running(self) -> bool:
        """Tell whether any process of the server works on the data directory."""
        return self.running()

    def stop(self) -> None:
        """Stop it and prove it."""
        said = ""
        for argv in self.stop_commands:
            if not self.running():
                return
            status, said = self._command(argv, self.stop_seconds)
            if self._becomes(False, self.stop_seconds if status == 0 else _FAILED_STOP_SECONDS):
                return
        if self.running():
            raise ServiceError(
                f"{self.name} still runs after {self._spelt(self.stop_commands)}: {said or 'silence'}",
                hint="Find out who holds it (`ps -ef`, its log), stop it by hand, then repeat the command.",
            )

    def start(self) -> None:
        """Start it and wait until its process is there."""
        if self.running():
            return
        status, said = self._command(self.start_command, self.start_seconds)
        if status == 0 and self._becomes(True, min(self.start_seconds, 60.0)):
            return
        raise ServiceError(
            f"{self.name} did not start by {self._spelt((self.start_command,))}: {said or 'silence'}"
            + _log_end(self.log)
        )

    def watched(self) -> tuple[str, ...]:
        """Return the names under which monit watches it now."""
        return () if self.monit is None else self.monit.watched()

    def hold(self, names: Sequence[str]) -> None:
        """Make monit look away."""
        if self.monit is not None:
            for name in names:
                self.monit.unmonitor(name)

    def release(self, names: Sequence[str]) -> None:
        """Make monit watch again, all of them even if one fails."""
        failures = []
        if self.monit is not None:
            for name in names:
                try:
                    self.monit.monitor(name)
                except HQBackupsError as error:
                    failures.append(str(error))
        if failures:
            raise ServiceError("; ".join(failures))

    def _command(self, argv: Argv, seconds: float) -> tuple[int, str]:
        try:
            # Files, not pipes: a server that a start command leaves behind would hold them open.
            done = process.run(argv, user=self.user, timeout=seconds + 30, check=False, leaves_daemon=True)
        except HQBackupsError as error:
            return child.NOT_STARTED, str(error)
        return done.status, (done.stderr_tail or done.stdout.strip())[-child.MESSAGE_CHARS :]

    def _becomes(self, state: bool, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self.running() is not state:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL_SECONDS)
        return True

    @staticmethod
    def _spelt(commands: Sequence[Argv]) -> str:
        return " and ".join(f"`{Path(argv[0]).name} {' '.join(argv[1:])}`" for argv in commands)


@dataclass(frozen=True)
class NoService:
    """Data that no server of its own works on."""

    name: str

    def describe(self) -> str:
        """Name it."""
        return self.name

    def facts(self) -> Mapping[str, Any]:
        """Return no commands."""
        return {}

    def is_running(self) -> bool:
        """Tell that nothing is to be stopped."""
        return False

    def stop(self) -> None:
        """Do nothing."""

    def start(self) -> None:
        """Do nothing."""

    def watched(self) -> tuple[str, ...]:
        """Return nothing."""
        return ()

    def hold(self, names: Sequence[str]) -> None:
        """Do nothing."""

    def release(self, names: Sequence[str]) -> None:
        """Do nothing."""


def _is_watched(status: str) -> bool:
    text = status.lower()
    return "not monitored" not in text and "unmonit" not in text


def _log_end(log: Path | None, lines: int = 10) -> str:
    if log is None:
        return ""
    try:
        with log.open("rb") as file:
            end = child.file_tail(file, 8192).decode("utf-8", "replace").splitlines()[-lines:]
    except OSError:
        return ""
    return f"\n{log}:\n" + "\n".join(end)
