"""Elasticsearch by command, on real nodes: what is lost comes back as it was."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import date

import pytest

from hq_backups.models import Artifact, BackupRun
from tests.integration.es_helpers import REPOSITORY, Host, contents, fill, host_of
from tests.testbed.elasticsearch import ElasticsearchNode

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(
    params=[
        pytest.param("es6", marks=pytest.mark.elasticsearch6),
        pytest.param("es7", marks=pytest.mark.elasticsearch7),
    ]
)
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    node: ElasticsearchNode = request.getfixturevalue(request.param)
    with host_of(node) as made:
        fill(node)
        yield made


def test_every_index_that_was_deleted_comes_back_as_it_was(host: Host) -> None:
    before = contents(host.node)

    host.good("run_backup", "elasticsearch", "--type", "daily")
    today = date.today()
    (entry,) = host.entries()
    assert entry["name"] == f"{REPOSITORY}_{today.year}_{today.month}_{today.day}"
    assert (entry["managed"], entry["mode"], entry["type"]) == (True, "snapshot", "daily")

    for index in host.node.indices():
        host.node.request("DELETE", f"/{index}")
    ended = host.restore("latest")

    assert ended.code == 0, ended.text
    assert "ptop_preindex" in ended.out
    assert contents(host.node) == before


def test_what_is_live_is_replaced_after_it_was_saved_and_can_be_had_again(host: Host) -> None:
    before = contents(host.node)
    host.good("run_backup", "elasticsearch")
    host.node.bulk("forms", {"late": {"name": "written after the backup"}})
    host.node.request("DELETE", "/cases")
    later = contents(host.node)

    ended = host.restore("latest")
    assert ended.code == 0, ended.text
    assert contents(host.node) == before
    assert [e for e in host.entries() if "before_restore" in e["name"]]

    ended = host.restore("--undo")
    assert ended.code == 0, ended.text
    assert contents(host.node) == later


def test_only_the_indices_that_are_named_are_restored(host: Host) -> None:
    host.good("run_backup", "elasticsearch")
    host.node.bulk("forms", {"late": {"name": "late"}})
    host.node.bulk("cases", {"late": {"name": "late"}})

    ended = host.restore("latest", "--indices", "forms")

    assert ended.code == 0, ended.text
    assert "late" not in host.node.documents("forms")
    assert "late" in host.node.documents("cases")
    wrong = host.restore("latest", "--indices", "froms")
    assert wrong.code == 2
    assert "does not hold froms" in wrong.err


def test_a_restore_under_other_names_leaves_everything_live_alone(host: Host) -> None:
    before = contents(host.node)
    host.good("run_backup", "elasticsearch")

    ended = host.restore("latest", "--rename-prefix", "old-")

    assert ended.code == 0, ended.text
    after = contents(host.node)
    assert {name: after[name] for name in before} == before
    assert after["old-forms"]["documents"] == before["forms"]["documents"]
    assert after["old-forms"]["aliases"] == {}
    again = host.restore("latest", "--rename-prefix", "old-")
    assert again.code == 5
    assert "is there already" in again.err


def test_a_snapshot_is_proven_by_its_metadata_and_by_a_drill_that_leaves_nothing(host: Host) -> None:
    host.good("run_backup", "elasticsearch")
    before = contents(host.node)

    shallow = host.good("verify_backup", "latest", "--store", "elasticsearch")
    assert "all metadata can be read" in shallow.out
    name = host.entries()[-1]["name"]
    deep = host.good("verify_backup", name, "--deep")

    assert deep.out.count("30 documents") == 2
    assert "90 documents" in deep.out, "nested documents are counted as Lucene counts them"
    assert contents(host.node) == before
    assert host.entries()[-1]["verified_at"]


def test_the_history_shows_a_snapshot(host: Host) -> None:
    host.good("run_backup", "elasticsearch", "--type", "daily")
    row = BackupRun.objects.get(store="elasticsearch")
    assert (row.verb, row.status, row.mode, row.exit_code) == ("backup", "ok", "snapshot", 0)
    kept = Artifact.objects.get(store="elasticsearch")
    assert kept.name == row.artifact
    assert kept.manifest["source"]["indices"]["cases"]["documents"] == 90
    assert json.dumps(kept.locations).count(REPOSITORY)


def test_a_dry_run_takes_and_registers_nothing(host: Host) -> None:
    ended = host.good("run_backup", "elasticsearch", "--dry-run")
    assert "would take snapshot" in ended.out
    assert host.node.request("GET", "/_snapshot") == {}
    plan = host.run("restore_backup", "elasticsearch", "latest", "--dry-run")
    assert plan.code == 3
