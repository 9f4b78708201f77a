"""Run Redis, Celery's broker as in HQ."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from tests.testbed.places import tool
from tests.testbed.process import LOOPBACK, ChildService

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


class RedisServer(ChildService):
    """A server on a free loopback port that keeps everything in memory."""

    name = "redis"

    @staticmethod
    def unavailable() -> str:
        """Say why it cannot be started here; empty when it can."""
        return "" if tool("redis-server") else "redis-server is not on this machine (make testbed)"

    @property
    def url(self) -> str:
        """Return the broker's address."""
        return f"redis://{LOOPBACK}:{self.port}/0"

    def argv(self) -> Sequence[str | Path]:
        """Return the command."""
        return [
            tool("redis-server") or "redis-server",
            "--port", str(self.port), "--bind", LOOPBACK, "--dir", self.workdir, "--save", "", "--appendonly", "no",
        ]  # fmt: skip

    def ready(self) -> bool:
        """Tell whether it answers a PING."""
        return self.ask("PING") == "+PONG"

    def ask(self, *words: str) -> str:
        """Return the first line of a command's answer; nothing when nobody answers."""
        request = f"*{len(words)}\r\n" + "".join(f"${len(word)}\r\n{word}\r\n" for word in words)
        try:
            with socket.create_connection((LOOPBACK, self.port), timeout=2) as connection:
                connection.sendall(request.encode())
                return connection.makefile("rb").readline().decode().strip()
        except OSError:
            return ""
