"""Backups that run on by themselves: whoever started one is free at once, and may be killed without ending it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from django.conf import settings

from hq_backups.conf import Resolved

STANDALONE = "hq_backups.standalone_settings"
LOG = "scheduled.log"
MOST_LOG = 1024 * 1024
"""Bytes after which the log begins anew; the one before it is kept."""
STARTED_WITHIN = 30.0


def start(resolved: Resolved, words: Sequence[str]) -> None:
    """Start one of our commands, in this directory and with these settings; raises OSError when it cannot be.

    setsid forks: the process is nobody's child here, so that no pool has to wait for it.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TMPDIR"}
    environment["DJANGO_SETTINGS_MODULE"] = settings_module()
    with _log(resolved.state_dir) as log:
        subprocess.run(
            ["setsid", "--fork", *program(), *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            timeout=STARTED_WITHIN,
            check=True,
        )


def program() -> list[str]:
    """Return the words that our commands are called by here: manage.py makes paths that HQ's code needs."""
    if is_standalone():
        return [sys.executable, "-m", "hq_backups.standalone"]
    return [sys.executable, "manage.py"] if Path("manage.py").is_file() else [sys.executable, "-m", "django"]


def is_standalone() -> bool:
    """Tell whether this is a host without HQ."""
    return settings_module() == STANDALONE


def settings_module() -> str:
    """Return the name of the settings that this process runs with."""
    return str(getattr(settings, "SETTINGS_MODULE", None) or os.environ.get("DJANGO_SETTINGS_MODULE", ""))


@contextlib.contextmanager
def _log(directory: Path) -> Iterator[IO[bytes] | int]:
    """Open what such a process says; a run's own history is in its row."""
    path = directory / LOG
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size > MOST_LOG:
            path.replace(path.with_suffix(".log.1"))
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError:
        yield subprocess.DEVNULL
        return
    with os.fdopen(opened, "ab") as file:
        yield file
