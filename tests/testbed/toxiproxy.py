"""Run a proxy that breaks connections on demand."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tests.testbed.places import tool
from tests.testbed.process import LOOPBACK, ChildService, listening

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

Stream = Literal["upstream", "downstream"]


@dataclass(frozen=True)
class Proxy:
    """One listening port that leads to one upstream address."""

    service: Toxiproxy
    name: str
    address: str
    upstream: str

    @property
    def host(self) -> str:
        """Return the address's host."""
        return self.address.rpartition(":")[0]

    @property
    def port(self) -> int:
        """Return the address's port."""
        return int(self.address.rpartition(":")[2])

    @property
    def endpoint(self) -> str:
        """Return the address as the base of an HTTP service."""
        return f"http://{self.address}"

    def add_toxic(
        self, kind: str, *, stream: Stream = "downstream", toxicity: float = 1.0, **attributes: Any
    ) -> str:
        """Add a toxic and return its name.

        Kinds: latency(latency, jitter), bandwidth(rate), slow_close(delay), timeout(timeout),
        reset_peer(timeout), slicer(average_size, size_variation, delay), limit_data(bytes).
        "upstream" is what the client sends, "downstream" what it receives; times are milliseconds.
        """
        name = f"{kind}-{secrets.token_hex(3)}"
        body = {"name": name, "type": kind, "stream": stream, "toxicity": toxicity, "attributes": attributes}
        self.service.request("POST", f"/proxies/{self.name}/toxics", body)
        return name

    def remove_toxic(self, name: str) -> None:
        """Remove one toxic."""
        self.service.request("DELETE", f"/proxies/{self.name}/toxics/{name}")

    def remove_toxics(self) -> None:
        """Remove every toxic."""
        for toxic in self.service.request("GET", f"/proxies/{self.name}/toxics"):
            self.remove_toxic(toxic["name"])

    def disable(self) -> None:
        """Cut all connections and refuse new ones."""
        self._set(enabled=False)

    def enable(self) -> None:
        """Accept connections again, on the same address."""
        self._set(enabled=True)

    def _set(self, *, enabled: bool) -> None:
        body = {"listen": self.address, "upstream": self.upstream, "enabled": enabled}
        self.service.request("POST", f"/proxies/{self.name}", body)

    def remove(self) -> None:
        """Close the port for good."""
        self.service.request("DELETE", f"/proxies/{self.name}")


class Toxiproxy(ChildService):
    """The server; its port is the HTTP API's."""

    name = "toxiproxy"

    @staticmethod
    def unavailable() -> str:
        """Say why it cannot be started here; empty when it can."""
        return "" if tool("toxiproxy-server") else "toxiproxy is not on this machine (make testbed)"

    def argv(self) -> Sequence[str | Path]:
        """Return the command."""
        program = tool("toxiproxy-server") or "toxiproxy-server"
        return [program, "-host", LOOPBACK, "-port", str(self.port)]

    def ready(self) -> bool:
        """Tell whether the API answers."""
        return listening(self.port) and isinstance(self.request("GET", "/proxies"), dict)

    def request(self, method: str, path: str, body: Any = None) -> Any:
        """Call the HTTP API and return the decoded answer."""
        import requests

        answer = requests.request(method, f"http://{LOOPBACK}:{self.port}{path}", json=body, timeout=10)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def proxy(self, upstream: str) -> Proxy:
        """Open a port that leads to `host:port`; an http:// in front is passed over."""
        upstream = upstream.removeprefix("http://").rstrip("/")
        name = f"proxy-{secrets.token_hex(4)}"
        body = {"name": name, "listen": f"{LOOPBACK}:0", "upstream": upstream, "enabled": True}
        made = self.request("POST", "/proxies", body)
        return Proxy(self, name, made["listen"], upstream)
