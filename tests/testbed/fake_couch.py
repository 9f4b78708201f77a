"""Stand in for a CouchDB node: a process of its own that serves a real data directory.

    python -m tests.testbed.fake_couch --data-dir D --port N [--name couchdb@127.0.0.1] …

The admin is ``user:password`` in the environment, FAKE_COUCH_ADMIN. What it does is what a real node was seen
to do, silent mistakes included; indexes are not kept: a view has a row for each document.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import json
import os
import re
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from hq_backups.engine.couch.couchfile import CouchFile, has_header
from hq_backups.engine.couch.shardmaps import shard_file, shard_maps
from tests.testbed.couch_data import AUTH, shard_map, span_of
from tests.testbed.couch_writer import CouchAppender, write_couch
from tests.testbed.process import LOOPBACK

LOCAL = ["_node", "_local"]


class Refusal(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, error: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.body = {"error": error, "reason": reason}


@dataclass
class Faults:
    """What goes wrong on purpose."""

    fail: list[str] = field(default_factory=list)
    """Patterns of paths that are answered 500."""
    lose: list[str] = field(default_factory=list)
    """Databases that are counted one document short."""
    hang: list[str] = field(default_factory=list)
    """Patterns of paths that are never answered."""
    stop_after: int | None = None
    """Requests after which none is answered."""
    seen: int = 0


class Data:
    """The data directory, read anew for each request and written as a node writes it."""

    def __init__(self, root: Path, name: str) -> None:
        self.root = root
        self.name = name
        self.lock = threading.RLock()
        fresh = not (root / "_dbs.couch").exists()
        for file in ("_dbs", "_nodes", "_users"):
            path = root / f"{file}.couch"
            if not path.exists():
                docs = {"_dbs": [], "_nodes": [{"_id": name}], "_users": [AUTH]}[file]
                write_couch(path, docs)
        self.held = (root / "_dbs.couch").open("rb")
        if fresh:
            for database in ("_users", "_replicator"):
                self.create(database, 2, [AUTH] if database == "_users" else [])

    def maps(self) -> dict[str, Any]:
        """Return the shard maps by database."""
        return shard_maps(self.root / "_dbs.couch")

    def nodes(self) -> list[str]:
        """Return the nodes that the node knows."""
        with CouchFile(self.root / "_nodes.couch") as file:
            return sorted(doc.id for doc in file.docs())

    def files(self, name: str) -> dict[str, Path]:
        """Return a database's files by range, made empty where they are missing or have no header."""
        doc = self.maps().get(name)
        if doc is None:
            raise Refusal(404, "not_found", "Database does not exist.")
        suffix = "".join(map(chr, doc["shard_suffix"]))
        mine = [span for span in doc["by_range"] if self.name in doc["by_range"][span]]
        if not mine:
            raise Refusal(500, "internal_server_error", "No DB shards could be opened.")
        if len(mine) < len(doc["by_range"]):  # from fabric's source, not seen on a node
            raise Refusal(500, "nodedown", "progress not possible")
        return {span: self._opened(self.root / shard_file(span, name, suffix)) for span in mine}

    def _opened(self, path: Path) -> Path:
        if not path.exists():
            half = path.with_name(path.name + ".compact")
            if half.exists():
                half.rename(path)
            else:
                write_couch(path, [])
                return path
        with path.open("rb") as file:
            whole = has_header(file)
        if not whole:
            with CouchAppender(path):
                pass
        return path

    def counts(self, name: str) -> tuple[int, int]:
        """Return how many documents and deleted ones a database has."""
        present = gone = 0
        for path in self.files(name).values():
            with CouchFile(path) as file:
                present, gone = present + file.doc_count(), gone + file.deleted_count()
        return present, gone

    def docs(self, name: str) -> list[dict[str, Any]]:
        """Return a database's documents in the order of their ids."""
        made: list[dict[str, Any]] = []
        for path in self.files(name).values():
            with CouchFile(path) as file:
                made += [doc.to_json() for doc in file.docs(bodies=True)]
        return sorted(made, key=lambda doc: doc["_id"])

    def doc(self, name: str, doc_id: str) -> dict[str, Any]:
        """Return one document."""
        for doc in self.docs(name):
            if doc["_id"] == doc_id:
                return doc
        raise Refusal(404, "not_found", "missing")

    def create(self, name: str, q: int, docs: list[dict[str, Any]]) -> None:
        """Make a database of ``q`` shards, all here."""
        if name in self.maps():
            raise Refusal(412, "file_exists", "The database could not be created, the file already exists.")
        made = shard_map(name, q=q, nodes=[self.name])
        with CouchAppender(self.root / "_dbs.couch") as dbs:
            dbs.put(made)
            dbs.commit()
        for doc in docs:
            self.write(name, doc)

    def write(self, name: str, doc: dict[str, Any]) -> str:
        """Write one document; return its revision."""
        files = self.files(name)
        span = span_of(doc["_id"], files)
        if span is None:
            raise Refusal(500, "internal_server_error", "No DB shards could be opened.")
        return self._update(files[span], doc)

    def write_map(self, doc: dict[str, Any]) -> str:
        """Write one shard map as a node does: it looks only whether by_range and by_node agree."""
        _validate(doc)
        rev = self._update(self.root / "_dbs.couch", doc)
        with contextlib.suppress(Refusal):
            self.files(doc["_id"])
        return rev

    def forget_node(self, name: str, rev: str) -> str:
        """Delete a node's document."""
        return self._update(self.root / "_nodes.couch", {"_id": name, "_rev": rev, "_deleted": True})

    def _update(self, path: Path, doc: dict[str, Any]) -> str:
        with CouchFile(path) as file:
            known = {one.id: one.rev for one in file.docs()}
        if doc.get("_rev") != known.get(doc["_id"]):
            raise Refusal(409, "conflict", "Document update conflict.")
        with CouchAppender(path) as writer:
            rev = writer.put(doc)
            writer.commit()
        return rev

    def compact(self, name: str) -> None:
        """Compact every shard of a database."""
        for path in self.files(name).values():
            with CouchAppender(path) as writer:
                writer.compact()


def _validate(doc: dict[str, Any]) -> None:
    """Refuse a map as mem3_bdu does."""
    for key in ("by_node", "by_range"):
        if not isinstance(doc.get(key), dict):
            raise Refusal(403, "forbidden", f"{key} is mandatory")
    for one, other in (("by_node", "by_range"), ("by_range", "by_node")):
        for name, members in doc[one].items():
            for member in members:
                if name not in doc[other].get(member, []):
                    raise Refusal(403, "forbidden", f"{other} for {member} missing {name}")


class Node:
    """Answers requests."""

    def __init__(self, data: Data, admin: tuple[str, str], version: str) -> None:
        self.data = data
        self.admin = admin
        self.version = version

    def role(self, header: str | None) -> str:
        """Return who asks: "admin", "user" or "nobody"; refuse a wrong password."""
        if not header or not header.startswith("Basic "):
            return "nobody"
        name, _, password = base64.b64decode(header[6:]).decode("utf-8").partition(":")
        if (name, password) == self.admin:
            return "admin"
        try:
            user = self.data.doc("_users", f"org.couchdb.user:{name}")
        except Refusal:
            user = {}
        if user.get("password_scheme") == "pbkdf2":
            wanted, prf = bytes.fromhex(user["derived_key"]), user.get("pbkdf2_prf", "sha")
            salt, rounds = user["salt"].encode(), user["iterations"]
            algorithm = {"sha": "sha1"}.get(prf, prf)
            if hashlib.pbkdf2_hmac(algorithm, password.encode(), salt, rounds, len(wanted)) == wanted:
                return "user"
        raise Refusal(401, "unauthorized", "Name or password is incorrect.")

    def answer(self, method: str, target: str, body: bytes, header: str | None) -> tuple[int, Any]:
        """Return the status and JSON for a request."""
        url = urlsplit(target)
        path = [unquote(part) for part in url.path.strip("/").split("/") if part]
        query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        role = self.role(header)
        if not path:
            return 200, {"couchdb": "Welcome", "version": self.version, "vendor": {"name": "a stand-in"}}
        if path == ["_up"]:
            return 200, {"status": "ok", "seeds": {}}
        if path == ["_session"]:
            return 200, {"ok": True, "userCtx": {"name": None if role == "nobody" else role}}
        system = path[0].startswith("_") and path[0] not in ("_users", "_replicator")
        if role != "admin" and (system or role == "nobody"):
            raise Refusal(401, "unauthorized", "You are not a server admin.")
        if role != "admin":
            raise Refusal(403, "forbidden", "You are not allowed to access this db.")
        content = json.loads(body) if body else None
        with self.data.lock:
            if system:
                return self.server(method, path, content, query)
            return self.database(method, path, content, query)

    def server(self, method: str, path: list[str], body: Any, query: dict[str, str]) -> tuple[int, Any]:
        """Answer what is the node's own."""
        data = self.data
        if path[:1] == ["_node"] and path[1:2] == [data.name]:
            path = [*LOCAL, *path[2:]]
        match method, path:
            case "GET", ["_all_dbs"]:
                return 200, sorted(data.maps())
            case "GET", ["_membership"]:
                return 200, {"all_nodes": [data.name], "cluster_nodes": data.nodes()}
            case "GET", ["_node", "_local"]:
                return 200, {"name": data.name}
            case "GET", ["_node", "_local", "_dbs", "_all_docs"]:
                return 200, _rows(list(data.maps().values()), query)
            case "GET", ["_node", "_local", "_nodes", "_all_docs"]:
                with CouchFile(data.root / "_nodes.couch") as file:
                    return 200, _rows([doc.to_json() for doc in file.docs(bodies=True)], query)
            case "DELETE", ["_node", "_local", "_nodes", name]:
                return 200, {"ok": True, "id": name, "rev": data.forget_node(name, query.get("rev", ""))}
            case "GET", ["_node", "_local", "_dbs", name]:
                if name in data.maps():
                    return 200, data.maps()[name]
            case "PUT", ["_node", "_local", "_dbs", name]:
                return 201, {"ok": True, "id": name, "rev": data.write_map({**body, "_id": name})}
        raise Refusal(404, "not_found", "missing")

    def database(self, method: str, path: list[str], body: Any, query: dict[str, str]) -> tuple[int, Any]:
        """Answer what is a database's."""
        data, name = self.data, path[0]
        match method, path[1:]:
            case "PUT", []:
                data.create(name, int(query.get("q", 2)), [])
                return 201, {"ok": True}
            case "GET", []:
                present, gone = data.counts(name)
                return 200, {
                    "db_name": name,
                    "doc_count": present,
                    "doc_del_count": gone,
                    "disk_format_version": 8,
                }
            case "POST", ["_compact"]:
                data.compact(name)
                return 202, {"ok": True}
            case "GET", ["_all_docs"]:
                return 200, _rows(data.docs(name), query)
            case "GET", ["_design_docs"]:
                return 200, _rows(
                    [doc for doc in data.docs(name) if doc["_id"].startswith("_design/")], query
                )
            case "GET", ["_design", ddoc, "_view", view]:
                if view not in data.doc(name, f"_design/{ddoc}").get("views", {}):
                    raise Refusal(404, "not_found", "missing_named_view")
                return 200, _rows(
                    [doc for doc in data.docs(name) if not doc["_id"].startswith("_design/")], query
                )
            case "GET", [*parts] if parts:
                return 200, data.doc(name, "/".join(parts))
            case "PUT", [*parts] if parts:
                doc_id = "/".join(parts)
                revision = {"_rev": query["rev"]} if "rev" in query else {}
                rev = data.write(name, {**revision, **body, "_id": doc_id})
                return 201, {"ok": True, "id": doc_id, "rev": rev}
            case "DELETE", [*parts] if parts:
                gone_doc = {"_id": "/".join(parts), "_rev": query.get("rev"), "_deleted": True}
                return 200, {"ok": True, "id": gone_doc["_id"], "rev": data.write(name, gone_doc)}
        raise Refusal(405, "method_not_allowed", "Only other methods are allowed.")


def _rows(docs: list[dict[str, Any]], query: dict[str, str]) -> dict[str, Any]:
    rows = []
    for doc in docs[: int(query.get("limit", len(docs)))]:
        row = {"id": doc["_id"], "key": doc["_id"], "value": {"rev": doc["_rev"]}}
        rows.append(row | {"doc": doc} if query.get("include_docs") == "true" else row)
    return {"total_rows": len(docs), "offset": 0, "rows": rows}


def handler(node: Node, faults: Faults) -> type[BaseHTTPRequestHandler]:
    """Return the class that serves one connection."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with node.data.lock:
                faults.seen += 1
                late = faults.stop_after is not None and faults.seen > faults.stop_after
            if late or any(re.search(pattern, self.path) for pattern in faults.hang):
                threading.Event().wait()
            try:
                if any(re.search(pattern, self.path) for pattern in faults.fail):
                    raise Refusal(500, "internal_server_error", "made up")
                status, answer = node.answer(self.command, self.path, body, self.headers.get("Authorization"))
            except Refusal as refusal:
                status, answer = refusal.status, refusal.body
            except Exception as error:  # a node answers 500 whatever happened inside
                status, answer = 500, {"error": "unknown_error", "reason": repr(error)}
            if isinstance(answer, dict) and answer.get("db_name") in faults.lose:
                answer["doc_count"] -= 1
            said = json.dumps(answer).encode() + b"\n"
            self.send_response_only(status)
            self.send_header("Server", f"CouchDB/{node.version} (a stand-in)")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        do_GET = do_PUT = do_POST = do_DELETE = _any

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


class Server(ThreadingHTTPServer):
    """Listens on loopback."""

    daemon_threads = True
    request_queue_size = 64
    allow_reuse_address = True


def main(arguments: list[str]) -> int:
    """Serve until ended by a signal."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--name", default="couchdb@127.0.0.1")
    parser.add_argument("--version", default="3.5.0")
    parser.add_argument(
        "--exit-on-other-nodes", action="store_true", help="end when _nodes names another node"
    )
    parser.add_argument("--refuse", action="store_true", help="hold the directory, but do not listen")
    parser.add_argument("--lose", action="append", default=[], metavar="DATABASE")
    parser.add_argument("--fail", action="append", default=[], metavar="PATTERN")
    parser.add_argument("--hang", action="append", default=[], metavar="PATTERN")
    parser.add_argument("--stop-after", type=int, metavar="REQUESTS")
    given = parser.parse_args(arguments)
    user, _, password = os.environ.get("FAKE_COUCH_ADMIN", "").partition(":")
    data = Data(given.data_dir, given.name)
    if given.refuse:
        print("ready", flush=True)
        threading.Event().wait()
    faults = Faults(given.fail, given.lose, given.hang, given.stop_after)
    try:
        server = Server((LOOPBACK, given.port), handler(Node(data, (user, password), given.version), faults))
    except OSError as error:
        print(f"cannot listen: {error}", flush=True)
        return 1
    if given.exit_on_other_nodes and data.nodes() != [given.name]:
        threading.Timer(0.5, lambda: os._exit(1)).start()
    print("ready", flush=True)
    server.serve_forever(0.1)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
