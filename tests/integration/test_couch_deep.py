"""The deep check of a CouchDB backup: a node of our own is started on the copy, and never stays."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from hq_backups.engine.couch import proc, scratch, serving
from hq_backups.engine.errors import Exit
from hq_backups.engine.requests import Selection, VerifyRequest
from tests.faults.engine_process import Engine
from tests.integration.couch_helpers import CouchHost
from tests.integration.pg_helpers import Outcome, tree
from tests.testbed.couch import RELEASE, CouchNode
from tests.testbed.couch_data import FIXTURE_NODE, expected, make_data_dir
from tests.testbed.couch_release import make_release
from tests.testbed.process import LOOPBACK, wait_until

Make = Callable[..., CouchNode]
DEEP = VerifyRequest(Selection("couch", "latest"), deep=True)
LOOPBACKS = {"0100007F", "00000000000000000000000001000000"}
"""As /proc writes 127.0.0.1 and ::1."""


def with_release(host: CouchHost, *options: str, **made: str) -> CouchHost:
    """Return a host with a release to start nodes from: the real one, if there is one and it need not fail."""
    named = os.environ.get(RELEASE)
    if named and not options and not made:
        return host.but(options={"release_dir": named})
    place = host.couch.workdir / "release"
    shutil.rmtree(place, ignore_errors=True)
    return host.but(options={"release_dir": str(make_release(place, *options, **made))})


def backed(
    couch_node: Make, docs: Mapping[str, list[dict[str, Any]]] | None = None, *, up: bool = False
) -> CouchHost:
    """Return a host with a backup of a few documents and a view; its node is down unless ``up``."""
    node = couch_node(start=False)
    view = {"_id": "_design/cases", "views": {"all": {"map": "function (doc) { emit(doc._id, null); }"}}}
    made = {"commcarehq": [view, *({"_id": f"doc-{n}"} for n in range(8))], **(docs or {})}
    make_data_dir(node.data_dir, made, os_user=node.os_user)
    if up:
        node.start()
    host = CouchHost(node)
    host.good_backup()
    return host


def deep(host: CouchHost, *, as_owner: bool = False) -> Outcome:
    """Verify, and look that nothing is left of it, running or on disk, nor changed in the release."""
    before = tree(Path(host.options["release_dir"]))
    done = host.run_as_owner("verify", DEEP) if as_owner else host.verify(deep=True)
    assert not scratch_processes(host)
    assert not list(host.backups.glob(".verify-*"))
    assert tree(Path(host.options["release_dir"])) == before
    return done


def scratch_processes(host: CouchHost) -> list[int]:
    """Return the processes of scratch nodes below a host's backup directory."""
    wanted = b"HOME=" + os.fsencode(host.backups) + b"/.verify-"
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if any(word.startswith(wanted) for word in words):
            found.append(int(path.name))
    return found


def test_a_node_of_our_own_serves_the_copy(couch_node: Make) -> None:
    host = CouchHost(couch_node("t1"))
    host.good_backup()
    host = with_release(host)
    done = deep(host, as_owner=True)
    assert done.code is Exit.OK, done
    served = [check["message"] for check in done.of("check") if check["name"] == "serving"]
    documents = sum(told["doc_count"] for db, told in expected("t1").items() if db != "_replicator")
    (message,) = served
    assert f"with {documents} documents" in message
    assert "not-served" not in done.warnings


def test_without_a_release_it_is_said_what_was_not_checked(couch_node: Make) -> None:
    done = backed(couch_node).run_as_owner("verify", DEEP)
    assert done.code is Exit.OK, done
    assert done.warnings == {"not-served"}
    assert "couchdb_release_dir" in str(done)


def test_the_node_is_apart_from_every_other(couch_node: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    host = with_release(backed(couch_node))
    seen: dict[str, object] = {}

    def look(node: object, *rest: object) -> int:
        """Look at the running node instead of its views."""
        (home,) = host.backups.glob(".verify-*/node")
        pids = list(proc.at_home(home))
        seen["listening"] = {address for pid in pids for address in listening(pid)}
        seen["argv"] = b" ".join(Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids)
        seen["ini"], seen["args"] = (home / "local.ini").read_text(), (home / "vm.args").read_text()
        seen["modes"] = {path.name: path.stat().st_mode & 0o777 for path in (home, *home.iterdir())}
        seen["cookie"] = (home / ".erlang.cookie").read_text()
        seen["membership"] = node.membership()  # type: ignore[attr-defined]
        return 0

    monkeypatch.setattr(serving, "read_views", look)
    done = host.verify(deep=True)
    assert done.code is Exit.OK, done
    assert len(seen["listening"]) >= 3, "the mapper of ports, the distribution, HTTP"  # type: ignore[arg-type]
    assert {address.split(":")[0] for address in seen["listening"]} <= LOOPBACKS  # type: ignore[attr-defined]
    ports = {int(address.split(":")[1], 16) for address in seen["listening"]}  # type: ignore[attr-defined]
    assert not ports & {4369, 5984, 5986, 15984}
    name = seen["membership"]["all_nodes"][0]  # type: ignore[index]
    assert seen["membership"] == {"all_nodes": [name], "cluster_nodes": [name]}
    assert name.startswith("hqb-")
    password = str(seen["ini"]).split("hq_backups = ")[1].split("\n")[0].split(",")[0]
    for secret in (password, str(seen["cookie"])):
        assert secret.encode() not in seen["argv"]  # type: ignore[operator]
    assert "setcookie" not in str(seen["args"])
    assert all(mode & 0o077 == 0 for name, mode in seen["modes"].items() if name != "log")  # type: ignore[attr-defined]


def listening(pid: int) -> Iterator[str]:
    """Yield the addresses on which a process listens, as /proc writes them."""
    sockets = {os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.is_symlink()}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in sockets:
                yield words[1]


def test_databases_of_replications_are_not_opened(couch_node: Make) -> None:
    job = {
        "_id": "job",
        "source": "http://127.0.0.1:9/a",
        "target": "http://127.0.0.1:9/b",
        "continuous": True,
    }
    host = backed(couch_node, {"team/_replicator": [job]})
    # The stand-in fails when anything touches them.
    host = with_release(host, "--fail", r"^/(_replicator|team%2F_replicator)", "--fail", r"PUT .*_replicator")
    done = deep(host)
    assert done.code is Exit.OK, done
    (message,) = [check["message"] for check in done.of("check") if check["name"] == "serving"]
    assert "nor was _replicator; team/_replicator opened" in message


def test_one_node_s_part_of_a_cluster_is_told_as_such(couch_node: Make) -> None:
    node = couch_node(start=False)
    docs = {"commcarehq": [{"_id": f"doc-{n}"} for n in range(8)]}
    make_data_dir(node.data_dir, docs, nodes=(FIXTURE_NODE, "couchdb@10.0.0.2"), os_user=node.os_user)
    host = CouchHost(node)
    assert host.backup().code is Exit.OK
    done = deep(with_release(host))
    assert done.code is Exit.OK, done
    assert done.warnings == {"part-only"}


# Damage


def test_a_node_that_counts_a_document_less_makes_it_a_bad_backup(couch_node: Make) -> None:
    host = with_release(backed(couch_node), "--lose", "commcarehq")
    assert host.verify().code is Exit.OK
    done = deep(host)
    assert done.code is Exit.BAD_BACKUP, done
    assert "served by a node, database 'commcarehq' has" in done.error


def test_a_manifest_that_promises_a_document_more_is_seen_by_deep_only(couch_node: Make) -> None:
    host = with_release(backed(couch_node))
    path = host.backups / f".{host.artifact.name}.json"
    manifest = json.loads(path.read_text())
    shard, counts = next((s, c) for s, c in manifest["source"]["shards"].items() if "/commcarehq." in s)
    manifest["source"]["shards"][shard] = [counts[0] + 1, *counts[1:]]
    manifest["source"]["databases"]["commcarehq"]["doc_count"] += 1
    path.write_text(json.dumps(manifest))
    assert host.verify().code is Exit.OK
    done = deep(host)
    assert done.code is Exit.BAD_BACKUP, done
    assert "commcarehq" in done.error


def test_a_document_damaged_before_the_backup_is_seen_by_deep_only(couch_node: Make) -> None:
    node = couch_node(start=False)
    docs = [{"_id": f"doc-{n}", "text": f"needle-{n} " * 20} for n in range(8)]
    make_data_dir(node.data_dir, {"commcarehq": docs}, os_user=node.os_user)
    shard = next(p for p in node.data_dir.glob("shards/*/commcarehq.*") if b"needle-3" in p.read_bytes())
    shard.write_bytes(shard.read_bytes().replace(b"needle-3", b"noodle-3", 1))
    host = CouchHost(node)
    assert host.backup().code is Exit.OK
    host = with_release(host)
    assert host.verify().code is Exit.OK
    done = deep(host)
    assert done.code is Exit.BAD_BACKUP, done
    assert shard.name in done.error


def test_a_database_that_a_node_cannot_open_makes_it_a_bad_backup(
    couch_node: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "OPEN_SECONDS", 0.5)
    host = with_release(backed(couch_node), "--fail", "^/commcarehq$")
    done = host.verify(deep=True)
    assert done.code is Exit.BAD_BACKUP, done
    assert "cannot open all of it" in done.error


def test_a_view_that_fails_is_told_and_is_no_damage(couch_node: Make) -> None:
    host = with_release(backed(couch_node), "--fail", "/_view/")
    done = deep(host)
    assert done.code is Exit.ERROR, done
    assert "Read the same view of the original" in done.error


# Nodes that fail


def test_a_node_that_does_not_start_is_told_by_its_log_and_is_no_damage(couch_node: Make) -> None:
    host = with_release(backed(couch_node), "--die", "{shutdown,{failed_to_start_child,config,no_license}}")
    done = deep(host)
    assert done.code is Exit.ERROR, done
    assert "no_license" in done.error
    assert "says nothing against the backup" in done.error


def test_a_full_disk_of_the_node_is_told_as_such(couch_node: Make) -> None:
    host = with_release(backed(couch_node), "--die", "could not write: enospc")
    done = deep(host)
    assert done.code is Exit.ERROR, done
    assert "no space left" in done.error


def test_a_node_that_never_answers_is_given_up(couch_node: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "START_SECONDS", 1.0)
    host = with_release(backed(couch_node), "--refuse")
    done = host.verify(deep=True)
    assert done.code is Exit.ERROR, done
    assert "did not answer within 1 seconds" in done.error
    assert not scratch_processes(host)


def test_a_port_that_somebody_took_is_not_the_end(couch_node: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    host = with_release(backed(couch_node))
    real = scratch._free_ports
    with socket.create_server((LOOPBACK, 0)) as somebody:
        taken = [somebody.getsockname()[1]]

        def first_taken(count: int) -> list[int]:
            mapper, port = real(count)
            return [mapper, taken.pop() if taken else port]

        monkeypatch.setattr(scratch, "_free_ports", first_taken)
        done = host.verify(deep=True)
    assert done.code is Exit.OK, done
    assert not taken


# Release directories that are none


@pytest.mark.parametrize(
    ("lacking", "words"),
    [
        ("releases/start_erl.data", "No such file"),
        ("bin/couchdb", "bin/couchdb is not there"),
        ("etc/default.ini", "default.ini is not there"),
        ("erts-14.2.5/bin/epmd", "epmd is not there"),
    ],
)
def test_a_directory_that_is_no_release_is_refused_before_anything_is_unpacked(
    couch_node: Make, lacking: str, words: str
) -> None:
    host = backed(couch_node)
    place = make_release(host.couch.workdir / "release")
    (place / lacking).unlink()
    host = host.but(options={"release_dir": str(place)})
    before = tree(host.backups)
    done = host.run_as_owner("verify", DEEP)
    assert done.code is Exit.PREFLIGHT, done
    assert words in done.error
    assert "Set couchdb_release_dir to" in done.error
    assert tree(host.backups) == before
    assert host.verify().code is Exit.OK


def test_a_release_that_is_older_than_the_backup_is_refused(couch_node: Make) -> None:
    host = with_release(backed(couch_node, up=True), version="2.3.1")
    done = deep(host)
    assert done.code is Exit.PREFLIGHT, done
    assert "cannot read its files" in done.error


# Killed


@pytest.fixture
def interrupted(couch_node: Make) -> Iterator[tuple[CouchHost, Engine]]:
    """Yield a host and the engine that deeply verifies there, its node up and asked something without an answer."""
    host = with_release(backed(couch_node), "--hang", "/_view/")
    with Engine(host.job("verify", DEEP), host.couch.os_user, host.couch.workdir) as engine:
        wait_until(
            lambda: any(event.get("name") == "adopt" for event in engine.said()), what="the node", timeout=60
        )
        try:
            yield host, engine
        finally:
            engine.kill()
            for pid in scratch_processes(host):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def test_the_node_ends_with_an_engine_that_is_killed(interrupted: tuple[CouchHost, Engine]) -> None:
    host, engine = interrupted
    assert scratch_processes(host)
    engine.kill()
    wait_until(lambda: not scratch_processes(host), what="the node's end", timeout=10)


@pytest.mark.parametrize("verb", ["verify", "backup"])
def test_a_node_whose_watcher_died_too_is_ended_by_the_next_run(
    interrupted: tuple[CouchHost, Engine], verb: str
) -> None:
    host, engine = interrupted
    running = scratch_processes(host)
    watchers = [pid for pid in running if b"hqb-tied" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(watchers) == 2
    for pid in watchers:
        os.kill(pid, signal.SIGKILL)
    engine.kill()
    engine.process.wait()
    assert len(scratch_processes(host)) == 2
    host = with_release(host)
    done = host.run_as_owner("verify", DEEP) if verb == "verify" else host.backup("manual")
    assert done.code is Exit.OK, done
    assert any("left by a verify that died" in step["message"] for step in done.of("step"))
    assert not scratch_processes(host)
    assert not list(host.backups.glob(".verify-*"))


def test_a_cancelled_check_leaves_nothing(interrupted: tuple[CouchHost, Engine]) -> None:
    host, engine = interrupted
    engine.cancel()
    assert engine.wait(30).kind("error")[0]["code"] == "Cancelled"
    assert not scratch_processes(host)
    assert not list(host.backups.glob(".verify-*"))
