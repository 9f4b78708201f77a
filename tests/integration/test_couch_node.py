"""The stand-in for a node, and a real one where it is named, show what a real node was seen to do."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests

from hq_backups.engine.couch.node import Node, view_to_read
from hq_backups.engine.couch.shardmaps import renamed
from hq_backups.engine.errors import ServiceError
from tests.testbed.couch import CouchNode
from tests.testbed.couch_data import FIXTURE_NODE, expected, give_tree, make_data_dir
from tests.testbed.process import alive

OTHER = "couchdb@restored.example"
Make = Callable[..., CouchNode]


def digest(docs: list[dict[str, Any]]) -> str:
    """Return a digest as the fixtures' were made: of the documents' JSON in the order of their ids."""
    ordered = sorted(docs, key=lambda doc: doc["_id"])
    return hashlib.sha256("".join(json.dumps(doc, sort_keys=True) for doc in ordered).encode()).hexdigest()[
        :16
    ]


def status_of(error: pytest.ExceptionInfo[ServiceError]) -> int:
    return int(error.value.facts["status"])


def told(node: Node, moment: str) -> dict[str, dict[str, Any]]:
    """Return what a node says of each database of a moment, in the fixtures' form."""
    made = {}
    for db in expected(moment):
        docs = node.read_docs(db, limit=1000)
        present, gone = node.counts(db)
        made[db] = {"rows": len(docs), "doc_count": present, "doc_del_count": gone, "digest": digest(docs)}
    return made


@pytest.mark.parametrize("moment", ["t0", "t1"])
def test_all_that_the_real_node_said_is_said_again(couch_node: Make, moment: str) -> None:
    node = couch_node(moment).node()
    assert node.version().startswith("3.")
    assert node.name() == FIXTURE_NODE
    assert sorted(node.databases()) == sorted(expected(moment))
    assert told(node, moment) == expected(moment)


def test_shard_maps_are_those_that_the_real_node_gave(couch_node: Make, data_dir: Path) -> None:
    assert couch_node("t0").node().shard_docs() == json.loads((data_dir / "dbs-docs.json").read_text())


def test_under_another_name_it_is_up_and_lists_all_but_opens_nothing(couch_node: Make) -> None:
    node = couch_node("t0", node_name=OTHER).node()
    assert node.is_up()
    assert sorted(node.databases()) == sorted(expected("t0"))
    for db in expected("t0"):
        with pytest.raises(ServiceError, match="No DB shards could be opened") as error:
            node.counts(db)
        assert status_of(error) == 500
        assert "_membership" in error.value.hint


def test_renamed_maps_open_every_database_at_once_and_after_a_restart(couch_node: Make) -> None:
    service = couch_node("t0", node_name=OTHER)
    node = service.node()
    for doc in node.shard_docs().values():
        node.put_shard_doc(renamed(doc, OTHER))
    assert told(node, "t0") == expected("t0")
    service.kill()
    service.start()
    assert told(service.node(), "t0") == expected("t0")
    assert all(list(doc["by_node"]) == [OTHER] for doc in service.node().shard_docs().values())


def test_a_map_without_its_revision_or_with_an_old_one_is_refused(couch_node: Make) -> None:
    node = couch_node("t0", node_name=OTHER).node()
    doc = renamed(node.shard_docs()["commcarehq"], OTHER)
    with pytest.raises(ServiceError) as error:
        node.put_shard_doc({key: value for key, value in doc.items() if key != "_rev"})
    assert status_of(error) == 409
    assert node.put_shard_doc(doc).startswith("2-")
    with pytest.raises(ServiceError) as error:
        node.put_shard_doc(doc)
    assert status_of(error) == 409


def test_a_map_that_disagrees_with_itself_is_refused(couch_node: Make) -> None:
    node = couch_node("t0").node()
    doc = node.shard_docs()["commcarehq"]
    with pytest.raises(ServiceError) as error:
        node.put_shard_doc(doc | {"by_node": {OTHER: list(doc["by_range"])}})
    assert status_of(error) == 403


def test_a_map_to_nobody_is_taken_and_a_dropped_range_loses_its_documents(couch_node: Make) -> None:
    node = couch_node("t0").node()
    node.put_shard_doc(renamed(node.shard_docs()["commcarehq__apps"], "couchdb@nowhere"))
    with pytest.raises(ServiceError, match="No DB shards"):
        node.counts("commcarehq__apps")
    doc = node.shard_docs()["commcarehq"]
    lost = sorted(doc["by_range"])[0]
    doc["by_range"].pop(lost)
    doc["by_node"][FIXTURE_NODE].remove(lost)
    node.put_shard_doc(doc)
    assert node.counts("commcarehq")[0] < expected("t0")["commcarehq"]["doc_count"]


def test_a_missing_shard_file_is_made_again_empty(couch_node: Make) -> None:
    service = couch_node("t0", start=False)
    gone = next(service.data_dir.glob("shards/*/commcarehq.1*.couch"))
    gone.unlink()
    service.start()
    assert service.node().counts("commcarehq")[0] < expected("t0")["commcarehq"]["doc_count"]
    assert gone.exists()


def test_a_file_cut_before_its_first_header_is_an_empty_database(couch_node: Make) -> None:
    service = couch_node("t0", start=False)
    for path in service.data_dir.glob("shards/*/commcarehq.1*.couch"):
        path.write_bytes(path.read_bytes()[:20])
    service.start()
    assert service.node().counts("commcarehq") == (0, 0)


def test_half_a_compaction_is_taken_for_the_database_that_is_missing(couch_node: Make) -> None:
    service = couch_node("t0", start=False)
    for path in service.data_dir.glob("shards/*/commcarehq.1*.couch"):
        path.rename(path.with_name(path.name + ".compact"))
        path = path.with_name(path.name + ".compact")
        path.write_bytes(path.read_bytes()[:20_000])
    service.start()
    assert service.node().counts("commcarehq")[0] < expected("t0")["commcarehq"]["doc_count"]
    assert not list(service.data_dir.glob("shards/*/*.compact"))


def test_what_clients_write_is_there_after_a_kill_and_a_compaction(couch_node: Make) -> None:
    service = couch_node("t0")

    def ask(method: str, path: str, **more: Any) -> dict[str, Any]:
        answer = requests.request(
            method, f"{service.url}/{path}", auth=(service.username, service.password), timeout=20, **more
        )
        answer.raise_for_status()
        told: dict[str, Any] = answer.json()
        return told

    ask("PUT", "made%2Fnow?q=4")
    revs = [ask("PUT", f"made%2Fnow/doc{n}", json={"n": n})["rev"] for n in range(12)]
    ask("PUT", "made%2Fnow/doc0", json={"n": "again", "_rev": revs[0]})
    ask("DELETE", f"made%2Fnow/doc1?rev={revs[1]}")
    with pytest.raises(requests.HTTPError, match="409"):
        ask("PUT", "made%2Fnow/doc2", json={"n": "late"})
    service.kill()
    service.start()
    assert service.node().counts("made/now") == (11, 1)
    before = service.node().read_docs("made/now")
    ask("POST", "made%2Fnow/_compact", json={})
    assert service.node().read_docs("made/now") == before
    assert ask("GET", "made%2Fnow/doc0")["n"] == "again"
    assert len(list(service.data_dir.glob("shards/*/made/now.*.couch"))) == 4


def test_a_database_of_which_a_part_is_elsewhere_is_not_counted_in_part(
    couch_node: Make,
) -> None:
    service = couch_node(start=False)
    docs = [{"_id": f"{n}"} for n in range(20)]
    make_data_dir(service.data_dir, {"db": docs}, nodes=[FIXTURE_NODE, OTHER], os_user=service.os_user)
    service.start()
    with pytest.raises(ServiceError) as error:
        service.node(timeout=5).counts("db")
    assert status_of(error) in (0, 500)


def test_two_nodes_become_one_by_their_files_together(couch_node: Make) -> None:
    service = couch_node(start=False, node_name=OTHER)
    docs = [{"_id": f"{n}", "n": n} for n in range(50)]
    pair = ["couchdb@one", "couchdb@two"]
    make_data_dir(service.data_dir, {"db": docs}, q=4, nodes=pair, os_user=service.os_user)
    make_data_dir(service.workdir / "two", {"db": docs}, q=4, nodes=pair, node=pair[1])
    shutil.copytree(service.workdir / "two" / "shards", service.data_dir / "shards", dirs_exist_ok=True)
    (service.data_dir / "_nodes.couch").unlink()
    give_tree(service.data_dir, service.os_user)
    service.start()
    node = service.node()
    for doc in node.shard_docs().values():
        node.put_shard_doc(renamed(doc, OTHER))
    assert node.counts("db") == (50, 0)
    assert sorted(int(doc["n"]) for doc in node.read_docs("db")) == list(range(50))


def test_nobody_and_a_wrong_password_get_in_nowhere(couch_node: Make) -> None:
    service = couch_node("t0")
    for node in (Node(service.url), Node(service.url, "admin", "wrong-secret")):
        for ask in (node.databases, node.shard_docs, node.name, lambda node=node: node.counts("commcarehq")):
            with pytest.raises(ServiceError) as error:
                ask()
            assert status_of(error) == 401
            assert "COUCH_PASSWORD" in error.value.hint
            assert "wrong-secret" not in f"{error.value!r} {error.value.hint} {error.value.facts}"


def test_users_of_the_data_can_log_in_only_once_their_database_is_mapped(couch_node: Make) -> None:
    service = couch_node("t0", node_name=OTHER)
    session = f"{service.url}/_session"
    assert requests.get(session, auth=("hq", "pass"), timeout=20).status_code == 401
    node = service.node()
    node.put_shard_doc(renamed(node.shard_docs()["_users"], OTHER))
    assert requests.get(session, auth=("hq", "pass"), timeout=20).status_code == 200
    assert requests.get(session, auth=("hq", "wrong"), timeout=20).status_code == 401


def test_a_nodes_list_left_out_names_the_node_alone(couch_node: Make) -> None:
    service = couch_node("t0", node_name=OTHER, start=False)
    (service.data_dir / "_nodes.couch").unlink()
    service.start()
    assert service.node().membership() == {"all_nodes": [OTHER], "cluster_nodes": [OTHER]}


def test_every_design_documents_view_can_be_read(couch_node: Make) -> None:
    node = couch_node("t0").node()
    read = {}
    for db in node.databases():
        for doc in node.design_docs(db):
            view = view_to_read(doc)
            if view:
                read[db, doc["_id"]] = node.read_view(db, doc["_id"], view)
    assert read
    assert all(read.values())
    with pytest.raises(ServiceError) as error:
        node.read_view("commcarehq", "_design/none", "none")
    assert status_of(error) == 404


def test_names_with_slashes_and_signs_are_asked_for_whole(couch_node: Make, tmp_path: Path) -> None:
    names = ["my-db-two", "a/b", "a/b/c-d", "plus+dollar$(x)", "a" * 200]
    databases = {name: [{"_id": f"doc {n}/ü", "n": n} for n in range(len(name))] for name in names}
    service = couch_node(start=False)
    make_data_dir(service.data_dir, databases, q=4, os_user=service.os_user)
    service.start()
    assert {name: service.node().counts(name) for name in names} == {name: (len(name), 0) for name in names}


def test_a_database_without_a_map_is_not_found(couch_node: Make) -> None:
    with pytest.raises(ServiceError) as error:
        couch_node("t0").node().counts("no/such")
    assert status_of(error) == 404


def test_a_node_works_in_its_data_directory_as_its_own_user(couch_node: Make) -> None:
    service = couch_node("t0")
    assert service.pid is not None
    assert alive(service.pid)
    opened = [path.resolve() for path in Path(f"/proc/{service.pid}/fd").iterdir()]
    assert any(path.is_relative_to(service.data_dir) for path in opened)
    if service.os_user:
        assert Path(f"/proc/{service.pid}").owner() == service.os_user


def test_commands_stop_and_start_it_from_anywhere(couch_node: Make) -> None:
    service = couch_node("t0")
    stop, start = service.commands()
    first = service.serving
    subprocess.run(stop, check=True, cwd="/", env={})
    assert service.serving is None
    assert not service.node(timeout=1).is_up()
    subprocess.run(stop, check=True, cwd="/", env={})
    subprocess.run(start, check=True, cwd="/", env={})
    subprocess.run(start, check=True, cwd="/", env={})
    second = service.serving
    assert second not in (None, first)
    assert service.node().counts("commcarehq") == (338, 14)
    if service.os_user:
        assert Path(f"/proc/{second}").owner() == service.os_user
    service.stop()
    assert service.serving is None
    assert not service.node(timeout=1).is_up()


# Told to fail: the stand-in only.


def test_a_node_that_does_not_listen_is_refused_and_said(couch_node: Make) -> None:
    service = couch_node("t0", options=("--refuse",))
    assert not service.node().is_up()
    with pytest.raises(ServiceError, match="connection refused") as error:
        service.node().databases()
    assert status_of(error) == 0
    assert service.url in error.value.hint


def test_a_node_that_does_not_answer_is_given_up(couch_node: Make) -> None:
    service = couch_node("t0", options=("--hang", "/commcarehq$"))
    with pytest.raises(ServiceError, match="no answer in time"):
        service.node(timeout=0.3).counts("commcarehq")
    assert service.node().counts("commcarehq__apps") == (52, 0)


def test_a_node_that_fails_on_one_path_says_so(couch_node: Make) -> None:
    service = couch_node("t0", options=("--fail", "/commcarehq__apps"))
    with pytest.raises(ServiceError, match="made up") as error:
        service.node().counts("commcarehq__apps")
    assert status_of(error) == 500


def test_a_node_that_stops_answering_midway_is_given_up(couch_node: Make) -> None:
    service = couch_node("t0", options=("--stop-after", "2"))
    node = service.node(timeout=0.3)
    assert node.is_up()
    assert node.databases()
    with pytest.raises(ServiceError, match="no answer in time"):
        node.databases()


def test_a_node_told_so_ends_when_its_nodes_list_names_another(couch_node: Make) -> None:
    service = couch_node("t0", node_name=OTHER, options=("--exit-on-other-nodes",))
    assert service._process is not None
    assert service._process.wait(10) == 1


@pytest.fixture
def data_dir() -> Path:
    """Return where the real node's own answers lie."""
    return Path(__file__).parents[1] / "data" / "couchdb"
