"""What botocore makes of answers that end too early, from a service of a few lines on a real socket."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
from botocore.exceptions import ConnectionClosedError, EndpointConnectionError, HTTPClientError

from hq_backups.engine.config import S3Config
from hq_backups.engine.repository.s3_client import Network, make_client

HEAD = (
    b"HTTP/1.1 200 OK\r\n"
    b"Content-Length: 11\r\n"
    b'ETag: "9a0364b9e99bb480dd25e1f0284c8555"\r\n'
    b"Last-Modified: Sun, 22 Nov 2026 20:53:25 GMT\r\n"
    b"x-amz-version-id: 01KAPQ3X9Z\r\n\r\n"
)
BODY = b"eleven here"
if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

Serve = Callable[[bytes], str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Answer every request on loopback with the same bytes, and close the connection after them."""
    listener = socket.create_server(("127.0.0.1", 0))
    answer = b""

    def run() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                asked = b""
                while b"\r\n\r\n" not in asked and (got := connection.recv(65536)):
                    asked += got
                connection.sendall(answer)
                connection.shutdown(socket.SHUT_WR)
                connection.recv(65536)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def served(bytes_: bytes) -> str:
        nonlocal answer
        answer = bytes_
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield served
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(5)


def client(endpoint: str) -> S3Client:
    config = S3Config(endpoint=endpoint, region="us-east-1", access_key="a", secret_key="b")
    return make_client(config, Network(connect=2, read=2, attempts=1))


def test_an_answer_that_is_whole_is_taken(serve: Serve) -> None:
    s3 = client(serve(HEAD))
    assert s3.head_object(Bucket="b", Key="k")["VersionId"] == "01KAPQ3X9Z"
    s3 = client(serve(HEAD + BODY))
    assert s3.get_object(Bucket="b", Key="k")["Body"].read() == BODY


@pytest.mark.parametrize("operation", ["head_object", "get_object", "put_object"])
def test_an_answer_cut_anywhere_in_its_headers_is_none(serve: Serve, operation: str) -> None:
    s3 = client(serve(b""))
    for cut in range(0, len(HEAD) - 1, 7):
        serve(HEAD[:cut])
        with pytest.raises((ConnectionClosedError, EndpointConnectionError, HTTPClientError)):
            getattr(s3, operation)(Bucket="b", Key="k")


def test_headers_end_with_their_empty_line_only(serve: Serve) -> None:
    s3 = client(serve(HEAD[:-2]))
    with pytest.raises((ConnectionClosedError, HTTPClientError)):
        s3.head_object(Bucket="b", Key="k")
