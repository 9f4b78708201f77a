"""Make PostgreSQL clusters as Debian's tools do, beside and never touching others."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path
from typing import Literal, Self

from tests.testbed.places import IS_ROOT
from tests.testbed.postgres import INITDB_DEFAULTS, SETTINGS, PostgresServer, write_settings
from tests.testbed.process import free_port, run_here

VERSION = 15
PG_CTLCLUSTER = ("pg_ctlcluster", "--skip-systemctl-redirect", str(VERSION))


class DebianCluster(PostgresServer):
    """A cluster with its configuration in /etc/postgresql and its data where HQ has them."""

    def __init__(self, root: Path) -> None:
        """Describe a cluster whose data go to `<root>/opt/data/postgresql/15/<name>`."""
        super().__init__(VERSION, root)
        self.name = f"hqb{os.getpid()}x{secrets.token_hex(3)}"
        self.data_dir = root / "opt/data/postgresql" / str(VERSION) / self.name
        self.config_dir = Path("/etc/postgresql") / str(VERSION) / self.name
        self.log = Path("/var/log/postgresql") / f"postgresql-{VERSION}-{self.name}.log"

    @staticmethod
    def unavailable(version: int = VERSION) -> str:
        """Say why one cannot be made here; empty when it can."""
        if not IS_ROOT:
            return "only root can make Debian clusters"
        if not shutil.which("pg_createcluster"):
            return "postgresql-common is not installed (make testbed)"
        return PostgresServer.unavailable(version)

    @property
    def start_command(self) -> tuple[str, ...]:
        """Return the command that an operator would start it with."""
        return (*PG_CTLCLUSTER, self.name, "start")

    @property
    def stop_command(self) -> tuple[str, ...]:
        """Return the command that an operator would stop it with."""
        return (*PG_CTLCLUSTER, self.name, "stop", "--mode", "fast")

    def initdb(self) -> None:
        """Make the cluster and its configuration."""
        for place in ("opt", "opt/data", "opt/data/postgresql"):
            path = self.workdir / place
            path.mkdir(exist_ok=True)
            path.chmod(0o755)
        self.port = free_port()
        arguments = [word for word in INITDB_DEFAULTS if word not in {"--username", self.os_user}]
        self.control(
            "pg_createcluster", "--user", self.os_user, "--start-conf", "manual",
            "--datadir", str(self.data_dir), "--socketdir", str(self.socket_dir), "--port", str(self.port),
            str(VERSION), self.name,
            "--", "--auth", "trust", *arguments,
        )  # fmt: skip
        write_settings(self.config_dir / "conf.d" / "testbed.conf", {**SETTINGS, **self.extra_conf})
        self.write_hba("trust")

    @property
    def hba_file(self) -> Path:
        """Return the authentication file."""
        return self.config_dir / "pg_hba.conf"

    def start(self) -> None:
        """Start the server, making the cluster first."""
        if not self.config_dir.exists():
            self.initdb()
        if not self.running:
            self.control(*self.start_command)

    def stop(self, mode: Literal["smart", "fast", "immediate"] = "fast") -> None:
        """Stop the server; do nothing when it is down."""
        if self.running:
            self.control(*self.stop_command[:-1], mode)

    def drop(self) -> None:
        """Stop and delete the cluster, its configuration and its log, whatever state a test left it in."""
        if self.running:
            self._pg_ctl("stop", "--mode", "immediate")
        for path in (self.config_dir, self.data_dir):
            shutil.rmtree(path, ignore_errors=True)
        self.log.unlink(missing_ok=True)
        shutil.rmtree(self.socket_dir, ignore_errors=True)

    def control(self, *argv: str) -> None:
        """Run one of Debian's tools."""
        run_here(*argv, log=self.log)

    def remove(self) -> None:
        """Stop and delete the cluster."""
        self.drop()

    def __enter__(self) -> Self:
        """Start."""
        try:
            self.start()
        except BaseException:
            self.drop()
            raise
        return self
