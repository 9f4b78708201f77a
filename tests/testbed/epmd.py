"""Stand in for Erlang's mapper of ports: answers which nodes a host has (erl_dist_protocol, NAMES_REQ)."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tests.testbed.process import LOOPBACK


@contextmanager
def epmd(*names: str) -> Iterator[int]:
    """Serve a list of nodes' names; yield the port."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            if self.request.recv(16) == b"\x00\x01n":
                told = "".join(f"name {name} at port {9100 + n}\n" for n, name in enumerate(names))
                self.request.sendall((4369).to_bytes(4, "big") + told.encode())

    with socketserver.ThreadingTCPServer((LOOPBACK, 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()
