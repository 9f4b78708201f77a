"""Rules that a real server taught (docs/elasticsearch.rst), each shown where it would bite."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hq_backups.engine.elasticsearch import room
from hq_backups.engine.elasticsearch.client import Cluster
from hq_backups.engine.events import utc_now
from hq_backups.engine.snapshots import backup
from tests.integration.es_helpers import REPOSITORY, Ended, Host, contents, fill, host_of, own_node
from tests.testbed.elasticsearch import ElasticsearchNode
from tests.testbed.process import give

pytestmark = pytest.mark.django_db(transaction=True)
SIX = pytest.param("es6", marks=pytest.mark.elasticsearch6)
SEVEN = pytest.param("es7", marks=pytest.mark.elasticsearch7)
SEVEN_TOO = pytest.param("es7", marks=[pytest.mark.elasticsearch7, pytest.mark.slow])


@pytest.fixture(params=[SIX, SEVEN_TOO])
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    node: ElasticsearchNode = request.getfixturevalue(request.param)
    with host_of(node) as made:
        fill(node, documents=6)
        yield made


either = pytest.mark.parametrize("host", [SIX, SEVEN], indirect=True)


Sent = list[tuple[str, str, Any]]


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    """Return what is sent to the server, as it goes on."""
    real, seen = Cluster._send, []

    def send(self: Cluster, method: str, url: str, body: Any, seconds: float) -> Any:
        seen.append((method, url.partition("://")[2].partition("/")[2], body))
        return real(self, method, url, body, seconds)

    monkeypatch.setattr(Cluster, "_send", send)
    return seen


def watched(monkeypatch: pytest.MonkeyPatch, do: Callable[[int], None]) -> None:
    """Do something right before the run asks for the n-th time how its snapshot is."""
    real, count = Cluster._send, 0

    def send(self: Cluster, method: str, url: str, body: Any, seconds: float) -> Any:
        nonlocal count
        if method == "GET" and f"/{REPOSITORY}/{REPOSITORY}_" in url and "_status" not in url:
            count += 1
            do(count)
        return real(self, method, url, body, seconds)

    monkeypatch.setattr(Cluster, "_send", send)


def throttle(host: Host, rate: str) -> None:
    """Register the repository as wanted, only slow."""
    settings = {"location": host.settings["es_repository_location"], "max_snapshot_bytes_per_sec": rate}
    host.node.request("PUT", f"/_snapshot/{REPOSITORY}", {"type": "fs", "settings": settings})


def state_of(host: Host, name: str) -> str:
    (found,) = host.node.request("GET", f"/_snapshot/{REPOSITORY}/{name}")["snapshots"]
    return str(found["state"])


def shards_of_the_repository(host: Host) -> list[Path]:
    found = sorted(host.repository.glob("indices/*/0"))
    assert found
    return found


class TestWhatIsAccepted:
    @either
    def test_a_partial_snapshot_is_no_backup_whatever_its_status_says(self, host: Host) -> None:
        host.good("run_backup", "elasticsearch")
        (good,) = (e["name"] for e in host.entries())
        host.node.bulk("cases", {"later": {"name": "later", "parts": []}})
        # Shards of one index cannot be written any more.
        shut = shards_of_the_repository(host)
        for path in shut:
            give(path, "root")
            path.chmod(0o555)
        ended = host.run("run_backup", "elasticsearch")
        for path in shut:
            path.chmod(0o755)
            give(path, host.node.os_user)
        assert ended.code == 1, ended.text
        assert "is not whole: its state is PARTIAL" in ended.err
        assert "chown -R elasticsearch" in ended.err
        assert [e["name"] for e in host.entries()] == [good]
        assert not list(host.records.glob(".*.note.json"))
        host.good("run_backup", "elasticsearch")

    @either
    def test_what_a_failed_snapshot_left_does_not_keep_its_name(
        self, host: Host, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        host.good("run_backup", "elasticsearch")
        (good,) = (e["name"] for e in host.entries())
        host.node.bulk("cases", {"later": {"name": "later", "parts": []}})
        now = utc_now()
        monkeypatch.setattr(backup, "utc_now", lambda: now)
        shut = shards_of_the_repository(host)
        for path in shut:
            give(path, "root")
            path.chmod(0o555)
        failed = host.run("run_backup", "elasticsearch")
        for path in shut:
            path.chmod(0o755)
            give(path, host.node.os_user)
        assert failed.code == 1, failed.text
        # The same name, which some shard still knows.
        host.good("run_backup", "elasticsearch")
        assert len({e["name"] for e in host.entries()} - {good}) == 1
        assert not list(host.records.glob(".*.note.json"))

    def test_a_partial_snapshot_of_somebody_else_is_bad_and_never_the_latest(self, host: Host) -> None:
        host.good("run_backup", "elasticsearch")
        (good,) = (e["name"] for e in host.entries())
        host.node.bulk("cases", {"later": {"name": "later", "parts": []}})
        shut = shards_of_the_repository(host)
        for path in shut:
            give(path, "root")
            path.chmod(0o555)
        host.node.request(
            "PUT", f"/_snapshot/{REPOSITORY}/half?wait_for_completion=true", {"indices": "cases,forms"}
        )
        for path in shut:
            path.chmod(0o755)
            give(path, host.node.os_user)
        status = host.node.request("GET", f"/_snapshot/{REPOSITORY}/half/_status")["snapshots"][0]
        assert (state_of(host, "half"), status["state"]) == ("PARTIAL", "SUCCESS")
        assert "BAD: its state is PARTIAL" in host.good("list_backups", "elasticsearch").out
        assert host.run("verify_backup", "half", "--store", "elasticsearch").code == 3
        assert host.restore("half").code == 3
        plan = host.good("restore_backup", "elasticsearch", "latest", "--dry-run", "--indices", "forms")
        assert good in plan.out

    def test_a_snapshot_of_nothing_is_bad_though_it_is_a_success(self, host: Host) -> None:
        host.good("run_backup", "elasticsearch")
        host.node.request(
            "PUT", f"/_snapshot/{REPOSITORY}/none?wait_for_completion=true", {"indices": "nope*"}
        )
        assert state_of(host, "none") == "SUCCESS"
        assert "BAD: it holds nothing" in host.good("list_backups", "elasticsearch").out
        assert host.restore("none").code == 3

    def test_other_indices_or_documents_than_were_recorded_are_no_good_backup(self, host: Host) -> None:
        host.good("run_backup", "elasticsearch")
        (entry,) = host.entries()
        record = host.records / f".{entry['name']}.json"
        body = json.loads(record.read_bytes())
        forms = body["source"]["indices"]["forms"]
        assert (forms["documents"], forms["least_documents"], forms["most_documents"]) == (6, 6, 6)
        before = contents(host.node)

        forms |= {"least_documents": 7, "most_documents": 7}
        record.write_text(json.dumps(body))
        deep = host.run("verify_backup", entry["name"], "--deep")
        assert (deep.code, "forms has 6 documents, at its backup it had 7" in deep.text) == (3, True), (
            deep.text
        )
        restored = host.restore(entry["name"], "--indices", "forms")
        assert (restored.code, "left as it was" in restored.err) == (8, True), restored.text
        assert contents(host.node) == before

        forms |= {"least_documents": 6, "most_documents": 6}
        body["source"]["indices"]["gone"] = {"shards": 1}
        record.write_text(json.dumps(body))
        shallow = host.run("verify_backup", entry["name"])
        assert (shallow.code, "does not hold the indices that it should: gone" in shallow.text) == (3, True)

    def test_another_snapshot_of_its_name_is_not_the_one_that_was_recorded(self, host: Host) -> None:
        host.good("run_backup", "elasticsearch")
        (name,) = (e["name"] for e in host.entries())
        host.node.request("DELETE", f"/_snapshot/{REPOSITORY}/{name}")
        host.node.request("PUT", f"/_snapshot/{REPOSITORY}/{name}?wait_for_completion=true", {})
        listed = host.good("list_backups", "elasticsearch").out
        assert "BAD: it is missing in the repository, where another snapshot has its name" in listed
        assert "unmanaged" in listed


class TestWhatIsSent:
    @either
    def test_a_snapshot_is_asked_for_whole_of_open_indices_by_name_and_not_waited_for(
        self, host: Host, sent: Sent
    ) -> None:
        host.node.request("POST", "/users.2024/_close")
        host.node.request("PUT", "/hqb-scratch-somebody-s")
        host.good("run_backup", "elasticsearch")
        ((path, body),) = ((p, b) for m, p, b in sent if m == "PUT" and f"{REPOSITORY}/" in p)
        assert path.endswith("?wait_for_completion=false")
        assert body == {
            "indices": "cases,forms",
            "ignore_unavailable": False,
            "include_global_state": False,
            "partial": False,
        }

    def test_an_index_that_is_saved_cannot_be_deleted_under_it(
        self, host: Host, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        throttle(host, "10kb")
        denied = []

        def delete(nth: int) -> None:
            if nth == 2:
                denied.append(host.node.request("DELETE", "/forms", ok=False)["status"])

        watched(monkeypatch, delete)
        host.good("run_backup", "elasticsearch")
        assert denied == [400]

    def test_a_trial_has_no_alias_no_replicas_and_no_block_and_goes_by_its_exact_name(
        self, host: Host, sent: Sent
    ) -> None:
        host.node.request("PUT", "/forms/_settings", {"index.blocks.read_only_allow_delete": True})
        host.good("run_backup", "elasticsearch")
        name = host.entries()[-1]["name"]
        host.node.request("PUT", "/forms/_settings", {"index.blocks.read_only_allow_delete": None})
        sent.clear()
        host.good("verify_backup", name, "--deep")
        bodies = [b for m, p, b in sent if m == "POST" and "_restore" in p]
        assert len(bodies) == 3
        for body in bodies:
            assert body["rename_replacement"].startswith("hqb-scratch-")
            assert body == {
                **body,
                "ignore_unavailable": False,
                "include_global_state": False,
                "include_aliases": False,
                "ignore_index_settings": ["index.blocks.read_only_allow_delete"],
                "index_settings": {"index.number_of_replicas": 0},
            }
        gone = [p for m, p, _ in sent if m == "DELETE"]
        assert gone
        assert all(p.startswith("hqb-scratch-") and not set(p) & set("*,") for p in gone)

    def test_waits_are_for_primaries_and_for_exact_names(self, host: Host, sent: Sent) -> None:
        """A replica that has no node keeps an index yellow for ever; a pattern that matches nothing is green."""
        host.good("run_backup", "elasticsearch")
        began = time.monotonic()
        assert host.restore("latest", "--indices", "forms").code == 0
        assert time.monotonic() - began < 60
        health = host.node.request("GET", "/_cluster/health/forms")
        assert (health["status"], health["unassigned_shards"]) == ("yellow", 2)
        assert not [p for _, p, _ in sent if "wait_for_status" in p or "*" in p.partition("?")[0]]


class TestClusterState:
    def test_no_restore_changes_the_cluster_s_settings_and_templates(self, host: Host) -> None:
        setting = "cluster.routing.allocation.node_concurrent_recoveries"
        pattern = {"index_patterns": ["ours-*"]}
        host.node.request("PUT", "/_cluster/settings", {"persistent": {setting: "7"}})
        host.node.request("PUT", "/_template/old", pattern)
        try:
            host.good("run_backup", "elasticsearch")
            # One taken by hand has all of that in it.
            host.node.request("PUT", f"/_snapshot/{REPOSITORY}/by-hand?wait_for_completion=true", {})
            host.node.request("PUT", "/_cluster/settings", {"persistent": {setting: "5"}})
            host.node.request("DELETE", "/_template/old")
            for name in ("latest", "by-hand"):
                assert host.restore(name, "--indices", "users.2024").code == 0
            found = host.node.request("GET", "/_cluster/settings?flat_settings=true")["persistent"]
            assert found == {setting: "5"}
            assert "old" not in host.node.request("GET", "/_template")
        finally:
            host.node.request("PUT", "/_cluster/settings", {"persistent": {setting: None}})
            host.node.request("DELETE", "/_template/old", ok=False)


class TestStorageThatComesBack:
    def test_a_repository_that_cannot_be_read_for_a_while_does_not_end_a_snapshot_that_goes_on(
        self, host: Host, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        host.good("run_backup", "elasticsearch")
        host.node.bulk("forms", {f"x{n}": {"name": f"{n * 7919}" * 9} for n in range(60)})
        throttle(host, "6kb")
        lists = list(host.repository.glob("index-*"))
        answers: list[int] = []

        def shut(nth: int) -> None:
            if nth in (2, 5):
                for path in lists:
                    path.chmod(0 if nth == 2 else 0o644)
            if 2 <= nth < 5:
                found = host.node.request("GET", f"/_snapshot/{REPOSITORY}/_all", ok=False)
                answers.append(int(found.get("status", 200)))

        watched(monkeypatch, shut)
        ended = host.good("run_backup", "elasticsearch")
        assert "is whole" in ended.out
        # 6.8 reads the list each time; where a later one keeps it in memory, nothing is to be noticed.
        assert answers == ([500] * 3 if host.node.version == 6 else answers)
        assert "BAD" not in host.good("list_backups", "elasticsearch").out


class TestOneAtATime:
    """Another's snapshot begins after we looked; it takes many seconds, for a busy machine may come to ask late."""

    @pytest.fixture
    def roomy(self) -> Iterator[Host]:
        """Run a node that hears a request for a snapshot while it takes one: with 2 processors it has 1 thread."""
        with own_node(6, **{"thread_pool.snapshot.max": "4"}) as node, host_of(node) as made:
            fill(node, documents=6)
            yield made

    @pytest.mark.elasticsearch6
    def test_6_refuses_and_it_is_waited_for(self, roomy: Host, monkeypatch: pytest.MonkeyPatch) -> None:
        assert "waiting for snapshot between/theirs" in self.backed_up(roomy, monkeypatch).out

    @pytest.mark.parametrize("host", [SEVEN], indirect=True)
    def test_7_does_one_after_the_other(self, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
        assert "waiting" not in self.backed_up(host, monkeypatch).out

    def backed_up(self, host: Host, monkeypatch: pytest.MonkeyPatch) -> Ended:
        slow = {"location": "between", "max_snapshot_bytes_per_sec": "15kb"}
        host.node.request("PUT", "/_snapshot/between", {"type": "fs", "settings": slow})
        drawn = random.Random(7)
        host.node.bulk("forms", {f"x{n}": {"name": drawn.randbytes(100).hex()} for n in range(150)})
        real, begun = Cluster._send, []

        def send(self: Cluster, method: str, url: str, body: Any, seconds: float) -> Any:
            if method == "PUT" and f"/{REPOSITORY}/" in url and not begun:
                begun.append(url)
                host.node.request(
                    "PUT", "/_snapshot/between/theirs?wait_for_completion=false", {"indices": "forms"}
                )
            return real(self, method, url, body, seconds)

        monkeypatch.setattr(Cluster, "_send", send)
        ended = host.good("run_backup", "elasticsearch")
        assert begun
        (theirs,) = host.node.request("GET", "/_snapshot/between/theirs")["snapshots"]
        assert theirs["state"] == "SUCCESS"
        assert "BAD" not in host.good("list_backups", "elasticsearch").out
        return ended


class TestRoomOnTheNodes:
    def test_what_lies_beyond_the_flood_stage_is_no_room(self, host: Host) -> None:
        host.good("run_backup", "elasticsearch")
        disk = "cluster.routing.allocation.disk"
        row, *_ = host.node.request("GET", "/_cat/allocation?format=json&bytes=b&h=disk.avail")
        # Nothing is left until the nodes would make every index read-only.
        free = f"{int(row['disk.avail']) + (1 << 30)}b"
        stages = {f"{disk}.watermark.{name}": free for name in ("low", "high", "flood_stage")}
        stages[f"{disk}.threshold_enabled"] = "true"
        words = ("restore_backup", "elasticsearch", "latest", "--rename-prefix", "old-", "--dry-run")
        try:
            host.good(*words)
            host.node.request("PUT", "/_cluster/settings", {"transient": stages})
            ended = host.run(*words)
        finally:
            off = dict.fromkeys(stages)
            host.node.request("PUT", "/_cluster/settings", {"transient": off})
        assert (ended.code, "the data nodes has" in ended.err) == (5, True), ended.text

    def test_what_is_saved_first_counts_where_one_disk_holds_both(
        self, host: Host, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        host.good("run_backup", "elasticsearch")
        words = ("restore_backup", "elasticsearch", "latest", "--indices", "forms", "--dry-run", "--json")

        def plan() -> dict[str, Any]:
            events = [json.loads(line) for line in host.good(*words).out.splitlines()]
            (found,) = (event for event in events if event.get("kind") == "plan")
            return {**found, **found.get("data", {})}

        on_one = plan()
        saved = on_one["facts"]["repository_needed"]
        assert saved > 0
        # As if its directory were another disk's.
        monkeypatch.setattr(room, "shares_disk", lambda cluster, directory: False)
        assert on_one["needed"] - plan()["needed"] == saved
