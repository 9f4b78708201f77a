"""HTTP answers that are whole, or none.

http.client takes the end of a connection for the end of the headers: of an answer that was cut there it
makes one with fewer headers, or with half of the last one, and tells nobody. An ETag, a version or a length
read off such an answer is wrong; so here the empty line that ends the headers is demanded.
"""

from __future__ import annotations

import http.client
from typing import Any, BinaryIO, cast

from botocore.awsrequest import (
    AWSHTTPConnection,
    AWSHTTPConnectionPool,
    AWSHTTPSConnection,
    AWSHTTPSConnectionPool,
)
from botocore.client import BaseClient


class _Lines:
    """A connection's file that remembers the last line read from it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.last = b""

    def readline(self, limit: int = -1) -> bytes:
        self.last = self.file.readline(limit)
        return self.last

    def close(self) -> None:
        self.file.close()


class WholeResponse(http.client.HTTPResponse):
    """An answer whose headers ended; else IncompleteRead, which urllib3 and botocore tell as a lost connection."""

    def begin(self) -> None:
        """Read the status and the headers."""
        response = cast("Any", self)  # typeshed does not tell of fp's kind
        lines = _Lines(response.fp)
        response.fp = lines
        try:
            super().begin()
        finally:
            if response.fp is lines:  # else it was closed, as there is no body
                response.fp = lines.file
        if lines.last not in (b"\r\n", b"\n"):
            self.close()
            raise http.client.IncompleteRead(lines.last)


class _Connection(AWSHTTPConnection):
    response_class = WholeResponse  # type: ignore[assignment]  # the stubs name botocore's own


class _SecureConnection(AWSHTTPSConnection):
    response_class = WholeResponse  # type: ignore[assignment]  # the stubs name botocore's own


class _Pool(AWSHTTPConnectionPool):
    ConnectionCls = _Connection


class _SecurePool(AWSHTTPSConnectionPool):
    ConnectionCls = _SecureConnection


def demand_whole_answers(client: BaseClient) -> None:
    """Have a client take no answer whose headers were cut.

    botocore has no public place for this; a botocore without these names serves as before, and
    tests/unit/test_s3_http.py tells.
    """
    session = getattr(getattr(client, "_endpoint", None), "http_session", None)
    pools = getattr(session, "_pool_classes_by_scheme", None)
    if isinstance(pools, dict):
        pools.update(http=_Pool, https=_SecurePool)
