"""A CouchDB release as its build makes it, from which a node can be started (docs.couchdb.org, install/unix)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from hq_backups.engine.errors import PreflightFailed

_UNSET = "Or unset it: verify_backup --deep then reads every document without a node"


@dataclass(frozen=True)
class Release:
    """One release directory; nothing is ever written there."""

    directory: Path
    version: str
    epmd: Path
    """Erlang's mapper of ports, which comes with it."""

    @property
    def program(self) -> Path:
        """Return what starts a node."""
        return self.directory / "bin" / "couchdb"

    @property
    def defaults(self) -> Path:
        """Return the first of a node's ini files."""
        return self.directory / "etc" / "default.ini"

    @classmethod
    def find(cls, directory: Path) -> Release:
        """Look at a release directory; raises PreflightFailed for what is none, or cannot be run by this user."""
        told = directory / "releases" / "start_erl.data"
        try:
            erts, version = told.read_text().split()
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else "it does not name two versions"
            raise _wrong(directory, f"{told}: {why}") from error
        found = cls(directory, version, directory / f"erts-{erts}" / "bin" / "epmd")
        for program in (found.program, found.epmd):
            if not program.is_file() or not os.access(program, os.X_OK):
                raise _wrong(directory, f"{program} is not there, or cannot be run by this user")
        if not os.access(found.defaults, os.R_OK):
            raise _wrong(directory, f"{found.defaults} is not there, or cannot be read by this user")
        return found

    def require(self, version: str) -> None:
        """Refuse to read what a newer CouchDB wrote; raises PreflightFailed."""
        majors = [text.split(".")[0] for text in (self.version, version)]
        if all(text.isdigit() for text in majors) and int(majors[0]) < int(majors[1]):
            raise PreflightFailed(
                f"the backup is of CouchDB {version}, the release in {self.directory} is {self.version} and cannot "
                "read its files",
                hint=f"Set couchdb_release_dir to a newer one. {_UNSET}.",
            )


def _wrong(directory: Path, why: str) -> PreflightFailed:
    return PreflightFailed(
        f"couchdb_release_dir, {directory}, is no release of CouchDB: {why}",
        hint="Set couchdb_release_dir to the directory that has bin/couchdb, etc/default.ini and releases/, such as "
        f"/opt/couchdb (dirname of the service's ExecStart, and up). {_UNSET}.",
    )
