"""Stand in front of an S3 service and answer what no healthy service would."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import urlsplit

from tests.testbed.process import LOOPBACK


@dataclass
class Ask:
    """One request."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    forward: Callable[[], Answer]

    @property
    def query(self) -> str:
        """Return what stands behind the question mark."""
        return urlsplit(self.path).query

    @property
    def what(self) -> str:
        """Return the operation in one word."""
        multipart = "uploadId=" in self.query
        words = {
            ("POST", False): "create",
            ("PUT", True): "part",
            ("POST", True): "complete",
            ("DELETE", True): "abort",
            ("PUT", False): "put",
        }
        return words.get((self.method, multipart), self.method.lower())


@dataclass
class Answer:
    """One response; ``cut`` closes the connection after so many bytes of the body."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    length: int | None = None


Lie = Callable[[Ask], "Answer | None"]
"""None lets the truth pass; raising ConnectionError closes the connection without an answer."""


def s3_error(code: str, status: int, message: str = "made up", **more: str) -> Answer:
    """Return an answer as S3 writes its errors."""
    fields = "".join(f"<{k}>{v}</{k}>" for k, v in {"Code": code, "Message": message, **more}.items())
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error>{fields}</Error>'.encode()
    return Answer(status, body, {"Content-Type": "application/xml"})


class Liar:
    """A reverse proxy in this process that lies by a function."""

    def __init__(self, upstream: str, lie: Lie = lambda _: None, *, hidden: tuple[str, ...] = ()) -> None:
        """Lead to ``upstream``; headers that begin with one of ``hidden`` are lost in both directions."""
        self.upstream = urlsplit(upstream)
        self.lie = lie
        self.hidden = hidden
        self.seen: list[Ask] = []
        self._server: ThreadingHTTPServer | None = None

    @property
    def endpoint(self) -> str:
        """Return the address to use instead of the service's."""
        assert self._server is not None
        return f"http://{LOOPBACK}:{self._server.server_address[1]}"

    def count(self, what: str) -> int:
        """Return how many requests of a kind came."""
        return sum(ask.what == what for ask in self.seen)

    def pass_on(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """Ask the service itself."""
        connection = http.client.HTTPConnection(self.upstream.netloc, timeout=30)
        try:
            kept = {k: v for k, v in headers.items() if not self._hides(k) and k.lower() != "expect"}
            connection.request(method, path, body, kept)
            answer = connection.getresponse()
            data = answer.read()
            told = {k: v for k, v in answer.getheaders() if not self._hides(k)}
            length = int(told.get("Content-Length") or 0) if method == "HEAD" else None
            return Answer(answer.status, data, told, length=length)
        finally:
            connection.close()

    def _hides(self, header: str) -> bool:
        return header.lower().startswith(self.hidden) if self.hidden else False

    def __enter__(self) -> Self:
        liar = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                headers = dict(self.headers.items())
                ask = Ask(
                    self.command,
                    self.path,
                    headers,
                    body,
                    lambda: liar.pass_on(self.command, self.path, headers, body),
                )
                liar.seen.append(ask)
                try:
                    answer = liar.lie(ask) or ask.forward()
                except ConnectionError:
                    self.close_connection = True
                    return
                self._say(answer)

            def _say(self, answer: Answer) -> None:
                self.send_response_only(answer.status)
                for name, value in answer.headers.items():
                    if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                        self.send_header(name, value)
                length = len(answer.body) if answer.length is None else answer.length
                self.send_header("Content-Length", str(length))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(answer.body[: answer.cut])
                if answer.cut is not None:
                    self.close_connection = True

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _any

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer((LOOPBACK, 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()
