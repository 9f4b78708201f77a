"""Clean up after test sessions that were killed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
from pathlib import Path

from tests.testbed import couch_ctl
from tests.testbed.places import IS_ROOT
from tests.testbed.process import DIRECTORY_PREFIX, ServiceError, alive, run_here

OWNED = re.compile(r"hqb-?(\d+)[-x]")


def abandoned(path: Path) -> bool:
    """Tell whether a name of ours carries the process id of a session that is gone."""
    owner = OWNED.match(path.name)
    return owner is not None and not alive(int(owner[1]))


def sweep() -> None:
    """Remove what killed sessions left: servers, mounts, directories, clusters and sudo rules."""
    # In /tmp whatever this session uses: a disk of a killed session's own is mounted there too.
    left = [path for path in Path("/tmp").glob(f"{DIRECTORY_PREFIX}*") if abandoned(path)]
    for path in left:
        end_servers(path)
        if IS_ROOT and os.path.ismount(path):
            with contextlib.suppress(ServiceError):
                run_here("umount", "--lazy", path)
        shutil.rmtree(path, ignore_errors=True)
    if IS_ROOT:
        for path in filter(abandoned, Path("/etc/sudoers.d").glob("hqb-*")):
            path.unlink(missing_ok=True)
        for path in filter(abandoned, Path("/etc/postgresql").glob("*/hqb*")):
            shutil.rmtree(path, ignore_errors=True)
            log = f"postgresql-{path.parent.name}-{path.name}.log"
            (Path("/var/log/postgresql") / log).unlink(missing_ok=True)


def end_servers(path: Path) -> None:
    """End the servers that sessions have left below a directory."""
    for lock in path.rglob("postmaster.pid"):
        _end_server(lock)
    for state in (*path.glob("state.json"), *path.glob(f"{DIRECTORY_PREFIX}*/state.json")):
        _end_node(state)


def _end_node(state: Path) -> None:
    """End the CouchDB node that commands of a test started, if it is still that one."""
    with contextlib.suppress(OSError, ValueError, KeyError, ServiceError):
        if state.stat().st_uid == os.geteuid():
            couch_ctl.stop(json.loads(state.read_text()))


def _end_server(lock: Path) -> None:
    """End the postmaster that a lock file names, if it is still that one."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        words = lock.read_text().splitlines()
        pid, data_dir = int(words[0]), words[1]
        if Path(f"/proc/{pid}/cwd").resolve() == Path(data_dir).resolve():
            os.kill(pid, signal.SIGQUIT)
