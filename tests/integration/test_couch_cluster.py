"""Backups of a cluster's nodes, each with its part, restored as one node; and names that trip others up."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from hq_backups.engine.errors import Exit
from tests.integration.couch_helpers import OTHER, CouchHost
from tests.testbed.couch import CouchNode
from tests.testbed.couch_data import make_data_dir
from tests.testbed.couch_writer import CouchAppender

Make = Callable[..., CouchNode]
NODES = ("couchdb@10.0.0.1", "couchdb@10.0.0.2", "couchdb@10.0.0.3")
ODD = {
    "my-db-two": "hyphens",
    "a/b": "slash",
    "a/b/c$+(d)": "what CouchDB allows",
    "dätä-ベース": "more than it allows",
    "x": "one letter",
    "d" + "0123456789" * 20: "long",
}


def docs(count: int, prefix: str = "d") -> list[dict[str, Any]]:
    return [{"_id": f"{prefix}-{n}", "n": n} for n in range(count)]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out sync(2), and ask no mapper of ports of this machine."""
    monkeypatch.setattr("os.sync", lambda: None)
    monkeypatch.setenv("ERL_EPMD_PORT", "9")


def member(couch_node: Make, name: str, n: int = 1, q: int = 4, more: int = 0) -> str:
    """Make one node's part of a cluster and its backup; return the path."""
    # Without a node that answers: the stand-in serves no cluster. Whose part it is shows by its files.
    host = CouchHost(couch_node(start=False, node_name=name))
    make_data_dir(
        host.data,
        {"one": docs(40), "two/part": docs(9)},
        q=q,
        n=n,
        nodes=NODES[: 3 if q > 2 else 2],
        node=name,
        os_user=host.couch.os_user,
    )
    if more:
        shard = next(host.data.glob("shards/00000000-*/one.*.couch"))
        view = (
            host.data
            / ".shards"
            / shard.parent.name
            / f"{shard.name.removesuffix('.couch')}_design/mrview/v.view"
        )
        view.parent.mkdir(parents=True)
        view.write_bytes(b"the views of the copy with more changes")
        with CouchAppender(shard) as appender:
            for number in range(more):
                appender.put({"_id": f"more-{number}"})
            appender.commit()
    done = host.good_backup()
    assert "node-silent" in done.warnings
    assert done.manifest["source"]["of_node"] in (name, None)
    return str(host.artifact)


def test_three_nodes_become_one(couch_node: Make) -> None:
    first, *others = [member(couch_node, name) for name in NODES]
    target = CouchHost(couch_node(node_name=OTHER))
    done = target.restore(first, also=tuple(others))
    assert done.code is Exit.OK, done
    assert sorted(target.node.databases()) == ["_replicator", "_users", "one", "two/part"]
    assert target.node.counts("one") == (40, 0)
    assert target.node.counts("two/part") == (9, 0)
    assert target.node.membership()["cluster_nodes"] == [OTHER]
    assert not list(target.data.glob(".part-*"))
    (plan,) = done.of("plan")
    assert len(plan["facts"]["of_backups"]) == 3


def test_one_node_s_part_alone_is_refused_with_the_others_names(couch_node: Make) -> None:
    artifact = member(couch_node, NODES[1])
    target = CouchHost(couch_node(node_name=OTHER))
    done = target.restore(artifact)
    assert done.code is Exit.PREFLIGHT
    assert NODES[0] in done.error
    assert NODES[2] in done.error
    assert "--also" in done.error
    assert target.beside() == ["data"]


def test_parts_that_lack_a_range_together_are_refused(couch_node: Make) -> None:
    first, second = member(couch_node, NODES[0]), member(couch_node, NODES[1])
    target = CouchHost(couch_node(node_name=OTHER))
    done = target.restore(first, also=(second,))
    assert done.code is Exit.BAD_BACKUP, done
    assert "range" in done.error
    assert NODES[2] in done.error


def test_of_two_copies_of_a_shard_the_one_with_more_changes_is_kept_with_its_views(couch_node: Make) -> None:
    less, more = member(couch_node, NODES[0], n=2, q=2), member(couch_node, NODES[1], n=2, q=2, more=5)
    for first, second in ((less, more), (more, less)):
        target = CouchHost(couch_node(node_name=OTHER))
        done = target.restore(first, also=(second,))
        assert done.code is Exit.OK, done
        assert target.node.counts("one") == (45, 0)
        (view,) = target.data.glob(".shards/*/one.*_design/mrview/*.view")
        assert view.read_bytes() == b"the views of the copy with more changes"
        target.couch.stop()


def test_the_same_backup_twice_is_a_usage_error(couch_node: Make) -> None:
    artifact = member(couch_node, NODES[0])
    target = CouchHost(couch_node(node_name=OTHER))
    assert target.restore(artifact, also=(artifact,)).code is Exit.USAGE


def test_databases_with_odd_names_come_back(couch_node: Make) -> None:
    source = CouchHost(couch_node(start=False))
    make_data_dir(
        source.data, {name: docs(3, why) for name, why in ODD.items()}, os_user=source.couch.os_user
    )
    source.couch.start()
    source.good_backup()
    target = CouchHost(couch_node(node_name=OTHER))
    done = target.restore(str(source.artifact))
    assert done.code is Exit.OK, done
    for name in ODD:
        assert target.node.counts(name) == (3, 0), name
        assert target.node.read_docs(name) == source.node.read_docs(name)


def test_a_manifest_cannot_name_parts_of_its_own(couch_node: Make) -> None:
    source = CouchHost(couch_node("t0"))
    manifest = source.good_backup().manifest
    parts = [{"manifest": manifest, "location": {"kind": "local", "path": "/etc/hostname"}}]
    changed = {**manifest, "source": {**manifest["source"], "parts": parts}}
    path = source.backups / f".{source.artifact.name}.json"
    path.write_text(json.dumps(changed))
    target = CouchHost(couch_node(node_name=OTHER))
    for also in ((), (str(source.artifact),)):
        done = target.restore(str(source.artifact), also=also)
        assert done.code in (Exit.BAD_BACKUP, Exit.USAGE), done
    assert "speaks of parts" in target.restore(str(source.artifact)).error
    assert target.beside() == ["data"]
