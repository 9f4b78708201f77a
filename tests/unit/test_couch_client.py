"""What the client of a node makes of answers that no healthy node gives, from a few lines on a real socket."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from hq_backups.engine.couch import node as node_module
from hq_backups.engine.couch.node import Node, view_to_read
from hq_backups.engine.errors import ServiceError

SECRET = "s3cret-of-couch"
Serve = Callable[[bytes], "Served"]


class Served:
    """An address, and what was asked there."""

    def __init__(self, url: str, asked: list[bytes]) -> None:
        self.url = url
        self.asked = asked

    def node(self, timeout: float = 5) -> Node:
        return Node(self.url, "admin", SECRET, timeout)


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Answer every request on loopback with the same bytes, and close the connection after them."""
    listener = socket.create_server(("127.0.0.1", 0))
    asked: list[bytes] = []
    answer = b""

    def run() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                got = b""
                while b"\r\n\r\n" not in got and (more := connection.recv(65536)):
                    got += more
                asked.append(got)
                connection.sendall(answer)

    threading.Thread(target=run, daemon=True).start()

    def served(bytes_: bytes) -> Served:
        nonlocal answer
        answer = bytes_
        return Served(f"http://127.0.0.1:{listener.getsockname()[1]}", asked)

    yield served
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def http(status: int, body: Any, *headers: str) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(data)}", "Connection: close", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


def raised(ask: Callable[[], object]) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        ask()
    told = f"{caught.value} {caught.value!r} {caught.value.hint} {caught.value.facts}"
    assert SECRET not in told
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize(
    ("status", "words", "hint"),
    [
        (401, "Name or password is incorrect.", "COUCH_PASSWORD"),
        (403, "You are not allowed to access this db.", "server admin"),
        (404, "Database does not exist.", "_all_dbs"),
        (409, "Document update conflict.", "repeat"),
        (412, "precondition", "log"),
        (500, "No DB shards could be opened.", "_membership"),
        (500, "progress not possible", "_membership"),
        (503, "maintenance", "log"),
    ],
)
def test_each_refusal_is_told_with_its_words_and_what_to_do(
    serve: Serve, status: int, words: str, hint: str
) -> None:
    served = serve(http(status, {"error": "e", "reason": words}))
    error = raised(lambda: served.node().counts("db"))
    assert str(status) in error.message
    assert words in error.message
    assert hint in error.hint
    assert (error.facts["status"], error.facts["reason"]) == (status, f"{words} (e)")


@pytest.mark.parametrize("body", [b"", b"<html>proxy</html>", b"[" * 100_000, b'"\xff"', b"nu"])
def test_an_answer_that_is_no_json_is_not_couchdbs(serve: Serve, body: bytes) -> None:
    served = serve(http(200, body))
    assert "no answer of CouchDB" in raised(served.node().databases).message
    assert "couchdb_url" in raised(served.node().version).hint


@pytest.mark.parametrize("body", [[], {}, 5, None, "text", {"rows": 5}, {"doc_count": "5"}])
def test_json_of_another_shape_is_refused_by_every_question(serve: Serve, body: Any) -> None:
    node = serve(http(200, body)).node()
    assert raised(node.version).facts["status"] == 200
    assert raised(lambda: node.counts("db")).facts["status"] == 200
    assert raised(node.shard_docs).facts["status"] == 200
    assert raised(lambda: node.design_docs("db")).facts["status"] == 200
    if not isinstance(body, list):
        assert raised(node.databases).facts["status"] == 200
    if not isinstance(body, dict) or "rows" not in body:
        assert raised(lambda: node.read_view("db", "d", "v")).facts["status"] == 200


def test_a_redirect_is_not_followed_with_the_password(serve: Serve) -> None:
    served = serve(http(302, {}, "Location: http://127.0.0.1:1/elsewhere"))
    assert "302" in raised(served.node().databases).message
    assert len(served.asked) == 1


def test_an_answer_cut_short_is_no_answer(serve: Serve) -> None:
    served = serve(http(200, ["a", "b"])[:-3])
    error = raised(served.node().databases)
    assert "before the whole answer" in error.message
    assert error.facts["status"] == 0


def test_an_answer_without_end_is_given_up(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_module, "MOST_ANSWER", 1000)
    assert "longer than" in raised(serve(http(200, ["x" * 2000])).node().databases).message


def test_nothing_listening_is_refused_and_a_wrong_address_said() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        node = Node(f"http://127.0.0.1:{port}", "admin", SECRET)
        assert "connection refused" in raised(node.databases).message
        assert not node.is_up()
    assert "http://host:port" in raised(Node("couch.example:5984", "admin", SECRET).databases).message


def test_names_are_quoted_whole_and_the_password_sent_as_such(serve: Serve) -> None:
    served = serve(http(200, {"doc_count": 1, "doc_del_count": 2}))
    assert served.node().counts("a/b c+d?é%2F#") == (1, 2)
    assert served.asked[0].startswith(b"GET /a%2Fb%20c%2Bd%3F%C3%A9%252F%23 HTTP")
    assert b"Authorization: Basic " in served.asked[0]


def test_a_document_is_put_under_its_whole_name(serve: Serve) -> None:
    served = serve(http(201, {"ok": True, "rev": "2-x"}))
    assert served.node().put_shard_doc({"_id": "a/b", "_rev": "1-x"}) == "2-x"
    assert served.asked[0].startswith(b"PUT /_node/_local/_dbs/a%2Fb HTTP")


def test_a_user_in_the_address_is_used_and_never_shown(serve: Serve) -> None:
    served = serve(http(401, {"reason": "no"}))
    node = Node(served.url.replace("http://", f"http://admin:{SECRET}%21@"))
    error = raised(node.databases)
    assert "admin" not in error.message
    assert SECRET not in repr(node)
    assert b"Authorization: Basic YWRtaW46czNjcmV0LW9mLWNvdWNoIQ==" in served.asked[0]


@pytest.mark.parametrize("secret", ["a/b", "a:b", "a@b", "a?b#c", "[ab", "1/2"])
@pytest.mark.parametrize("scheme", ["http://", ""])
def test_no_password_is_taken_for_a_part_of_the_address(secret: str, scheme: str) -> None:
    node = Node(f"{scheme}admin:{secret}@couch:5984/")
    assert node.url == f"{scheme}couch:5984"
    assert Node("http://couch:5984/p").url == "http://couch:5984/p"


def test_neither_a_proxy_nor_a_netrc_is_used(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login other password other\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    served = serve(http(200, ["db"]))
    assert Node(served.url).databases() == ["db"]
    assert b"Authorization" not in served.asked[0]


def test_a_node_that_does_not_tell_its_name_is_known_when_it_is_the_only_one(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = serve(http(404, {"reason": "missing"})).node()
    monkeypatch.setattr(node, "membership", lambda: {"all_nodes": ["couchdb@a"], "cluster_nodes": []})
    assert node.name() == "couchdb@a"
    monkeypatch.setattr(
        node, "membership", lambda: {"all_nodes": ["couchdb@a", "couchdb@b"], "cluster_nodes": []}
    )
    assert "one of 2 nodes" in raised(node.name).message


@pytest.mark.parametrize(
    ("ddoc", "view"),
    [
        ({"views": {"by_x": {"map": "…"}, "by_y": {}}}, "by_x"),
        ({"views": {"lib": {}, "by_y": {}}}, "by_y"),
        ({"views": {"lib": {}}}, None),
        ({"views": {}}, None),
        ({"views": []}, None),
        ({"language": "query", "views": {"x": {}}}, None),
        ({"indexes": {"search": {}}}, None),
        ({"validate_doc_update": "…"}, None),
    ],
)
def test_one_view_is_read_of_each_document_that_has_any(ddoc: dict[str, Any], view: str | None) -> None:
    assert view_to_read(ddoc) == view
