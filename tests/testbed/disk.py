"""Run a program with a disk of its own for the tests' directories, where that is worth it.

    python -m tests.testbed.disk PROGRAM [ARGUMENT...]

An ext4 without a journal, as small virtual machines have it, looks at every inode that was freed within the last
minutes before it gives out one (fs/ext4/ialloc.c, recently_deleted). Tests make and remove files by the hundred
thousand: to copy a tree of 1,000 files and to remove it again, 25 times, took 16 to 35 s of processor time there, and
4.5 s on an ext4 with a journal in a file. So root gets such a file, mounted for the time that the program runs.
Everybody else, and who cannot mount, uses /tmp.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.testbed.places import IS_ROOT
from tests.testbed.process import DIRECTORY_PREFIX, SHORT_PLACE, ServiceError, new_directory, run_here
from tests.testbed.sweep import end_servers

MOST, LEAST = 32 << 30, 16 << 30
"""Bytes that it may come to hold; the file takes what was written."""


def is_slow(place: Path) -> bool:
    """Tell whether a directory lies on an ext4 without a journal."""
    device = os.stat(place).st_dev
    name = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve().name
    has_journal = any(Path("/proc/fs/jbd2").glob(f"{name}-*"))
    return Path("/proc/fs/ext4", name).exists() and not has_journal


@contextlib.contextmanager
def own_disk(room: Path) -> Iterator[Path | None]:
    """Mount an ext4 that lies in a file in ``room``, and take it away after; none where that cannot be."""
    size = min(MOST, shutil.disk_usage(room).free // 2)
    if size < LEAST:
        yield None
        return
    with contextlib.ExitStack() as stack:
        # Named like a session's directory: what a killed one leaves, the next one's sweep finds.
        place = new_directory()
        stack.callback(place.rmdir)
        mounted = _mount(place, room, size)
        if mounted:
            stack.callback(run_here, "umount", "--lazy", place)
            # The program may have been killed.
            stack.callback(end_servers, place)
            place.chmod(0o1777)
        yield place if mounted else None


def _mount(place: Path, room: Path, size: int) -> bool:
    """Mount a new ext4 of some bytes in a file without a name; say why it cannot be."""
    handle, image = tempfile.mkstemp(prefix=DIRECTORY_PREFIX, dir=room)
    try:
        os.truncate(handle, size)
        run_here("mkfs.ext4", "-q", "-F", "-m", "0", "-O", "has_journal", image)
        run_here("mount", "-o", "loop,noatime,noinit_itable", image, place)
    except (OSError, ServiceError) as error:
        print(f"testbed: no disk of its own for the tests: {error}", file=sys.stderr)
        return False
    finally:
        # It stays as long as it is mounted.
        os.unlink(image)
        os.close(handle)
    return True


def start(argv: Sequence[str], place: Path | None) -> subprocess.Popen[bytes]:
    """Start a program whose temporary directories are in ``place``."""
    environment = dict(os.environ)
    if place is not None:
        environment |= {SHORT_PLACE: str(place), "PYTEST_DEBUG_TEMPROOT": str(place)}
    return subprocess.Popen(argv, env=environment)


def main(argv: Sequence[str]) -> int:
    """Run a program; return its exit status."""
    slow = IS_ROOT and is_slow(Path("/tmp"))
    with own_disk(Path("/var/tmp")) if slow else contextlib.nullcontext() as place:
        child = start(argv, place)
        # Ctrl-C reaches the child by itself; it cleans up, and this one waits for it, and takes the disk away.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: child.terminate())
        return child.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
