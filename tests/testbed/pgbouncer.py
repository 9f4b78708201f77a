"""Run a pooler in front of a PostgreSQL server, as HQ does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.testbed.places import tool
from tests.testbed.postgres import SUPERUSER, PostgresServer
from tests.testbed.process import LOOPBACK, ChildService, ServiceError, give

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


class PgBouncer(ChildService):
    """A pooler in transaction mode on a free loopback port."""

    name = "pgbouncer"

    def __init__(self, workdir: Path, server: PostgresServer) -> None:
        """Describe a pooler; its work directory must be reachable by the server's user."""
        super().__init__(workdir)
        self.server = server
        self.os_user = server.os_user
        self.host = LOOPBACK

    @staticmethod
    def unavailable() -> str:
        """Say why it cannot be started here; empty when it can."""
        return "" if tool("pgbouncer") else "pgbouncer is not on this machine (make testbed)"

    def argv(self) -> Sequence[str | Path]:
        """Write the configuration and return the command."""
        users = self.workdir / "users.txt"
        users.write_text(f'"{SUPERUSER}" "{self.server.password}"\n')
        configuration = self.workdir / "pgbouncer.ini"
        configuration.write_text(
            "[databases]\n"
            f"* = host={self.server.host} port={self.server.port}\n"
            "[pgbouncer]\n"
            f"listen_addr = {LOOPBACK}\n"
            f"listen_port = {self.port}\n"
            "unix_socket_dir =\n"
            f"auth_type = {'trust' if self.server.auth == 'trust' else 'scram-sha-256'}\n"
            f"auth_file = {users}\n"
            f"admin_users = {SUPERUSER}\n"
            "pool_mode = transaction\n"
        )
        for path in (self.workdir, users, configuration):
            give(path, self.os_user)
        return [tool("pgbouncer") or "pgbouncer", configuration]

    def ready(self) -> bool:
        """Tell whether queries come through."""
        try:
            return self.server.psql("SELECT 1", host=self.host, port=self.port) == "1"
        except ServiceError:
            return False
