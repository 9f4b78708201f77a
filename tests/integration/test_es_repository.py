"""Repositories, foreign snapshots, retention and what a cluster refuses, on a real 6.8."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from hq_backups.engine.accounts import me
from hq_backups.engine.elasticsearch.client import Cluster
from tests.integration.es_helpers import REPOSITORY, Host, contents, fill, host_of
from tests.testbed.elasticsearch import ElasticsearchNode
from tests.testbed.process import LOOPBACK, give, wait_until
from tests.testbed.toxiproxy import Toxiproxy

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.elasticsearch6]

TO_S3: dict[str, Any] = {"es_local_repo": False, "backup_es_s3": True}


@pytest.fixture
def host(es6: ElasticsearchNode) -> Iterator[Host]:
    with host_of(es6) as made:
        fill(es6, documents=5)
        yield made


def registered(host: Host) -> dict[str, Any]:
    found: dict[str, Any] = host.node.request("GET", "/_snapshot")
    return found


def record_of(host: Host, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((host.records / f".{name}.json").read_bytes())
    return found


class TestRepositories:
    def test_a_place_that_no_node_may_use_is_said_with_what_mends_it(self, host: Host) -> None:
        ended = host.run("run_backup", "elasticsearch", es_repository_location="/elsewhere")
        assert ended.code == 5
        assert "doesn't match any of the locations specified by path.repo" in ended.err
        assert "path.repo: [" in ended.err
        assert registered(host) == {}

    def test_what_could_not_be_verified_does_not_stay_registered(self, host: Host) -> None:
        host.repository.mkdir(mode=0o555)
        give(host.repository, "root")
        ended = host.run("run_backup", "elasticsearch")
        assert ended.code == 5
        assert "chown -R elasticsearch" in ended.err
        assert registered(host) == {}

    def test_one_that_points_elsewhere_is_left_alone(self, host: Host) -> None:
        body = {"type": "fs", "settings": {"location": "another"}}
        host.node.request("PUT", f"/_snapshot/{REPOSITORY}", body)
        ended = host.run("run_backup", "elasticsearch")
        assert ended.code == 5
        assert "is registered for another place (fs another)" in ended.err
        assert registered(host)[REPOSITORY]["settings"] == {"location": "another"}

    def test_a_read_only_one_is_not_written_to_and_restored_from(self, host: Host) -> None:
        host.good("run_backup", "elasticsearch")
        before = contents(host.node)
        for index in host.node.indices():
            host.node.request("DELETE", f"/{index}")
        host.node.request("DELETE", f"/_snapshot/{REPOSITORY}")
        assert host.restore("latest", es_repository_readonly=True).code == 0
        assert registered(host)[REPOSITORY]["settings"]["readonly"] == "true"
        assert contents(host.node) == before
        refused = host.run("run_backup", "elasticsearch", es_repository_readonly=True)
        assert (refused.code, "writes nothing" in refused.err) == (5, True)
        refused = host.run("run_backup", "elasticsearch")
        assert (refused.code, "registered read-only" in refused.err) == (5, True)
        live = host.restore("latest", es_repository_readonly=True)
        assert (live.code, "writes nothing" in live.err) == (5, True)

    def test_a_missing_plugin_is_named_with_the_nodes_that_lack_it(self, host: Host) -> None:
        ended = host.run(
            "run_backup", "elasticsearch", es_local_repo=False, backup_es_s3=True,
            AMAZON_S3_ACCESS_KEY="k", AMAZON_S3_SECRET_KEY="s", aws_endpoint="http://127.0.0.1:1",
        )  # fmt: skip
        assert ended.code == 5
        assert "these nodes lack the plugin repository-s3: n0" in ended.err
        assert "elasticsearch-plugin install repository-s3" in ended.err
        assert registered(host) == {}

    def test_a_bucket_and_a_directory_at_once_are_a_usage_error(self, host: Host) -> None:
        ended = host.run("run_backup", "elasticsearch", backup_es_s3=True)
        assert (ended.code, "exclude each other" in ended.err) == (2, True)
        ended = host.run("run_backup", "elasticsearch", backup_es_swift=True)
        assert (ended.code, "backup_es_swift" in ended.err) == (2, True)

    def test_the_repository_of_the_old_playbook_is_used_as_it_is(self, host: Host) -> None:
        settings = {"location": host.settings["es_repository_location"], "compress": "true"}
        host.node.request("PUT", f"/_snapshot/{REPOSITORY}", {"type": "fs", "settings": settings})
        host.good("run_backup", "elasticsearch")
        assert registered(host)[REPOSITORY]["settings"] == settings


class TestWhatTheClusterHolds:
    def test_closed_indices_are_said_and_red_ones_stop_the_backup(self, host: Host) -> None:
        host.node.request("POST", "/users.2024/_close")
        ended = host.good("run_backup", "elasticsearch")
        assert "closed indices are not in the backup: users.2024" in ended.err
        assert record_of(host, host.entries()[-1]["name"])["source"]["closed"] == ["users.2024"]
        nowhere = {"index.routing.allocation.require._name": "nobody", "index.number_of_replicas": 0}
        host.node.request("PUT", "/lost?wait_for_active_shards=0", {"settings": nowhere})
        ended = host.run("run_backup", "elasticsearch")
        assert ended.code == 5
        assert "these indices are red, a part of them is missing: lost" in ended.err
        # One that is red does not keep another from being restored.
        assert host.restore("latest", "--indices", "forms").code == 0

    def test_an_empty_cluster_does_not_push_the_last_good_snapshot_out(self, host: Host) -> None:
        nothing = host.run("run_backup", "elasticsearch", elasticsearch_url=host.node.url)
        assert nothing.code == 0
        for index in host.node.indices():
            host.node.request("DELETE", f"/{index}")
        ended = host.run("run_backup", "elasticsearch")
        assert (ended.code, "there is nothing to back up" in ended.err) == (5, True)
        host.node.request("PUT", "/forms")
        ended = host.run("run_backup", "elasticsearch")
        assert (ended.code, "0 documents" in ended.err) == (5, True)
        host.good("run_backup", "elasticsearch", "--accept-shrink")

    def test_an_alias_in_an_index_s_place_is_refused_before_anything(self, host: Host) -> None:
        host.good("run_backup", "elasticsearch")
        host.node.request("DELETE", "/cases")
        actions = [{"add": {"index": "forms", "alias": "cases"}}]
        host.node.request("POST", "/_aliases", {"actions": actions})
        before = contents(host.node)
        ended = host.restore("latest")
        assert (ended.code, "cases is an alias of forms" in ended.err) == (5, True)
        assert contents(host.node) == before

    def test_a_block_of_a_full_disk_does_not_come_back(self, host: Host) -> None:
        block = "index.blocks.read_only_allow_delete"
        host.node.request("PUT", "/forms/_settings", {block: True})
        host.good("run_backup", "elasticsearch")
        host.node.request("DELETE", "/forms")
        assert host.restore("latest", "--indices", "forms").code == 0
        host.node.bulk("forms", {"new": {"name": "can be written"}})


class TestOthers:
    def test_a_foreign_snapshot_is_waited_for_and_left_alone(self, host: Host) -> None:
        slow = {"location": "theirs", "max_snapshot_bytes_per_sec": "40kb"}
        host.node.request("PUT", "/_snapshot/theirs", {"type": "fs", "settings": slow})
        host.node.bulk("forms", {f"x{n}": {"name": f"{n * 7919}" * 30} for n in range(200)})
        body = {"indices": "forms", "include_global_state": False}
        host.node.request("PUT", "/_snapshot/theirs/nightly?wait_for_completion=false", body)
        assert host.node.request("GET", "/_snapshot/_status")["snapshots"]

        impatient = host.run("run_backup", "elasticsearch", es_wait_minutes=0)
        assert (impatient.code, "es_wait_minutes" in impatient.err) == (6, True), impatient.text
        ended = host.good("run_backup", "elasticsearch")

        assert "waiting for snapshot theirs/nightly" in ended.out
        (theirs,) = host.node.request("GET", "/_snapshot/theirs/nightly")["snapshots"]
        assert theirs["state"] == "SUCCESS"

    def test_two_runs_at_once_are_one(self, host: Host) -> None:
        host.good("run_backup", "elasticsearch")
        from hq_backups.engine.locks import StoreLock

        with StoreLock(host.records, "another-run", "backup"):
            ended = host.run("run_backup", "elasticsearch")
        assert (ended.code, "another-run" in ended.err) == (6, True)

    def test_snapshots_of_others_are_listed_and_restored_but_never_deleted(self, host: Host) -> None:
        host.good("run_backup", "elasticsearch")
        before = contents(host.node)
        old = f"{REPOSITORY}_2020_1_2"
        host.node.request("PUT", f"/_snapshot/{REPOSITORY}/{old}?wait_for_completion=true", {})
        host.node.request(
            "PUT", f"/_snapshot/{REPOSITORY}/by-hand?wait_for_completion=true", {"indices": "cases"}
        )
        listed = {e["name"]: e for e in host.entries()}
        assert [listed[n]["managed"] for n in (old, "by-hand")] == [False, False]
        for index in host.node.indices():
            host.node.request("DELETE", f"/{index}")
        assert host.restore(old).code == 0
        assert contents(host.node) == before
        assert host.restore("by-hand").code == 0
        assert contents(host.node) == before
        host.good("prune_backups", "elasticsearch", "--manual-older-than", "0", elasticsearch_backup_days=0)
        assert {old, "by-hand"} <= {e["name"] for e in host.entries()}

    @pytest.fixture
    def blobs(self, host: Host) -> dict[str, Any]:
        """Return the settings of a store beside it, with something to back up."""
        blobs = host.home / "blobdb"
        (blobs / "form-1").mkdir(parents=True)
        (blobs / "form-1" / "attachment").write_bytes(b"x" * 1000)
        return {
            "backup_blobdb": True,
            "blobdb_dir_path": str(blobs),
            "blobdb_backup_dir": str(host.home / "blob-backups"),
            "blobdb_backup_os_user": me(),
        }

    def test_no_cluster_does_not_stop_the_other_stores(self, host: Host, blobs: dict[str, Any]) -> None:
        both = {**blobs, "elasticsearch_url": "http://127.0.0.1:1"}
        ended = host.run("run_backup", "all", **both)
        assert ended.code == 1
        assert f"the Elasticsearch at {both['elasticsearch_url']} did not answer GET /" in ended.err
        assert "connection refused" in ended.err
        assert "made blobdb_manual" in ended.out
        listed = host.run("list_backups", **both)
        assert "blobdb_manual" in listed.out

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({**TO_S3, "es_snapshot_bucket": "s3://bucket/es"}, "es_snapshot_bucket"),
            (TO_S3, "backup_es_s3 is on, but no S3 credentials are set"),
            (
                {**TO_S3, "AMAZON_S3_ACCESS_KEY": "k"},
                "the S3 key is set by half: AMAZON_S3_SECRET_KEY is missing",
            ),
            ({"backup_es_s3": True}, "backup_es_s3 and es_local_repo exclude each other"),
            ({"es_repository_location": "/elsewhere"}, "path.repo: ["),
            ({"elasticsearch_url": "es0:port"}, "elasticsearch_url"),
        ],
        ids=["bucket", "no-key", "half-a-key", "bucket-and-directory", "no-path.repo", "address"],
    )
    def test_settings_that_are_half_done_do_not_stop_the_other_stores(
        self, host: Host, blobs: dict[str, Any], changes: dict[str, Any], said: str
    ) -> None:
        ended = host.run("run_backup", "all", **blobs, **changes)
        assert ended.code == 1
        assert said in ended.err
        assert "ERROR: " in ended.err
        assert "  next: " in ended.err
        assert "made blobdb_manual" in ended.out
        assert registered(host) == {}
        assert "blobdb_manual" in host.good("list_backups", "blobdb", **blobs, **changes).out

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"backup_es_s3": True}, "backup_es_s3 and es_local_repo exclude each other"),
            ({"elasticsearch_url": "es0:port"}, "elasticsearch_url"),
            ({**TO_S3, "AMAZON_S3_ACCESS_KEY": "k"}, "AMAZON_S3_SECRET_KEY is missing"),
        ],
        ids=["bucket-and-directory", "address", "half-a-key"],
    )
    def test_settings_that_are_unusable_are_told_where_all_stores_are_listed_or_pruned(
        self, host: Host, blobs: dict[str, Any], changes: dict[str, Any], said: str
    ) -> None:
        host.good("run_backup", "blobdb", **blobs)
        for words in (("list_backups",), ("list_backups", "--source", "local"), ("prune_backups",)):
            ended = host.run(*words, **blobs, **changes)
            assert ended.code == 1, ended.text
            assert said in ended.err
            assert "blobdb_manual" in ended.out
        told = host.run("list_backups", "--json", **blobs, **changes)
        assert (told.code, [e["store"] for e in json.loads(told.out)]) == (1, ["blobdb"])
        sync = host.run("list_backups", "--sync", **blobs, **changes)
        assert "nothing was marked as gone" in sync.err
        # Asked for by name, or with no other store, it is a usage error as ever.
        assert host.run("list_backups", "elasticsearch", **blobs, **changes).code == 2
        alone = host.run("list_backups", **changes)
        assert (alone.code, said in alone.err, alone.out) == (2, True, "")


class TestRetention:
    def age(self, host: Host, name: str, days: int) -> None:
        path = host.records / f".{name}.json"
        body = json.loads(path.read_bytes())
        then = datetime.now(UTC) - timedelta(days=days)
        body |= {"started_at": f"{then:%Y-%m-%dT%H:%M:%SZ}", "local_date": f"{then:%Y-%m-%d}"}
        path.write_text(json.dumps(body))

    def test_old_ones_go_after_a_good_run_and_manual_ones_stay(self, host: Host) -> None:
        for type_ in ("daily", "weekly", "manual"):
            host.good("run_backup", "elasticsearch", "--type", type_)
        daily, weekly, manual = [
            next(e["name"] for e in host.entries() if e["type"] == t) for t in ("daily", "weekly", "manual")
        ]
        for name in (daily, weekly, manual):
            self.age(host, name, 4)
        ended = host.good("run_backup", "elasticsearch", "--type", "daily")
        left = [e["name"] for e in host.entries()]
        assert daily not in left
        assert weekly not in left
        assert manual in left
        assert len(left) == 2
        assert f"remove {daily}: It is 4 days old; daily backups go after 3 days." in ended.out

    def test_the_newest_good_one_is_kept_however_old(self, host: Host) -> None:
        host.good("run_backup", "elasticsearch", "--type", "daily")
        (only,) = [e["name"] for e in host.entries()]
        self.age(host, only, 40)
        ended = host.good("prune_backups", "elasticsearch")
        assert "which is never removed" in ended.out
        assert [e["name"] for e in host.entries()] == [only]

    def test_the_misspelt_setting_counts(self, host: Host) -> None:
        for _ in range(2):
            host.good("run_backup", "elasticsearch", "--type", "daily", elastcsearch_backup_days=1)
        first = host.entries()[0]["name"]
        self.age(host, first, 2)
        host.good("prune_backups", "elasticsearch", elastcsearch_backup_days=1)
        assert first not in [e["name"] for e in host.entries()]

    def test_nothing_is_deleted_while_something_runs_and_the_next_run_does_it(self, host: Host) -> None:
        for _ in range(2):
            host.good("run_backup", "elasticsearch", "--type", "daily")
        first = host.entries()[0]["name"]
        self.age(host, first, 9)
        slow = {"location": "theirs2", "max_snapshot_bytes_per_sec": "20kb"}
        host.node.request("PUT", "/_snapshot/theirs2", {"type": "fs", "settings": slow})
        host.node.bulk("forms", {f"x{n}": {"name": f"{n * 7919}" * 30} for n in range(200)})
        host.node.request("PUT", "/_snapshot/theirs2/nightly?wait_for_completion=false", {"indices": "forms"})
        ended = host.good("prune_backups", "elasticsearch")
        assert f"{first} could not be deleted, the next run tries again" in ended.err
        wait_until(
            lambda: not host.node.request("GET", "/_snapshot/_status")["snapshots"], what="theirs to end"
        )
        host.good("prune_backups", "elasticsearch")
        assert first not in [e["name"] for e in host.entries()]


def test_what_is_missing_is_an_alarm_and_the_next_backup_says_so(host: Host) -> None:
    host.good("run_backup", "elasticsearch", "--type", "daily")
    name = host.entries()[0]["name"]
    host.node.request("DELETE", f"/_snapshot/{REPOSITORY}/{name}")
    assert "BAD: it is missing in the repository" in host.good("list_backups", "elasticsearch").out
    check = host.run("check_s3_backups", "elasticsearch")
    assert check.code == 3
    assert f"[ALERT] {name}: it is missing in the repository" in check.out
    assert f"[ALERT] {name}" in (host.records / "s3_backup_status.txt").read_text()
    latest = host.restore("latest")
    assert (latest.code, "is missing" in latest.err) == (3, True)
    again = host.good("run_backup", "elasticsearch", "--type", "daily")
    assert "1 snapshots are missing in the repository" in again.err
    assert len({e["name"] for e in host.entries()}) == 2, "the name of what is missing is not taken again"


def test_many_indices_and_snapshots_take_few_requests(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    one = {"settings": {"number_of_shards": 1, "number_of_replicas": 0}}
    # Their names together are more than a URL may have (4096 bytes), and they more than the requests allowed below.
    for n in range(70):
        host.node.request("PUT", f"/many-{n:03d}-{'x' * 60}", one)
    host.good("run_backup", "elasticsearch", "--type", "daily")
    for n in range(40):
        path = f"/_snapshot/{REPOSITORY}/old-{n}?wait_for_completion=true"
        host.node.request("PUT", path, {"indices": "forms", "include_global_state": False})
    asked: list[str] = []
    real = Cluster._send

    def counting(self: Cluster, method: str, url: str, body: Any, seconds: float) -> Any:
        asked.append(f"{method} {url}")
        return real(self, method, url, body, seconds)

    monkeypatch.setattr(Cluster, "_send", counting)
    assert len(host.entries()) == 41
    assert len(asked) <= 4, asked
    asked.clear()
    assert host.run("check_s3_backups", "elasticsearch").code == 0
    assert len(asked) <= 8, asked
    asked.clear()
    host.good("run_backup", "elasticsearch", "--type", "daily")
    assert len(asked) <= 60, asked


class _Recorder(BaseHTTPRequestHandler):
    """A cluster that has the plugin, and keeps what it is asked to register."""

    version = "6.8.23"
    asked: list[tuple[str, str, Any]] = []  # noqa: RUF012
    registered: dict[str, Any] = {}  # noqa: RUF012

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/":
            self._answer(200, {"cluster_name": "c", "version": {"number": self.version}})
        elif path == "/_snapshot/_status":
            self._answer(200, {"snapshots": []})
        elif path == "/_nodes/plugins":
            self._answer(200, {"nodes": {"a": {"name": "n0", "plugins": [{"name": "repository-s3"}]}}})
        elif path.startswith("/_snapshot/") and self.registered:
            self._answer(200, self.registered)
        else:
            self._answer(
                404, {"error": {"type": "repository_missing_exception", "reason": "missing"}, "status": 404}
            )

    def do_PUT(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, self.headers["Content-Type"], body))
        self.registered[self.path.rsplit("/", 1)[-1]] = body
        self._answer(200, {"acknowledged": True})

    def _answer(self, status: int, body: Any) -> None:
        raw = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, format: str, *args: Any) -> None:
        return


@contextlib.contextmanager
def recorder(version: str) -> Iterator[tuple[str, list[tuple[str, str, Any]]]]:
    handler = type("Handler", (_Recorder,), {"version": version, "asked": [], "registered": {}})
    server = ThreadingHTTPServer((LOOPBACK, 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://{LOOPBACK}:{server.server_address[1]}", handler.asked  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


S3 = {"backup_es_s3": True, "AMAZON_S3_ACCESS_KEY": "key-4711", "AMAZON_S3_SECRET_KEY": "secret-4711"}
BUCKET = "dimagi-monolith-es-snapshots"


@pytest.mark.parametrize(
    ("version", "settings", "sent"),
    [
        (
            "6.8.23",
            {"aws_endpoint": "http://10.0.0.5:9000"},
            {
                "bucket": BUCKET,
                "endpoint": "10.0.0.5:9000",
                "protocol": "http",
                "client": "default",
            },
        ),
        (
            "6.8.23",
            {"aws_region": "eu-west-1"},
            {
                "bucket": BUCKET,
                "endpoint": "s3.eu-west-1.amazonaws.com",
                "client": "default",
                "server_side_encryption": "true",
            },
        ),
        (
            "7.17.28",
            {"aws_endpoint": "https://s3.example.com"},
            {
                "bucket": BUCKET,
                "endpoint": "s3.example.com",
                "protocol": "https",
                "client": "default",
                "path_style_access": "true",
            },
        ),
    ],
    ids=["6.8-other-service", "6.8-aws", "7-other-service"],
)
def test_an_s3_repository_is_asked_for_as_a_real_server_took_it_and_without_keys(
    tmp_path: Path, version: str, settings: dict[str, Any], sent: dict[str, str]
) -> None:
    with recorder(version) as (url, asked):
        host = Host(
            None,  # type: ignore[arg-type]
            tmp_path,
            {
                "deploy_env": "monolith", "backup_postgres": False, "elasticsearch_url": url,
                "elasticsearch_backup_dir": str(tmp_path / "records"), "elasticsearch_data_dir": str(tmp_path),
                **S3, **settings,
            },
        )  # fmt: skip
        host.run("run_backup", "elasticsearch")
        ((path, kind, body),) = asked
    assert (path, kind) == (f"/_snapshot/{REPOSITORY}", "application/json")
    assert body == {"type": "s3", "settings": sent}
    assert "4711" not in json.dumps(body)


class TestNetworks:
    def test_the_second_address_is_asked_when_the_first_is_dead(self, host: Host) -> None:
        host.good("run_backup", "elasticsearch", elasticsearch_url=["http://127.0.0.1:1", host.node.url])

    def test_an_answer_that_never_comes_does_not_end_a_snapshot_that_goes_on(
        self, host: Host, toxiproxy: Toxiproxy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        proxy = toxiproxy.proxy(host.node.url)
        real = Cluster._send
        done = []

        def stalling(self: Cluster, method: str, url: str, body: Any, seconds: float) -> Any:
            if method == "PUT" and "wait_for_completion=false" in url and not done:
                done.append(url)
                proxy.add_toxic("timeout", timeout=0)
                try:
                    return real(self, method, url, body, 1.0)
                finally:
                    proxy.remove_toxics()
            return real(self, method, url, body, seconds)

        monkeypatch.setattr(Cluster, "_send", stalling)
        try:
            ended = host.good("run_backup", "elasticsearch", elasticsearch_url=proxy.endpoint)
        finally:
            proxy.remove()
        assert done
        assert "is whole" in ended.out
        assert "BAD" not in host.good("list_backups", "elasticsearch").out

    def test_resets_while_it_is_watched_do_not_end_it(
        self, host: Host, toxiproxy: Toxiproxy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        proxy = toxiproxy.proxy(host.node.url)
        real, asked = Cluster._send, []

        def resetting(self: Cluster, method: str, url: str, body: Any, seconds: float) -> Any:
            watching = (
                method == "GET" and f"/_snapshot/{REPOSITORY}/{REPOSITORY}_" in url and "_status" not in url
            )
            if watching:
                asked.append(url)
            if watching and len(asked) < 4:
                proxy.add_toxic("reset_peer", timeout=0)
                try:
                    return real(self, method, url, body, seconds)
                finally:
                    proxy.remove_toxics()
            return real(self, method, url, body, seconds)

        monkeypatch.setattr(Cluster, "_send", resetting)
        try:
            host.good("run_backup", "elasticsearch", elasticsearch_url=proxy.endpoint)
        finally:
            proxy.remove()
        assert len(asked) >= 4
