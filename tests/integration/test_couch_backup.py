"""Backups of a running CouchDB node, local and in a bucket."""

from __future__ import annotations

import tarfile
from collections.abc import Callable

import pytest

from hq_backups.engine.errors import Exit
from tests.integration.couch_helpers import CouchHost
from tests.testbed.couch import CouchNode
from tests.testbed.couch_data import FIXTURE_NODE, expected

Make = Callable[..., CouchNode]


@pytest.mark.parametrize("moment", ["t0", "t1"])
def test_a_backup_holds_every_file_and_says_what_the_node_said(couch_node: Make, moment: str) -> None:
    host = CouchHost(couch_node(moment))
    done = host.good_backup()
    source = done.manifest["source"]
    assert source["node"] == source["of_node"] == FIXTURE_NODE
    assert source["version"] == "3.5.0"
    assert source["membership"] == {"all_nodes": [FIXTURE_NODE], "cluster_nodes": [FIXTURE_NODE]}
    for db, said in expected(moment).items():
        told = source["databases"][db]
        assert (told["doc_count"], told["doc_del_count"]) == (said["doc_count"], said["doc_del_count"])
        assert told["counted_by_node"] == [said["doc_count"], said["doc_del_count"]]
    assert source["one_moment"]
    assert not done.warnings
    with tarfile.open(host.artifact) as tar:
        names = [m.name for m in tar.getmembers() if m.isreg()]
    assert sorted(n.removeprefix("./") for n in names) == sorted(source["files"])
    assert host.verify().code is Exit.OK
    assert host.verify(deep=True).code is Exit.OK
    assert not host.leftovers()
