"""Run Celery's worker and beat for a small host, with its own blobs to back up."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from celery import Celery

import hq_backups
from tests.testbed.process import ChildService

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from tests.testbed.redis import RedisServer

ROOT = Path(hq_backups.__file__).parent.parent
CELERY = (sys.executable, "-m", "celery", "-A", "tests.testbed.celery_app")


class CeleryHost:
    """Where a worker and beat run: its directories, its settings, and the history that it shares with others."""

    def __init__(self, place: Path, name: str, redis: RedisServer, user: str, **settings: Any) -> None:
        """Make its blobs; hosts of one ``place`` share a database."""
        self.name, self.home, self.redis = name, place / name, redis
        self.database, self.visibility = place / "history.sqlite3", 3600
        self.blobs, self.backups = self.home / "blobs", self.home / "backups"
        self.blobs.mkdir(parents=True)
        (self.blobs / "form").write_bytes(b"a form's attachment")
        self.settings = {
            "backup_postgres": False,
            "backup_blobdb": True,
            "blobdb_dir_path": str(self.blobs),
            "blobdb_backup_dir": str(self.backups),
            "blobdb_backup_os_user": user,
            "blobdb_verifier": False,
            "backup_host_name": name,
            "backup_state_dir": str(self.home / "state"),
            "timezone": "UTC",
            **settings,
        }
        if not self.database.exists():
            self.run("migrate", "--verbosity", "0")

    def environment(self) -> dict[str, str]:
        """Return the environment of its processes."""
        return {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(self.home),
            "LC_ALL": "C.UTF-8",
            "TMPDIR": str(self.home),
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUNBUFFERED": "1",
            "C_FORCE_ROOT": "1",
            "DJANGO_SETTINGS_MODULE": "tests.testbed.celery_settings",
            "TESTBED_DATABASE": str(self.database),
            "TESTBED_BROKER": self.redis.url,
            "TESTBED_VISIBILITY": str(self.visibility),
            "TESTBED_HQ_BACKUPS": json.dumps(self.settings),
        }

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run one of Django's commands there."""
        argv = [sys.executable, "-m", "django", *words]
        return subprocess.run(
            argv, env=self.environment(), cwd=self.home, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            check=True,
        )  # fmt: skip

    def send(self, task: str, *arguments: str, queue: str) -> None:
        """Send a task's message."""
        with Celery(broker=self.redis.url, set_as_current=False) as app:
            app.send_task(task, arguments, queue=queue, ignore_result=True)

    def worker(self, *queues: str, name: str = "worker") -> CeleryWorker:
        """Return a worker of some queues, not started yet."""
        return CeleryWorker(self, queues, name)

    def beat(self, name: str = "beat") -> CeleryBeat:
        """Return a beat, not started yet."""
        return CeleryBeat(self, name)

    def rows(self, sql: str) -> list[Any]:
        """Return what a query of the history gives."""
        with contextlib.closing(sqlite3.connect(self.database, timeout=30)) as connection, connection:
            return connection.execute(sql).fetchall()

    def runs(self) -> list[tuple[str, str, str]]:
        """Return host, type and status of every run, the oldest first."""
        return self.rows("SELECT host, type, status FROM hq_backups_backuprun ORDER BY id")

    def due(self) -> list[tuple[str, str, int]]:
        """Return host, state and attempts of everything that was due."""
        return self.rows("SELECT host, state, attempts FROM hq_backups_duerun ORDER BY host, due_at")


class _Celery(ChildService):
    """A process of Celery's; it listens nowhere, and is ready when it says so."""

    said = ""

    def __init__(self, host: CeleryHost, name: str) -> None:
        self.name = name
        self.host = host
        super().__init__(host.home)

    def environment(self) -> Mapping[str, str]:
        """Return the host's."""
        return self.host.environment()

    def start(self) -> None:
        """Start, its log empty."""
        self.log.unlink(missing_ok=True)
        super().start()

    def ready(self) -> bool:
        """Tell whether the log says so."""
        return self.said in self.text

    @property
    def text(self) -> str:
        """Return the log."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


class CeleryWorker(_Celery):
    """A worker with one process, as on HQ's monolith."""

    said = " ready."

    def __init__(self, host: CeleryHost, queues: Sequence[str], name: str) -> None:
        """Describe a worker of ``queues``."""
        super().__init__(host, name)
        self.queues = queues

    def argv(self) -> Sequence[str | Path]:
        """Return the command."""
        words = ("--loglevel", "INFO", "--concurrency", "1", "--without-gossip", "--without-mingle")
        name = f"{self.name}@{self.host.name}"
        return [*CELERY, "worker", "--queues", ",".join(self.queues), "--hostname", name, *words]

    def stop(self, timeout: float = 20.0) -> None:
        """Kill it: a test that ends waits for no task."""
        self.kill_all()

    def kill_all(self) -> None:
        """Kill it with everything that it is the parent of, as systemd or the kernel out of memory would."""
        if self.pid is not None:
            for pid in (self.pid, *_below(self.pid)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.kill()


class CeleryBeat(_Celery):
    """A beat with a schedule file of its own, which is not waited for."""

    said = ""

    def argv(self) -> Sequence[str | Path]:
        """Return the command."""
        place = self.workdir / f"{self.name}-schedule"
        return [
            *CELERY,
            "beat",
            "--loglevel",
            "INFO",
            "--schedule",
            place,
            "--max-interval",
            "1",
            "--pidfile=",
        ]


def _below(pid: int) -> Iterator[int]:
    """Yield the processes below one, found before any of them is gone."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    todo = [pid]
    while todo:
        children = [child for child, parent in parents.items() if parent == todo[0]]
        todo = [*todo[1:], *children]
        yield from children
