"""Change the machine for the length of a test: sudo rules and small filesystems."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Self

from tests.testbed.places import IS_ROOT, user_exists
from tests.testbed.process import ServiceError, new_directory, run_here

if TYPE_CHECKING:
    from collections.abc import Iterator

SUDOERS = Path("/etc/sudoers.d")


class SudoRules:
    """Lets a user run one program as anybody without a password, by HQ's own rule, while it is entered."""

    def __init__(self, program: Path | str, *, user: str = "cchq") -> None:
        """Name the program that may be run."""
        self.program = Path(program)
        self.user = user
        self.path = SUDOERS / f"hqb-{os.getpid()}-{secrets.token_hex(4)}"

    @staticmethod
    def unavailable() -> str:
        """Say why rules cannot be written here; empty when they can."""
        if not IS_ROOT:
            return "only root can write sudo rules"
        if not (shutil.which("sudo") and shutil.which("visudo")):
            return "sudo is not installed (make testbed)"
        missing = [name for name in ("cchq", "couchdb", "postgres") if not user_exists(name)]
        return f"no such user: {', '.join(missing)} (make testbed)" if missing else ""

    @property
    def rule(self) -> str:
        """Return the line in the form that HQ's deployment writes."""
        return f"{self.user} ALL=(ALL) NOPASSWD: {self.program}\n"

    def install(self) -> None:
        """Put a checked rule in its place."""
        descriptor, name = tempfile.mkstemp(dir=SUDOERS, prefix=".hqb.")  # sudo passes over names with a dot
        written = Path(name)
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(self.rule)
            written.chmod(0o440)
            run_here("visudo", "--check", "--quiet", f"--file={written}")
            written.rename(self.path)
        except BaseException:
            written.unlink(missing_ok=True)
            raise

    def remove(self) -> None:
        """Take the rule away."""
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        """Install."""
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        """Remove."""
        self.remove()


@contextlib.contextmanager
def tmpfs(size: str, *, mode: int = 0o755) -> Iterator[Path]:
    """Mount an empty filesystem of a size such as "8m" and take it away after."""
    path = new_directory()
    try:
        run_here("mount", "-t", "tmpfs", "-o", f"size={size},mode={mode:o}", "tmpfs", path)
        try:
            yield path
        finally:
            run_here("umount", "--lazy", path)
    finally:
        path.rmdir()


class TornDisk:
    """A filesystem with the files of a directory, over that directory, half of which can become unreadable."""

    def __init__(self, directory: Path, image: Path) -> None:
        """Put the files that are in ``directory`` into ``image``, with their owners and modes."""
        self.directory = directory
        self.image = image

    def __enter__(self) -> Self:
        """Mount it; nothing but names is in memory, and nothing writes to it."""
        used = sum(path.stat().st_blocks * 512 for path in self.directory.rglob("*"))
        size = f"{(used + used // 4 >> 20) + 8}M"
        made = ("mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", "-d", self.directory)
        run_here(*made, self.image, size)
        run_here("mount", "-o", "loop", self.image, self.directory)
        (self.directory / "lost+found").rmdir()
        run_here("mount", "-o", "remount,ro", self.directory)
        return self

    def tear(self) -> None:
        """Take away the second half: reading what lies there is an I/O error from now on."""
        os.truncate(self.image, self.image.stat().st_size // 2)

    def __exit__(self, *_: object) -> None:
        """Unmount it; the directory is what it was."""
        run_here("umount", "--lazy", self.directory)

    @staticmethod
    def unavailable() -> str:
        """Say why none can be made here; empty when it can."""
        if not IS_ROOT:
            return "only root can mount"
        if not shutil.which("mke2fs"):
            return "mke2fs is not installed"
        return "" if Path("/dev/loop-control").exists() else "there are no loop devices"


def tmpfs_unavailable() -> str:
    """Say why nothing can be mounted here; empty when it can."""
    if not IS_ROOT:
        return "only root can mount"
    try:
        with tmpfs("64k"):
            return ""
    except ServiceError as error:
        return str(error)
