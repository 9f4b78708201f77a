"""Backups that run on by themselves: whoever started one is free at once, and may be killed without ending it."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from hq_backups import commandline
from hq_backups.conf import Resolved

LOG = "scheduled.log"
MOST_LOG = 1024 * 1024
"""Bytes after which the log begins anew; the one before it is kept."""
STARTED_WITHIN = 30.0


def start(resolved: Resolved, words: Sequence[str]) -> None:
    """Start one of our commands, in this directory and with these settings; raises OSError when it cannot be.

    setsid forks: the process is nobody's child here, so that no pool has to wait for it.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TMPDIR"}
    environment["DJANGO_SETTINGS_MODULE"] = commandline.settings_module()
    with _log(resolved.state_dir) as log:
        subprocess.run(
            ["setsid", "--fork", *commandline.program(), *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            timeout=STARTED_WITHIN,
            check=True,
        )


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
