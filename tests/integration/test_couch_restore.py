"""Restores of CouchDB: onto a node of another name, and every way to fail."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hq_backups.engine.errors import Exit
from tests.integration.couch_helpers import OTHER, CouchHost, assert_serves
from tests.testbed.couch import CouchNode

Make = Callable[..., CouchNode]


@pytest.mark.parametrize("moment", ["t0", "t1"])
def test_all_of_a_backup_is_served_by_a_node_of_another_name(couch_node: Make, moment: str) -> None:
    source = CouchHost(couch_node(moment))
    source.good_backup()
    target = CouchHost(couch_node(node_name=OTHER))
    done = target.restore(str(source.artifact), new_node=OTHER)
    assert done.code is Exit.OK, done
    assert_serves(target.node, moment)
    assert target.node.membership() == {"all_nodes": [OTHER], "cluster_nodes": [OTHER]}
