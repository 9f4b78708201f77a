"""Ask and change a running CouchDB node over HTTP (docs.couchdb.org, api).

Listing and being up prove nothing: a node answers 200 for both while none of its databases can be opened, as
after a restore under another node's name. Only a database's own address tells.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote, unquote

import requests
from requests.auth import HTTPBasicAuth

from hq_backups.engine.couch.node_errors import answered, unreachable
from hq_backups.engine.errors import ServiceError

MOST_ANSWER = 64 << 20
"""Bytes; the longest answers are all shard maps, and all design documents of a database."""
_SHARDS = "/_node/_local/_dbs"
_DESIGN = "_design/"


class Node:
    """One node at its own address, not a proxy's; never goes through one, nor follows a redirect."""

    def __init__(
        self, url: str, username: str | None = None, password: str | None = None, timeout: float = 60
    ) -> None:
        """Take the base address; ``timeout`` is how many seconds an answer may keep still.

        All before its last @ are user and password, whatever is in them: one that should have been escaped, with
        a slash in it, would otherwise be told as a part of the address.
        """
        scheme, slashes, rest = url.partition("://") if "://" in url else ("", "", url)
        account, at, place = rest.rpartition("@")
        if at:
            user, _, secret = account.partition(":")
            username, password = unquote(user), unquote(secret)
        self.url = f"{scheme}{slashes}{place}".rstrip("/")
        self.timeout = timeout
        self._session = requests.Session()
        self._session.trust_env = False  # neither a proxy nor somebody's .netrc
        if username is not None:
            self._session.auth = HTTPBasicAuth(username.encode(), (password or "").encode())

    def __repr__(self) -> str:
        return f"Node({self.url!r})"

    def version(self) -> str:
        """Return the server's version (api/server/common, ``/``)."""
        answer = _object(self._get("/"))
        if "couchdb" not in answer:
            raise self._senseless("/")
        return str(answer.get("version", ""))

    def is_up(self) -> bool:
        """Tell whether the node takes requests (``/_up``): not that any database can be opened."""
        try:
            self._get("/_up")
        except ServiceError:
            return False
        return True

    def name(self) -> str:
        """Return the node's own name, such as couchdb@127.0.0.1 (``/_node/_local``; needs an admin).

        Where a node does not tell (before 2.1), its membership does, if it is the only one.
        """
        try:
            told = _object(self._get("/_node/_local")).get("name")
        except ServiceError as error:
            if error.facts.get("status") not in (404, 405):
                raise
            told = None
        if isinstance(told, str) and told:
            return told
        nodes = self.membership()["all_nodes"]
        if len(nodes) == 1:
            return nodes[0]
        raise ServiceError(
            f"the CouchDB at {self.url} does not tell its name, and is one of {len(nodes)} nodes",
            hint=f"Look at {self.url}/_membership and give the node's name.",
        )

    def membership(self) -> dict[str, list[str]]:
        """Return ``all_nodes``, those that this one is connected to, and ``cluster_nodes`` (``/_membership``)."""
        answer = _object(self._get("/_membership"))
        return {key: _names(answer.get(key)) for key in ("all_nodes", "cluster_nodes")}

    def databases(self) -> list[str]:
        """Return all databases, system ones (_users, _replicator) too (``/_all_dbs``)."""
        answer = self._get("/_all_dbs")
        if not isinstance(answer, list):
            raise self._senseless("/_all_dbs")
        return _names(answer)

    def counts(self, db: str) -> tuple[int, int]:
        """Return how many documents and how many deleted ones a database has (api/database/common, ``/{db}``)."""
        answer = _object(self._get(_path(db)))
        present, deleted = answer.get("doc_count"), answer.get("doc_del_count")
        if not isinstance(present, int) or not isinstance(deleted, int):
            raise self._senseless(_path(db))
        return present, deleted

    def shard_docs(self) -> dict[str, dict[str, Any]]:
        """Return every shard map of the node's ``_dbs`` by its id (cluster/sharding, Updating cluster metadata)."""
        answer = self._get(f"{_SHARDS}/_all_docs", include_docs="true")
        return {doc["_id"]: doc for doc in self._docs(answer) if not doc["_id"].startswith(_DESIGN)}

    def put_shard_doc(self, doc: Mapping[str, Any]) -> str:
        """Write one shard map and return its new revision.

        A node refuses one without the revision it has (409) or in which by_range and by_node disagree (403);
        it takes one with the name of no node, or in which a range is missing. Answers of this node change at
        once, without a restart.
        """
        path = f"{_SHARDS}/{_quoted(str(doc['_id']))}"
        return str(_object(self._ask("PUT", path, body=doc)).get("rev", ""))

    def design_docs(self, db: str) -> list[dict[str, Any]]:
        """Return a database's design documents (api/database/bulk-api, ``/{db}/_design_docs``)."""
        return self._docs(self._get(f"{_path(db)}/_design_docs", include_docs="true"))

    def read_view(self, db: str, ddoc: str, view: str, timeout: float | None = None) -> int:
        """Read one row of a view and return how many there are; what is not indexed yet is first.

        ``ddoc`` with or without its _design/ (api/ddoc/views). An index that has to be built may take hours:
        give ``timeout``.
        """
        path = f"{_path(db)}/_design/{_quoted(ddoc.removeprefix(_DESIGN))}/_view/{_quoted(view)}"
        answer = _object(self._ask("GET", path, {"limit": "1", "reduce": "false"}, timeout=timeout))
        if not isinstance(answer.get("rows"), list):
            raise self._senseless(path)
        return int(answer.get("total_rows") or 0)

    def read_docs(self, db: str, limit: int = 100) -> list[dict[str, Any]]:
        """Return the first documents of a database (api/database/bulk-api, ``/{db}/_all_docs``)."""
        return self._docs(self._get(f"{_path(db)}/_all_docs", include_docs="true", limit=str(limit)))

    def _docs(self, answer: Any) -> list[dict[str, Any]]:
        rows = _object(answer).get("rows")
        if not isinstance(rows, list):
            raise self._senseless("_all_docs")
        docs = [row.get("doc") for row in rows if isinstance(row, dict)]
        return [doc for doc in docs if isinstance(doc, dict) and isinstance(doc.get("_id"), str)]

    def _get(self, path: str, **query: str) -> Any:
        return self._ask("GET", path, query)

    def _ask(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        *,
        body: Mapping[str, Any] | None = None,
        timeout: float | None = None,
    ) -> Any:
        """Return the answer's JSON; raise ServiceError, whose facts carry the status, 0 when there was none."""
        try:
            with self._session.request(
                method,
                self.url + path,
                params=query,
                json=body,
                headers={"Accept": "application/json"},
                timeout=(min(10.0, self.timeout), timeout or self.timeout),
                allow_redirects=False,
                stream=True,
            ) as response:
                told = b"".join(_bounded(response))
        except requests.RequestException as error:
            raise unreachable(self.url, path, error) from error
        try:
            parsed = json.loads(told)
        except (ValueError, RecursionError):
            parsed = None
        if not response.ok or parsed is None or response.is_redirect:
            raise answered(self.url, method, path, response.status_code, parsed)
        return parsed

    def _senseless(self, path: str) -> ServiceError:
        return answered(self.url, "GET", path, 200, None)


def view_to_read(ddoc: Mapping[str, Any]) -> str | None:
    """Return the name of one view by which a design document's index can be read; None when it has none.

    All views of one design document are one index (ddocs/views). Mango's documents (language ``query``) answer
    by /_find only, full-text ones have no views.
    """
    views = ddoc.get("views")
    if ddoc.get("language") == "query" or not isinstance(views, dict):
        return None
    return next((name for name in views if name != "lib"), None)  # lib holds code that views share


def _bounded(response: requests.Response) -> Iterator[bytes]:
    size = 0
    for part in response.iter_content(1 << 16):
        size += len(part)
        if size > MOST_ANSWER:
            msg = f"its answer is longer than {MOST_ANSWER} bytes"
            raise requests.exceptions.ContentDecodingError(msg)
        yield part


def _object(answer: Any) -> dict[str, Any]:
    return answer if isinstance(answer, dict) else {}


def _names(answer: Any) -> list[str]:
    return [name for name in answer if isinstance(name, str)] if isinstance(answer, list) else []


def _quoted(name: str) -> str:
    return quote(name, safe="")


def _path(db: str) -> str:
    return f"/{_quoted(db)}"
