"""Which of PostgreSQL's programs to use: picked per tool and version, not one newest directory.

pg_basebackup works on servers up to its own major version; pg_verifybackup, initdb, pg_ctl and postgres must
be the server's own major (postgresql.org/docs/current/app-pgbasebackup.html, app-pgverifybackup.html).
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hq_backups.engine import process
from hq_backups.engine.errors import HQBackupsError, PreflightFailed

_VERSION = re.compile(r"\(PostgreSQL\)\s+(\d+)")
WRAPPER = "pg_wrapper"
_PLACES = ("/usr/lib/postgresql", "/usr/local/pgsql", "/opt/postgresql")


@dataclass(frozen=True)
class Tool:
    """One program and the major version of PostgreSQL that it belongs to."""

    path: Path
    major: int


class Tools:
    """The PostgreSQL programs of this host."""

    def __init__(self, bin_dir: Path | None = None) -> None:
        """Look in ``bin_dir`` first, then where distributions put them, then in PATH."""
        self.bin_dir = bin_dir

    def own(self, name: str, major: int) -> Tool:
        """Return the program of exactly ``major``; raises PreflightFailed with what was found."""
        return self._pick(name, [t for t in self.find(name) if t.major == major], f"version {major}")

    def client(self, name: str, major: int) -> Tool:
        """Return the program of the lowest major version that is not below ``major``."""
        fitting = [t for t in self.find(name) if t.major >= major]
        return self._pick(name, sorted(fitting, key=lambda t: t.major), f"version {major} or newer")

    def newest(self, name: str) -> Tool:
        """Return the program of the newest major version."""
        return self._pick(name, sorted(self.find(name), key=lambda t: -t.major), "any version")

    def find(self, name: str) -> list[Tool]:
        """Return every program called ``name``, ``bin_dir``'s first."""
        found: dict[Path, Tool] = {}
        for directory in self._directories():
            path = directory / name
            real = path.resolve()
            # Debian's wrapper starts one of the programs that were found before it, and takes its time.
            if real in found or (found and real.name == WRAPPER):
                continue
            major = _major(path)
            if major is not None:
                found[real] = Tool(path, major)
        return list(found.values())

    def _pick(self, name: str, fitting: list[Tool], wanted: str) -> Tool:
        if fitting:
            return fitting[0]
        there = ", ".join(f"{t.path} ({t.major})" for t in self.find(name)) or "none"
        raise PreflightFailed(
            f"no {name} of {wanted} on this host; found: {there}",
            hint="Install it (Debian and Ubuntu: apt-get install postgresql-client-<version>, or postgresql-<version> "
            "for the server's own programs), or set postgresql_bin_dir.",
        )

    def _directories(self) -> Iterator[Path]:
        if self.bin_dir is not None:
            yield self.bin_dir
        for place in _PLACES:
            root = Path(place)
            if (root / "bin").is_dir():
                yield root / "bin"
            if root.is_dir():
                yield from sorted(p / "bin" for p in root.iterdir() if (p / "bin").is_dir())
        yield from sorted(Path("/usr").glob("pgsql-*/bin"))
        # Debian's /usr/bin/psql picks a version by cluster: the plain programs come first.
        yield from (Path(p) for p in os.environ.get("PATH", "").split(os.pathsep) if p.startswith("/"))


@functools.lru_cache(maxsize=256)
def _major(path: Path) -> int | None:
    """Ask a program for its version; None when there is no such program or it does not run."""
    if not os.access(path, os.X_OK) or path.is_dir():
        return None
    try:
        done = process.run([str(path), "--version"], timeout=20)
    except (HQBackupsError, OSError):
        return None
    match = _VERSION.search(done.stdout)
    return int(match.group(1)) if match else None
