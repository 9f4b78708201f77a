"""Stand in front of an Elasticsearch node as nginx or its own security does: TLS, a user and a password."""

from __future__ import annotations

import base64
import http.client
import json
import ssl
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from tests.testbed.process import LOOPBACK


@dataclass
class Gate:
    """Passes on to the node behind it whatever its users ask."""

    node: str
    """Where the node answers."""
    certificate: Path | None
    """A file with certificate and key; None means plain HTTP."""
    users: dict[str, str]
    """Users' passwords."""
    may_only_read: tuple[str, ...] = ()
    passed: list[str] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)

    def __enter__(self) -> Self:
        """Listen."""
        self._server = ThreadingHTTPServer((LOOPBACK, 0), type("Handler", (_Handler,), {"gate": self}))
        if self.certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.certificate)
            # Handshakes happen in the threads: one that fails stops no other.
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        """Return its address, by a name that a certificate can have."""
        scheme = "http" if self.certificate is None else "https"
        return f"{scheme}://localhost:{self._server.server_address[1]}"

    def user_of(self, header: str | None) -> str | None:
        """Return who asks; None for nobody that is known."""
        kind, _, value = (header or "").partition(" ")
        if kind != "Basic":
            return None
        name, _, password = base64.b64decode(value).decode().partition(":")
        return name if self.users.get(name) == password else None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    gate: Gate

    def setup(self) -> None:
        if isinstance(self.request, ssl.SSLSocket):
            self.request.settimeout(30)
            self.request.do_handshake()
        super().setup()

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:
            return  # it went away

    def finish(self) -> None:
        try:
            super().finish()
        except OSError:
            return

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        user = self.gate.user_of(self.headers.get("Authorization"))
        if user is None:
            self.deny(401, f"unable to authenticate user for REST request [{self.path}]")
        elif user in self.gate.may_only_read and self.command != "GET":
            self.deny(403, f"action [cluster:admin/write] is unauthorized for user [{user}]")
        else:
            self.gate.passed.append(f"{self.command} {self.path}")
            self.forward(body)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer

    def forward(self, body: bytes) -> None:
        behind = urlsplit(self.gate.node)
        connection = http.client.HTTPConnection(behind.hostname or LOOPBACK, behind.port, timeout=120)
        kept = {k: v for k, v in self.headers.items() if k.lower() in ("content-type", "accept")}
        connection.request(self.command, self.path, body or None, kept)
        response = connection.getresponse()
        raw = response.read()
        connection.close()
        self.say(response.status, raw, {"Content-Type": response.getheader("Content-Type") or "text/plain"})

    def deny(self, status: int, reason: str) -> None:
        """Answer as Elasticsearch's own security does."""
        self.gate.refused.append(status)
        error: dict[str, Any] = {"type": "security_exception", "reason": reason}
        raw = json.dumps({"error": {**error, "root_cause": [error]}, "status": status}).encode()
        header = {"WWW-Authenticate": 'Basic realm="security" charset="UTF-8"'} if status == 401 else {}
        self.say(status, raw, {"Content-Type": "application/json", **header})

    def say(self, status: int, raw: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, format: str, *args: Any) -> None:
        return
