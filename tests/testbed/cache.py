"""Keep what is fetched between sessions, one provisioner at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tests.testbed.places import cache_dir

if TYPE_CHECKING:
    from collections.abc import Iterator


class ProvisionError(RuntimeError):
    """Something could not be fetched."""


def run(*argv: str | Path, cwd: Path | None = None, **environment: str) -> str:
    """Run a program and return its output; raise with the end of what it said."""
    done = subprocess.run(
        [str(word) for word in argv],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **environment},
        cwd=cwd,
        check=False,
        text=True,
    )
    if done.returncode:
        said = "\n".join(done.stdout.splitlines()[-12:])
        msg = f"{argv[0]} exited {done.returncode}:\n{said}"
        raise ProvisionError(msg)
    return done.stdout


@contextlib.contextmanager
def cache_lock() -> Iterator[Path]:
    """Make the cache directory and keep other provisioners out of it."""
    cache = cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    if cache.stat().st_uid != os.geteuid():
        msg = f"{cache} belongs to somebody else; name another with HQ_BACKUPS_TESTBED_CACHE"
        raise ProvisionError(msg)
    cache.chmod(0o755)
    with (cache / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield cache


@contextlib.contextmanager
def scratch(cache: Path) -> Iterator[Path]:
    """Make a directory inside the cache for work in progress."""
    with tempfile.TemporaryDirectory(dir=cache, prefix=".work-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def publish(tree: Path, target: Path) -> None:
    """Put a finished directory in its place, readable by every user."""
    for path in (tree, *tree.rglob("*")):
        if not path.is_symlink():
            mode = path.stat().st_mode
            path.chmod(mode | (0o555 if mode & 0o100 else 0o444))
    if target.exists():
        target.rename(tree.parent / "replaced")
    tree.rename(target)
