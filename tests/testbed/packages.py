"""Install Debian packages and make users, as root."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.testbed.cache import ProvisionError, run
from tests.testbed.places import IS_ROOT, user_exists

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class DebianPackage:
    """A Debian package and the file that shows that it is installed."""

    name: str
    shown_by: str


@dataclass(frozen=True)
class User:
    """A system user of the hosts that the tests imitate."""

    name: str
    home: str
    shell: str


DEBIAN_PACKAGES = (
    DebianPackage("postgresql-15", "/usr/lib/postgresql/15/bin/postgres"),
    DebianPackage("postgresql-client-15", "/usr/lib/postgresql/15/bin/psql"),
    DebianPackage("sudo", "/usr/bin/sudo"),
    DebianPackage("pgbouncer", "/usr/sbin/pgbouncer"),
    DebianPackage("monit", "/usr/bin/monit"),
    DebianPackage("openssh-server", "/usr/sbin/sshd"),
    DebianPackage("rsync", "/usr/bin/rsync"),
    DebianPackage("redis-server", "/usr/bin/redis-server"),
    DebianPackage("chromium", "/usr/bin/chromium"),
)
USERS = (
    User("postgres", "/var/lib/postgresql", "/bin/bash"),
    User("cchq", "/home/cchq", "/bin/bash"),
    User("couchdb", "/nonexistent", "/bin/bash"),
)


@contextlib.contextmanager
def no_service_starts() -> Iterator[None]:
    """Keep package scripts from starting servers (invoke-rc.d asks this file)."""
    policy = Path("/usr/sbin/policy-rc.d")
    if policy.exists():
        yield
        return
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)
    try:
        yield
    finally:
        policy.unlink(missing_ok=True)


def debian_clusters() -> set[tuple[str, str]]:
    """Return version and name of each cluster that Debian's tools know."""
    if not shutil.which("pg_lsclusters"):
        return set()
    lines = run("pg_lsclusters", "--no-header").splitlines()
    return {(line.split()[0], line.split()[1]) for line in lines if line.strip()}


def apt_install(names: list[str]) -> None:
    """Install Debian packages without starting a server or keeping a cluster that they make."""
    before = debian_clusters()
    install = ("apt-get", "install", "--yes", "--quiet", "--no-install-recommends", *names)
    with no_service_starts():
        try:
            run(*install, DEBIAN_FRONTEND="noninteractive")
        except ProvisionError:
            run("apt-get", "update", "--quiet", DEBIAN_FRONTEND="noninteractive")
            run(*install, DEBIAN_FRONTEND="noninteractive")
    for version, name in debian_clusters() - before:
        run("pg_dropcluster", "--stop", version, name)


def packages(_: Path) -> None:
    """Install the Debian packages that are missing."""
    missing = [package.name for package in DEBIAN_PACKAGES if not Path(package.shown_by).exists()]
    if not missing:
        return
    if not IS_ROOT or not shutil.which("apt-get"):
        msg = f"not installed, and only root on Debian can: {' '.join(missing)}"
        raise ProvisionError(msg)
    apt_install(missing)


def users(_: Path) -> None:
    """Make the users whom the services run as."""
    if not IS_ROOT:
        return
    for user in USERS:
        if not user_exists(user.name):
            run(
                "useradd", "--system", "--user-group", "--shell", user.shell, "--home-dir", user.home,
                "--no-create-home" if user.home == "/nonexistent" else "--create-home", user.name,
            )  # fmt: skip
