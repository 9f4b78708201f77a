"""Restores of CouchDB: onto a node of another name, from every kind of source, and every way to fail."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hq_backups.engine.couch import serving
from hq_backups.engine.errors import Exit
from tests.integration.couch_helpers import OTHER, CouchHost, assert_serves
from tests.integration.pg_helpers import tree
from tests.testbed.couch import CouchNode
from tests.testbed.couch_data import FIXTURE_NODE, expected, make_data_dir
from tests.testbed.couch_writer import CouchAppender
from tests.testbed.epmd import epmd

Make = Callable[..., CouchNode]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out sync(2): it waits for whatever else this machine writes."""
    monkeypatch.setattr("os.sync", lambda: None)


@pytest.fixture(autouse=True)
def no_epmd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask a port where nobody listens, whatever else runs on this machine."""
    monkeypatch.setenv("ERL_EPMD_PORT", "9")


def backed(couch_node: Make, moment: str = "t0") -> str:
    """Make a backup of the fixtures' node, and stop that node; return the path."""
    node = couch_node(moment)
    host = CouchHost(node)
    host.good_backup()
    node.stop()
    return str(host.artifact)


def fresh(couch_node: Make, name: str = OTHER) -> CouchHost:
    """Return the host of a node that has nothing yet."""
    return CouchHost(couch_node(node_name=name))


@pytest.mark.parametrize("moment", ["t0", "t1"])
def test_all_of_a_backup_is_served_by_a_node_of_another_name(couch_node: Make, moment: str) -> None:
    artifact = backed(couch_node, moment)
    target = fresh(couch_node)
    done = target.restore(artifact, new_node=OTHER)
    assert done.code is Exit.OK, done
    assert_serves(target.node, moment)
    assert target.node.membership() == {"all_nodes": [OTHER], "cluster_nodes": [OTHER]}
    steps = next(data["next_steps"] for data in done.of("data"))
    assert any("check_services" in step for step in steps)
    # It survives a restart, and nothing of the old node is left in what lies there.
    target.couch.stop()
    target.couch.start()
    assert_serves(target.node, moment)
    assert all(list(doc["by_node"]) == [OTHER] for doc in target.node.shard_docs().values())


def test_the_same_node_gets_its_own_data_back_and_undo_takes_that_back(couch_node: Make) -> None:
    host = CouchHost(couch_node("t0"))
    host.good_backup()
    host.couch.stop()
    shutil.rmtree(host.data)
    later = CouchHost(host.couch)
    from tests.testbed.couch_data import unpack_fixture

    unpack_fixture("t1", later.data, later.couch.os_user)
    later.couch.start()
    assert_serves(later.node, "t1")
    assert later.restore().code is Exit.OK
    assert_serves(later.node, "t0")
    assert later.undo().code is Exit.OK
    assert_serves(later.node, "t1")


def test_the_plan_changes_nothing_and_tells_of_both_nodes(couch_node: Make) -> None:
    artifact = backed(couch_node)
    target = fresh(couch_node)
    before = tree(target.data)
    done = target.restore(artifact, plan_only=True)
    assert done.code is Exit.OK, done
    (plan,) = done.of("plan")
    assert plan["facts"]["from_nodes"] == [FIXTURE_NODE]
    assert plan["facts"]["new_node"] == OTHER
    assert plan["facts"]["databases"] == len(expected("t0"))
    assert tree(target.data) == before
    assert target.beside() == ["data"]


def test_a_target_directory_gets_the_files_and_no_list_of_nodes(couch_node: Make, tmp_path: Path) -> None:
    artifact = backed(couch_node)
    target = fresh(couch_node)
    place = target.couch.workdir / "copy"
    done = target.restore(artifact, target_dir=place)
    assert done.code is Exit.OK, done
    assert not (place / "_nodes.couch").exists()
    assert (place / ".shards").is_dir()
    assert any("/_node/_local/_dbs/" in text for text in done.of("plan")[0]["facts"]["left_to_do"])


# What is refused before anything is touched


def assert_refused(target: CouchHost, artifact: str, words: str, **request: object) -> None:
    before, serving_ = tree(target.data), target.couch.serving
    done = target.restore(artifact, **request)
    assert done.code is Exit.PREFLIGHT, done
    assert words in done.error
    assert tree(target.data) == before
    assert target.couch.serving == serving_
    assert target.beside() == ["data"]


def test_a_machine_that_also_runs_the_source_node_is_refused(
    couch_node: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = backed(couch_node)
    target = fresh(couch_node, "restored@127.0.0.1")
    with epmd("restored", "couchdb") as port:
        monkeypatch.setenv("ERL_EPMD_PORT", str(port))
        assert_refused(target, artifact, "could join it")
    with epmd("restored") as port:
        monkeypatch.setenv("ERL_EPMD_PORT", str(port))
        assert target.restore(artifact, plan_only=True).code is Exit.OK


def test_the_name_that_only_this_node_has_on_its_host_is_no_other_node(
    couch_node: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = backed(couch_node)
    target = fresh(couch_node, "couchdb@10.9.9.9")
    with epmd("couchdb") as port:
        monkeypatch.setenv("ERL_EPMD_PORT", str(port))
        assert target.restore(artifact, plan_only=True).code is Exit.OK


def test_a_member_of_a_cluster_is_refused_running_or_not(couch_node: Make) -> None:
    artifact = backed(couch_node)
    target = CouchHost(couch_node("t0", node_name=OTHER))
    assert_refused(target, artifact, "is in a cluster with")
    # A list of two nodes, on a node that is down.
    target.couch.stop()
    with CouchAppender(target.data / "_nodes.couch") as nodes:
        nodes.put({"_id": OTHER})
        nodes.commit()
    assert_refused(target, artifact, "is in a cluster with")


def test_an_older_couchdb_is_refused(couch_node: Make) -> None:
    artifact = backed(couch_node)
    target = CouchHost(couch_node(node_name=OTHER, options=("--version", "2.3.1")))
    assert_refused(target, artifact, "cannot read its files")


def test_a_wrong_password_is_found_out_while_nothing_is_touched(couch_node: Make) -> None:
    artifact = backed(couch_node)
    target = fresh(couch_node).but(options={"password": "wrong"})
    assert_refused(target, artifact, "COUCH_PASSWORD")


def test_an_unknown_way_to_stop_the_node_is_refused(
    couch_node: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        "hq_backups.engine.couch.service.find_couch_service.__kwdefaults__",
        {"stop_command": None, "start_command": None, "systemd": tmp_path / "none"},
    )
    artifact = backed(couch_node)
    target = fresh(couch_node).but(store={"stop_command": None, "start_command": None})
    assert_refused(target, artifact, "couchdb_stop_command")


# What goes wrong after the old data were set aside


def own_data(couch_node: Make, *options: str) -> CouchHost:
    """Return a node with one database of its own, told to fail in some way."""
    host = CouchHost(couch_node(start=False, node_name=OTHER, options=options))
    make_data_dir(host.data, {"mine": [{"_id": "kept"}]}, nodes=[OTHER], os_user=host.couch.os_user)
    host.couch.start()
    return host


def assert_rolled_back(host: CouchHost, done: object) -> None:
    assert getattr(done, "code", None) is Exit.RESTORE_ROLLED_BACK, done
    assert "mine" in host.node.databases()
    assert host.node.counts("mine") == (1, 0)
    assert [p for p in host.beside() if ".failed-" in p]


def test_another_name_than_the_one_wanted_is_rolled_back(couch_node: Make) -> None:
    artifact, host = backed(couch_node), own_data(couch_node)
    done = host.restore(artifact, new_node="couchdb@elsewhere")
    assert_rolled_back(host, done)
    assert "not couchdb@elsewhere" in done.error


@pytest.mark.parametrize("path", ["^/commcarehq__apps($|[?])", "_dbs/commcarehq$", "_view", "_design_docs"])
def test_a_node_that_answers_an_error_is_rolled_back(
    couch_node: Make, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "OPEN_SECONDS", 0.5)
    artifact, host = backed(couch_node), own_data(couch_node, "--fail", path)
    assert_rolled_back(host, host.restore(artifact))


def test_a_node_that_never_answers_is_rolled_back(couch_node: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "ANSWER_SECONDS", 0.5)
    artifact, host = backed(couch_node), own_data(couch_node)
    lost = host.but(options={"url": "http://127.0.0.1:9"})
    done = lost.restore(artifact)
    assert_rolled_back(host, done)


def test_documents_that_are_not_served_are_noticed_and_rolled_back(
    couch_node: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, host = backed(couch_node), own_data(couch_node)
    adopt = serving.adopt

    def lose(node: object, name: str, events: object) -> None:
        # A missing file is made anew by the node, empty, without a word.
        next(host.data.glob("shards/*/commcarehq.*.couch")).unlink()
        adopt(node, name, events)  # type: ignore[arg-type]

    monkeypatch.setattr(serving, "adopt", lose)
    done = host.restore(artifact)
    assert_rolled_back(host, done)
    assert "were in the backup" in done.error


def test_a_damaged_archive_leaves_everything_as_it_is(couch_node: Make) -> None:
    artifact, host = backed(couch_node), own_data(couch_node)
    raw = bytearray(Path(artifact).read_bytes())
    raw[len(raw) // 2] ^= 0x20
    Path(artifact).write_bytes(raw)
    before = host.couch.serving
    done = host.restore(artifact)
    assert done.code is Exit.BAD_BACKUP, done
    assert host.couch.serving == before
    assert host.beside() == ["data"]
