"""Nodes and runs that die in the middle, disks that fill: the last good snapshot stays, and the next run is good."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from django.test import override_settings

from hq_backups import conf
from hq_backups.engine.config import Job, to_plain
from hq_backups.engine.elasticsearch.client import Cluster
from hq_backups.engine.elasticsearch.snapshot import Patience
from hq_backups.engine.entry import run_job
from hq_backups.engine.requests import BackupRequest, RestoreRequest, Selection, VerifyRequest
from hq_backups.engine.stores import elasticsearch as store
from tests.integration.es_helpers import ENV, REPOSITORY, Host, contents, fill, host_of, own_node
from tests.testbed.elasticsearch import ElasticsearchNode
from tests.testbed.places import server_user
from tests.testbed.process import give, short_directory

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.elasticsearch6, pytest.mark.faults]

Send = Callable[[Cluster, str, str, Any, float], Any]


@pytest.fixture(scope="module")
def node6() -> Iterator[ElasticsearchNode]:
    with own_node(6) as made:
        yield made


@pytest.fixture(scope="module")
def node7() -> Iterator[ElasticsearchNode]:
    with own_node(7) as made:
        yield made


SEVEN = pytest.param("node7", marks=[pytest.mark.elasticsearch7, pytest.mark.slow])
on_both = pytest.mark.parametrize("host", ["node6", SEVEN], indirect=True)


def impatient(monkeypatch: pytest.MonkeyPatch, **seconds: float) -> None:
    """Wait for seconds where the settings say minutes."""
    monkeypatch.setattr(store, "Patience", lambda **given: Patience(**seconds))


@pytest.fixture
def host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    node: ElasticsearchNode = request.getfixturevalue(getattr(request, "param", "node6"))
    impatient(monkeypatch, no_progress=20.0, accepted=5.0, poll=0.2)
    with host_of(node) as made:
        fill(node, documents=6)
        yield made


def at(
    monkeypatch: pytest.MonkeyPatch, wanted: Callable[[str], bool], do: Callable[[], None], count: int = 1
) -> None:
    """Do something right before the count-th request that is wanted, once."""
    real: Send = Cluster._send
    seen: list[str] = []

    def send(self: Cluster, method: str, url: str, body: Any, seconds: float) -> Any:
        if wanted(f"{method} {url}"):
            seen.append(url)
            if len(seen) == count:
                do()
        return real(self, method, url, body, seconds)

    monkeypatch.setattr(Cluster, "_send", send)


def polls(text: str) -> bool:
    return text.startswith("GET") and f"/{REPOSITORY}/{REPOSITORY}_" in text and "_status" not in text


def snapshots_of(host: Host) -> list[dict[str, Any]]:
    """Return what the server itself lists."""
    listed = host.node.request("GET", f"/_snapshot/{REPOSITORY}/_all")
    return list(listed["snapshots"])


def throttle(host: Host, rate: str) -> None:
    """Register the repository as wanted, only slow."""
    settings = {"location": host.settings["es_repository_location"], "max_snapshot_bytes_per_sec": rate}
    host.node.request("PUT", f"/_snapshot/{REPOSITORY}", {"type": "fs", "settings": settings})


def crash(node: ElasticsearchNode) -> None:
    node.kill()
    node.start()
    node.request("GET", "/_cluster/health?wait_for_status=yellow&timeout=20s")


def names(host: Host) -> set[str]:
    return {str(e["name"]) for e in host.entries()}


@on_both
def test_a_node_that_dies_in_a_snapshot_fails_the_run_and_the_next_one_is_good(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.good("run_backup", "elasticsearch")
    before = names(host)
    throttle(host, "3kb")
    host.node.bulk("forms", {f"x{n}": {"name": f"{n * 7919}" * 9} for n in range(200)})
    with monkeypatch.context() as patch:
        at(patch, polls, lambda: crash(host.node), 3)
        ended = host.run("run_backup", "elasticsearch")
    assert ended.code == 1, ended.text
    assert "vanished while it was taken" in ended.err
    assert names(host) == before
    throttle(host, "40mb")
    host.good("run_backup", "elasticsearch")
    assert len(names(host)) == 2
    assert "BAD" not in host.good("list_backups", "elasticsearch").out


def test_a_node_that_dies_in_a_restore_has_the_old_data_back(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.good("run_backup", "elasticsearch")
    host.node.bulk("forms", {"late": {"name": "late"}})
    before = contents(host.node)
    with monkeypatch.context() as patch:
        closed: list[str] = []

        def in_place(text: str) -> bool:
            if text.endswith("/forms/_close"):
                closed.append(text)
            return bool(closed) and "_cluster/state/customs" in text

        at(patch, in_place, lambda: (host.node.request("DELETE", "/forms"), crash(host.node))[0])
        ended = host.restore("latest", "--indices", "forms")
    assert ended.code == 8, ended.text
    assert "put back as it was" in ended.err
    assert contents(host.node) == before
    assert host.restore("latest", "--indices", "forms").code in (0, 5)


@on_both
def test_an_index_that_a_killed_restore_left_red_is_made_anew_from_what_was_saved(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a restart no restore is in progress, and its shards stay red for ever."""
    host.node.bulk("forms", {f"x{n}": {"name": f"{n * 7919}" * 9} for n in range(100)})
    host.good("run_backup", "elasticsearch")
    # Segments that are the same would not be copied again.
    host.node.request("DELETE", "/forms")
    host.node.request("PUT", "/forms", {"settings": {"number_of_shards": 2}})
    host.node.bulk("forms", {"late": {"name": "late"}})
    before = contents(host.node)
    found: list[str] = []

    def slow(text: str) -> bool:
        return text.endswith("/forms/_close")

    def copying(text: str) -> bool:
        return bool(found) and "_cluster/state/customs" in text

    def begin() -> None:
        found.append("closed")
        settings = {"location": host.settings["es_repository_location"], "max_restore_bytes_per_sec": "1kb"}
        host.node.request("PUT", f"/_snapshot/{REPOSITORY}", {"type": "fs", "settings": settings})

    def die() -> None:
        host.node.kill()
        host.node.start()
        found.append(
            host.node.request("GET", "/_cluster/health/forms?wait_for_no_initializing_shards")["status"]
        )
        throttle(host, "40mb")

    with monkeypatch.context() as patch:
        at(patch, slow, begin)
        at(patch, copying, die, 3)
        ended = host.restore("latest", "--indices", "forms")
    assert found == ["closed", "red"]
    assert ended.code == 8, ended.text
    assert "put back as it was" in ended.err
    assert contents(host.node) == before


def test_a_node_that_dies_in_a_deletion_is_asked_again(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        host.good("run_backup", "elasticsearch")
    old = min(names(host))
    words = ("prune_backups", "elasticsearch", "--manual-older-than", "0")
    record = host.records / f".{old}.json"
    aged = record.read_text().replace('"local_date": "20', '"local_date": "19')
    record.write_text(aged.replace('"started_at": "20', '"started_at": "19'))
    with monkeypatch.context() as patch:
        at(patch, lambda text: text.startswith("DELETE"), host.node.kill)
        ended = host.run(*words)
    host.node.start()
    host.node.settled("forms")
    assert (ended.code, "the next run tries again" in ended.err) == (0, True), ended.text
    assert old in names(host)
    # This time it is deleted, and the answer lost.
    real: Send = Cluster._send

    def lose(self: Cluster, method: str, url: str, body: Any, seconds: float) -> Any:
        answer = real(self, method, url, body, seconds)
        if method == "DELETE":
            raise requests.ConnectionError("Connection aborted: reset by peer")
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(Cluster, "_send", lose)
        assert host.run(*words).code == 0
    host.good(*words)
    assert old not in names(host)


def test_an_operator_who_interrupts_leaves_no_snapshot(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    throttle(host, "6kb")

    def interrupt() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        at(patch, polls, interrupt, 2)
        ended = host.run("run_backup", "elasticsearch")
    assert ended.code == 1, ended.text
    assert "cancelled by the operator" in ended.err
    assert names(host) == set()
    assert not host.node.request("GET", "/_snapshot/_status")["snapshots"]
    host.good("run_backup", "elasticsearch")


@on_both
def test_a_snapshot_that_does_not_move_is_aborted(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    impatient(monkeypatch, no_progress=1.0, poll=0.1)
    throttle(host, "1kb")
    ended = host.run("run_backup", "elasticsearch")
    assert ended.code == 1, ended.text
    assert "has not moved for" in ended.err
    assert names(host) == set()


@pytest.fixture
def small(
    request: pytest.FixtureRequest, small_disk: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Host]:
    """Return a host whose repository has little room, with one good snapshot there."""
    impatient(monkeypatch, no_progress=20.0, accepted=5.0, poll=0.2)
    disk = small_disk("2m")
    give(disk, server_user())
    with (
        short_directory() as workdir,
        ElasticsearchNode(getattr(request, "param", 6), workdir / "es", disk) as node,
        host_of(node) as host,
    ):
        fill(node, documents=5)
        host.good("run_backup", "elasticsearch")
        yield host


def grow(node: ElasticsearchNode, index: str, documents: int) -> None:
    """Make an index anew, of what cannot be compressed well, a kilobyte each."""
    if index in node.indices():
        node.request("DELETE", f"/{index}")
    # A node says for ten seconds what an index once had, unless it is told otherwise.
    at_once = {"number_of_shards": 1, "store.stats_refresh_interval": "0s"}
    node.request("PUT", f"/{index}", {"settings": at_once})
    node.bulk(index, {f"x{n}": {"blob": os.urandom(900).hex()} for n in range(documents)})


def test_a_full_repository_fails_the_run_and_keeps_the_last_good_snapshot(
    small: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = names(small)
    grow(small.node, "new", 300)
    ballast = small.repository / "of-somebody-else"

    def fill_up() -> None:
        """Take the room away between the forecast and the snapshot."""
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    with monkeypatch.context() as patch:
        at(patch, lambda text: text.startswith("PUT"), fill_up)
        ended = small.run("run_backup", "elasticsearch")
    assert ballast.stat().st_size > 0
    ballast.unlink()
    assert ended.code == 1, ended.text
    assert "No space left on device" in ended.err or "vanished" in ended.err
    assert kept <= names(small)
    assert small.run("verify_backup", min(kept), "--deep").code == 0
    small.good("run_backup", "elasticsearch")


@pytest.mark.parametrize(
    "small", [6, pytest.param(7, marks=[pytest.mark.elasticsearch7, pytest.mark.slow])], indirect=True
)
def test_many_new_indices_that_have_no_room_together_are_not_begun(small: Host) -> None:
    kept = names(small)
    # Each of them has room, all together have not.
    for n in range(8):
        grow(small.node, f"new-{n}", 300)
    ended = small.run("run_backup", "elasticsearch")
    assert (ended.code, "MiB for what a snapshot may add are needed" in ended.err) == (5, True), ended.text
    # What is live would be saved first, all of it: the plan says so before anything is changed.
    small.node.request(
        "PUT", f"/_snapshot/{REPOSITORY}/by-hand?wait_for_completion=true", {"indices": "forms"}
    )
    for index in ("forms", "cases"):
        grow(small.node, index, 400)
    files = sorted(small.repository.rglob("*"))
    ended = small.restore(min(kept), "--dry-run")
    assert (ended.code, "MiB for what a snapshot may add are needed" in ended.err) == (5, True), ended.text
    assert (
        small.run("restore_backup", "elasticsearch", min(kept), "--indices", "forms", "--dry-run").code == 0
    )
    assert sorted(small.repository.rglob("*")) == files
    assert names(small) >= kept


def test_a_repository_without_room_for_the_largest_index_is_not_filled(small: Host) -> None:
    kept, files = names(small), sorted(small.repository.rglob("*"))
    grow(small.node, "forms", 1500)
    before = contents(small.node)
    for words in (("run_backup", "elasticsearch"), ("run_backup", "elasticsearch", "--dry-run")):
        ended = small.run(*words)
        assert ended.code == 5, ended.text
        assert re.search(
            rf"{re.escape(str(small.repository))} has [\d.]+ (KiB|MiB) free, [\d.]+ MiB for what a "
            "snapshot may add are needed",
            ended.err,
        ), ended.err
        assert "prune_backups elasticsearch" in ended.err
    restored = small.restore(min(kept))
    assert (restored.code, "prune_backups elasticsearch" in restored.err) == (5, True), restored.text
    assert (names(small), sorted(small.repository.rglob("*"))) == (kept, files)
    assert contents(small.node) == before
    assert not list(small.records.glob(".*.note.json"))
    small.node.request("DELETE", "/forms")
    small.good("run_backup", "elasticsearch", "--accept-shrink")
    assert len(names(small)) == 2


# The run itself is killed right before its n-th request, in a child.

RUN = "20261124T000000Z-es0-elasticsearch"


def job(host: Host, verb: str, request: Any) -> Job:
    with override_settings(HQ_BACKUPS=host.settings, SERVER_ENVIRONMENT=ENV):
        config = conf.resolve().config(("elasticsearch",))
    return Job(verb, config, to_plain(request), RUN)


def killed_before(
    work: Job, step: int, wanted: Callable[[str], bool] = lambda text: True, *, after: str = ""
) -> bool:
    """Run a job in a child that is killed before its step-th request that is wanted; tell whether it was.

    With ``after``, only requests after the first one of that method count.
    """
    pid = os.fork()
    if pid == 0:
        real: Send = Cluster._send
        count, begun = 0, not after

        def send(self: Cluster, method: str, url: str, body: Any, seconds: float) -> Any:
            nonlocal count, begun
            count += begun and wanted(f"{method} {url}")
            begun = begun or method == after
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(self, method, url, body, seconds)

        Cluster._send = send  # type: ignore[method-assign]
        try:
            run_job(work, lambda event: None)
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


EVERY = [("", n, "") for n in range(1, 140)]


def points(*some: tuple[str, int, str]) -> pytest.MarkDecorator:
    """Kill before some requests: the n-th of a kind, all kinds after the first of a method; or before every one."""
    every = pytest.param(EVERY, marks=pytest.mark.slow)
    return pytest.mark.parametrize("at_points", [list(some), every], ids=["some", "every-request"])


def killed_at(work: Job, point: tuple[str, int, str]) -> bool:
    part, step, after = point
    killed = killed_before(work, step, lambda text: part in text, after=after)
    assert killed or point in EVERY, point
    return killed


@on_both
@points(("", 4, ""), ("PUT", 1, ""), ("", 1, "PUT"), ("", 3, "PUT"), ("/_stats", 1, "PUT"))
def test_a_backup_killed_at_any_request_leaves_the_last_good_one_and_the_next_is_good(
    host: Host, at_points: list[tuple[str, int, str]]
) -> None:
    host.good("run_backup", "elasticsearch")
    first = names(host)
    work = job(host, "backup", BackupRequest("elasticsearch", "daily"))
    killed = 0
    for point in at_points:
        if not killed_at(work, point):
            break
        killed += 1
        host.good("run_backup", "elasticsearch")
        listed = host.good("list_backups", "elasticsearch")
        assert "BAD" not in listed.out
        assert "unmanaged" not in listed.out
        assert first <= names(host)
        assert not list(host.records.glob(".*.note.json"))
    assert killed >= 5


# cases: a trial of the backup, one of what saved it, then in place; users.2024: a trial, then in place.
@on_both
@points(
    ("_restore?", 1, ""), ("/_close", 1, ""), ("_restore?", 3, ""), ("_restore?", 4, ""), ("_restore?", 5, "")
)
def test_a_restore_killed_at_any_request_is_taken_back(
    host: Host, at_points: list[tuple[str, int, str]]
) -> None:
    host.good("run_backup", "elasticsearch")
    (name,) = names(host)
    host.node.bulk("cases", {"late": {"name": "late"}})
    host.node.request("DELETE", "/users.2024")
    before = contents(host.node)
    request = RestoreRequest(Selection("elasticsearch", name), indices=("cases", "users.2024"))
    killed, undone = 0, 0
    for point in at_points:
        if not killed_at(job(host, "restore", request), point):
            break
        killed += 1
        notes = [json.loads(p.read_bytes()) for p in host.records.glob(".*.restore.note.json")]
        if any(note["open"] for note in notes):
            refused = host.restore(name)
            assert (refused.code, "--undo" in refused.err) == (5, True), refused.text
            ended = host.restore("--undo")
            assert ended.code == 0, (point, ended.text)
            undone += 1
        else:
            host.good("verify_backup", name, "--deep")
        assert contents(host.node) == before, point
    assert killed >= 5
    assert undone >= 4


def test_a_drill_that_was_killed_is_cleaned_up_by_the_next_run(host: Host) -> None:
    host.good("run_backup", "elasticsearch")
    (name,) = names(host)
    before = host.node.indices()
    work = job(host, "verify", VerifyRequest(Selection("elasticsearch", name), deep=True))
    left = 0
    for step in range(9, 24, 2):
        assert killed_before(work, step)
        left += any(index.startswith("hqb-scratch-") for index in host.node.indices())
        ended = host.good("run_backup", "elasticsearch")
        assert host.node.indices() == before, ended.text
    assert left
