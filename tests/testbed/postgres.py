"""Run throw-away PostgreSQL servers of several versions."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from tests.testbed.places import bin_dirs, client_bin_dir, server_user
from tests.testbed.process import (
    LOOPBACK,
    ServiceError,
    alive,
    as_user,
    exists,
    free_port,
    give,
    new_directory,
    tail,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Auth = Literal["trust", "scram-sha-256"]
StopMode = Literal["smart", "fast", "immediate"]

SUPERUSER = "postgres"
INITDB_DEFAULTS = (
    "--username", SUPERUSER, "--data-checksums", "--encoding", "UTF8", "--locale", "C.UTF-8", "--no-sync",
)  # fmt: skip
SETTINGS = {
    "listen_addresses": LOOPBACK,
    "fsync": "off",  # a killed server loses nothing by it, only a power cut would
    "shared_buffers": "32MB",
    "max_connections": "60",
    "max_wal_senders": "10",
    "wal_level": "replica",
    "timezone": "UTC",
    "logging_collector": "off",
}
SOCKET_PATH_LIMIT = 85  # of the 107 bytes that a Unix socket's address may have


class PostgresServer:
    """A cluster in a directory, its server on a free loopback port and a private socket."""

    def __init__(
        self,
        version: int,
        workdir: Path,
        *,
        os_user: str | None = None,
        auth: Auth = "trust",
        extra_conf: Mapping[str, str] | None = None,
        initdb_args: Sequence[str] = (),
        template: Path | None = None,
    ) -> None:
        """Describe a cluster under `workdir`; a template is a stopped data directory to copy for initdb."""
        self.version = version
        self.workdir = workdir
        self.os_user = os_user or server_user()
        self.auth = auth
        self.password = secrets.token_hex(8) if auth != "trust" else ""
        self.extra_conf = dict(extra_conf or {})
        self.initdb_args = tuple(initdb_args)
        self.template = template
        self.data_dir = workdir / "data"
        self.log = workdir / "server.log"
        self.bin_dir = bin_dirs()[version]
        self.client_bin_dir = client_bin_dir(version)
        self.host = LOOPBACK
        self.port = 0
        self._socket_dir: Path | None = None

    @staticmethod
    def unavailable(version: int) -> str:
        """Say why a version cannot be started here; empty when it can."""
        if version not in bin_dirs():
            return f"PostgreSQL {version} is not on this machine (make testbed)"
        try:
            client_bin_dir(version)
            as_user(server_user())
        except (FileNotFoundError, KeyError) as error:
            return str(error)
        return ""

    @property
    def socket_dir(self) -> Path:
        """Return the directory of the server's Unix socket, short enough for one."""
        if self._socket_dir is None:
            inside = self.workdir / "socket"
            if len(str(inside)) <= SOCKET_PATH_LIMIT:
                inside.mkdir(exist_ok=True)
                self._socket_dir = inside
            else:
                self._socket_dir = new_directory()
            self._socket_dir.chmod(0o755)
            give(self._socket_dir, self.os_user)
        return self._socket_dir

    @property
    def pid(self) -> int | None:
        """Return the postmaster's process id while it runs, whoever started it."""
        try:
            pid = int((self.data_dir / "postmaster.pid").read_text().split("\n", 1)[0])
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None
        return pid if alive(pid) else None

    @property
    def running(self) -> bool:
        """Tell whether a postmaster runs on the data directory."""
        return self.pid is not None

    @property
    def conninfo(self) -> str:
        """Return a libpq connection string for the loopback port, without a password."""
        return f"host={self.host} port={self.port} user={SUPERUSER} dbname=postgres"

    def initdb(self) -> None:
        """Make the cluster and its configuration."""
        self.make_cluster()
        self.configure()

    def make_cluster(self) -> None:
        """Initialise the data directory, or copy the template."""
        self.workdir.mkdir(parents=True, exist_ok=True)
        self.workdir.chmod(0o755)
        give(self.workdir, self.os_user)
        if self.template is not None:
            self._run("cp", "--archive", "--reflink=auto", self.template, self.data_dir)
        else:
            self._run(self.bin_dir / "initdb", "--pgdata", self.data_dir, *INITDB_DEFAULTS, *self.initdb_args)

    def configure(self) -> None:
        """Write server settings and the authentication file."""
        self.port = self.port or free_port()
        settings = {
            **SETTINGS,
            "port": str(self.port),
            "unix_socket_directories": str(self.socket_dir),
            **self.extra_conf,
        }
        write_settings(self.data_dir / "postgresql.conf", settings)
        self.write_hba(self.auth)

    @property
    def hba_file(self) -> Path:
        """Return the authentication file."""
        return self.data_dir / "pg_hba.conf"

    def write_hba(self, auth: str) -> None:
        """Allow local and loopback connections, ordinary and for replication, by one method."""
        self.hba_file.write_text(
            "".join(
                f"{kind:5} {database:12} all {address:13} {auth}\n"
                for database in ("all", "replication")
                for kind, address in (("local", ""), ("host", "127.0.0.1/32"), ("host", "::1/128"))
            )
        )

    def start(self) -> None:
        """Start the server, making the cluster first, and wait until it accepts connections."""
        if not self.data_dir.exists():
            self.initdb()
            if self.auth != "trust":
                self._set_password()
        if self.running:
            return
        self._pg_ctl("start", "--log", self.log, "--timeout", "60")

    def _set_password(self) -> None:
        self.write_hba("trust")
        self._pg_ctl("start", "--log", self.log, "--timeout", "60")
        self.psql(f"ALTER ROLE {SUPERUSER} PASSWORD '{self.password}'")
        self.write_hba(self.auth)
        self._pg_ctl("reload")

    def stop(self, mode: StopMode = "fast") -> None:
        """Stop the server; do nothing when it is down."""
        if self.running:
            self._pg_ctl("stop", "--mode", mode, "--timeout", "60")

    def restart(self) -> None:
        """Stop and start."""
        self.stop()
        self.start()

    def kill(self) -> None:
        """End the postmaster by SIGKILL; wait until nothing is left that a new one would trip over."""
        pid = self.pid
        if pid is None:
            return
        children = _children(pid)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not any(map(exists, [pid, *children])), what="the killed server to leave")

    def psql(
        self, sql: str, dbname: str = "postgres", *, host: str | None = None, port: int | None = None
    ) -> str:
        """Run SQL and return its rows, unaligned, without the last newline."""
        done = self._run(
            self.client_bin_dir / "psql", "--no-psqlrc", "--quiet", "--tuples-only", "--no-align",
            "--no-password", "--set", "ON_ERROR_STOP=1", "--host", host or self.socket_dir,
            "--port", str(port or self.port), "--username", SUPERUSER, "--dbname", dbname, "--command", sql,
        )  # fmt: skip
        return done.removesuffix("\n")

    def create_database(self, prefix: str = "db") -> str:
        """Make a database under a fresh name and return the name."""
        name = f"{prefix}_{secrets.token_hex(4)}"
        self.psql(f"CREATE DATABASE {name}")
        return name

    def drop_database(self, name: str) -> None:
        """Drop a database and whoever is connected to it."""
        self.psql(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def _pg_ctl(self, verb: str, *arguments: str | Path) -> None:
        self._run(self.bin_dir / "pg_ctl", verb, "--silent", "--pgdata", self.data_dir, *arguments)

    def _run(self, *argv: str | Path) -> str:
        """Run a program as the server's user; output goes to files, which a server may keep open."""
        environment = {"PATH": os.defpath, "LC_ALL": "C.UTF-8", "TZ": "UTC", "PGPASSWORD": self.password}
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            done = subprocess.run(
                [str(word) for word in argv],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd="/",
                env=environment,
                check=False,
                **as_user(self.os_user),
            )
            out.seek(0)
            err.seek(0)
            output = out.read().decode()
            if done.returncode:
                message = err.read().decode(errors="replace").strip()
                msg = f"{Path(argv[0]).name} exited {done.returncode}: {message}\n{output}\n{tail(self.log)}"
                raise ServiceError(msg)
        return output

    def remove(self) -> None:
        """Stop without ceremony and delete everything."""
        self.stop("immediate")
        shutil.rmtree(self.workdir, ignore_errors=True)
        if self._socket_dir is not None:
            shutil.rmtree(self._socket_dir, ignore_errors=True)

    def __enter__(self) -> Self:
        """Start."""
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop without ceremony and delete everything."""
        self.remove()


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def write_settings(path: Path, settings: Mapping[str, str]) -> None:
    """Add settings to the end of a configuration file; the last one of a name counts."""
    with path.open("a") as conf:
        conf.writelines(f"{name} = '{value}'\n" for name, value in settings.items())
