"""A cluster's HTTP interface: several addresses, one at a time, and answers told from silence."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlencode

import requests

from hq_backups.engine.elasticsearch.faults import answered, unreachable
from hq_backups.engine.errors import ServiceError, Unanswered

MAX_BYTES = 256 << 20
"""An answer that is larger is none of Elasticsearch's."""
CONNECT_SECONDS = 10.0
READ_SECONDS = 60.0


MAX_PATH = 3000
"""Elasticsearch refuses a request's first line beyond 4 KiB (http.max_initial_line_length)."""


@dataclass(frozen=True)
class Address:
    """Where a cluster answers, and as whom."""

    urls: tuple[str, ...]
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    ca_file: str | None = None
    """The certificates to trust instead of the system's."""


class Cluster:
    """One cluster."""

    def __init__(self, address: Address, read_seconds: float = READ_SECONDS) -> None:
        """Talk to ``address``; nothing is sent yet."""
        self.address = address
        self._read = read_seconds
        self._session = requests.Session()
        # A proxy of the environment, or a .netrc, is none of the cluster's.
        self._session.trust_env = False
        if address.username:
            self._session.auth = (address.username, address.password or "")
        if address.ca_file:
            self._session.verify = address.ca_file
        self._urls = [url.rstrip("/") for url in address.urls]

    def __repr__(self) -> str:
        """Show no password."""
        return f"Cluster({self.url})"

    @property
    def url(self) -> str:
        """Return the address that answered last."""
        return self._urls[0]

    def get(self, path: str, **query: str) -> Any:
        """Ask for something; raises ServiceError."""
        return self.ask("GET", path, query)

    def find(self, path: str, **query: str) -> Any:
        """Ask for something; None when it is not there."""
        try:
            return self.ask("GET", path, query)
        except ServiceError as error:
            if error.facts.get("status") == 404:
                return None
            raise

    def ask(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Any = None,
        *,
        seconds: float | None = None,
    ) -> Any:
        """Send a request; raises ServiceError with the answer's facts, Unanswered when it may have been heard."""
        target = path + (f"?{urlencode(query)}" if query else "")
        failure: ServiceError | None = None
        for url in list(self._urls):
            try:
                answer = self._send(method, url + target, body, seconds or self._read)
            except OSError as error:
                failure = unreachable(url, method, target, error)
                if isinstance(failure, Unanswered) and method != "GET":
                    raise failure from error
                failure.__cause__ = error
                continue
            self._urls.remove(url)
            self._urls.insert(0, url)
            return answer
        assert failure is not None  # noqa: S101 - there is one address at least
        raise failure

    def _send(self, method: str, url: str, body: Any, seconds: float) -> Any:
        with self._session.request(
            method,
            url,
            data=None if body is None else json.dumps(body).encode(),
            headers={} if body is None else {"Content-Type": "application/json"},
            timeout=(CONNECT_SECONDS, seconds),
            allow_redirects=False,
            stream=True,
        ) as response:
            raw = _bounded(response)
        try:
            said = json.loads(raw) if raw.strip() else None
        except (ValueError, RecursionError):
            said = raw[:500].decode("utf-8", "replace")
        if 200 <= response.status_code < 300 and not isinstance(said, str):
            return said
        raise answered(method, url, response.status_code, said)

    @property
    def about(self) -> Mapping[str, Any]:
        """Return what the cluster says of itself: ``cluster_name``, ``cluster_uuid``, ``version``."""
        told = self.get("/")
        if not isinstance(told, dict) or not isinstance(told.get("version"), dict):
            raise ServiceError(
                f"{self.url} is no Elasticsearch: it said {str(told)[:100]!r}",
                hint="See elasticsearch_url: list_backups --config",
            )
        return told


def segment(name: str) -> str:
    """Return a name as one part of a path."""
    return quote(name, safe="")


def grouped(names: Iterable[str]) -> list[str]:
    """Return names joined by commas, in as many pieces as fit into a request's first line."""
    groups: list[str] = []
    for name in map(segment, names):
        if groups and len(groups[-1]) + len(name) < MAX_PATH:
            groups[-1] += f",{name}"
        else:
            groups.append(name)
    return groups


def _bounded(response: requests.Response) -> bytes:
    raw = bytearray()
    for piece in response.iter_content(1 << 16):
        raw += piece
        if len(raw) > MAX_BYTES:
            raise requests.exceptions.ContentDecodingError(f"its answer is larger than {MAX_BYTES} bytes")
    return bytes(raw)
