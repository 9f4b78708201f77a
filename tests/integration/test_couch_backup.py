"""Backups of a running CouchDB node, local and in a bucket."""

from __future__ import annotations

import os
import resource
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from hq_backups.engine.couch import copying, limits, snapshot
from hq_backups.engine.errors import Exit
from tests.integration.couch_helpers import CouchHost
from tests.testbed.couch import CouchNode
from tests.testbed.couch_data import FIXTURE_NODE, expected
from tests.testbed.s3 import S3Service

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


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait less for a database that stays broken."""
    monkeypatch.setattr(copying, "PAUSE", 0.01)


def test_it_reaches_the_bucket_and_comes_back_from_there(
    couch_node: Make, s3: S3Service, bucket: str
) -> None:
    host = CouchHost(couch_node("t0"), s3, bucket)
    done = host.good_backup("weekly")
    assert done.key.startswith("couchdb_weekly_")
    host.artifact.unlink()
    assert host.verify(done.manifest["name"], select={"source": "s3"}).code is Exit.OK


def test_a_seed_user_s_tar_unpacks_it(couch_node: Make, tmp_path: Path) -> None:
    host = CouchHost(couch_node("t1"))
    host.good_backup()
    subprocess.run(["tar", "-xzf", host.artifact, "-C", tmp_path], check=True)
    names = {str(p.relative_to(tmp_path)): p.stat().st_size for p in tmp_path.rglob("*") if p.is_file()}
    there = {str(p.relative_to(host.data)): p.stat().st_size for p in host.data.rglob("*") if p.is_file()}
    assert names == there


def test_a_node_that_does_not_answer_costs_its_facts_only(couch_node: Make) -> None:
    host = CouchHost(couch_node("t0"))
    host.couch.stop()
    done = host.good_backup()
    assert done.warnings == {"node-silent"}
    source = done.manifest["source"]
    assert "node" not in source
    assert source["of_node"] == FIXTURE_NODE
    assert source["databases"]["commcarehq"]["doc_count"] == expected("t0")["commcarehq"]["doc_count"]


def test_what_couchdb_throws_away_itself_is_left_out_and_strange_files_are_told(couch_node: Make) -> None:
    host = CouchHost(couch_node("t0"))
    shard = next(host.data.glob("shards/*/commcarehq.*.couch"))
    (host.data / ".delete").mkdir(exist_ok=True)
    (host.data / ".delete" / "abc").write_bytes(b"x")
    shard.with_name(shard.name + ".compact.data").write_bytes(b"x")
    (host.data / "notes.txt").write_bytes(b"x")
    done = host.good_backup()
    assert done.warnings == {"left-out"}
    assert not [
        n for n in done.manifest["source"]["files"] if ".delete" in n or "compact" in n or "notes" in n
    ]


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("harm", ["missing", "empty", "headless"])
def test_a_database_that_would_come_up_empty_is_no_backup(couch_node: Make, harm: str) -> None:
    host = CouchHost(couch_node("t0"))
    good = host.good_backup("manual")
    host.couch.stop()
    shard = next(host.data.glob("shards/*/commcarehq.*.couch"))
    if harm == "missing":
        shard.unlink()
    else:
        shard.write_bytes(b"" if harm == "empty" else b"\x00" * 9000)
    done = host.backup()
    assert done.code is Exit.ERROR, done
    assert "commcarehq" in done.error
    assert ("has no file" if harm == "missing" else "has no header") in done.error
    assert [e["name"] for e in host.catalog()] == [good.manifest["name"]]
    assert not host.leftovers()


def refused_when(
    host: CouchHost, monkeypatch: pytest.MonkeyPatch, harm: Callable[[], None], why: str
) -> None:
    """Demand that a backup fails and leaves nothing when harm is done between the snapshot and its reading."""
    stream = copying.CouchStream

    def harmed(*args: object) -> object:
        made = stream(*args)  # type: ignore[arg-type]
        harm()
        return made

    monkeypatch.setattr(copying, "CouchStream", harmed)
    done = host.backup()
    assert done.code is Exit.ERROR, done
    assert why in done.error
    assert not list(host.backups.glob("couchdb_*"))


def test_a_file_that_gets_shorter_while_it_is_read_fails_the_run(
    couch_node: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = CouchHost(couch_node("t0"))
    view = next(host.data.rglob("*.view"))
    refused_when(host, monkeypatch, lambda: os.truncate(view, 100), "ends at byte 100")


@pytest.mark.parametrize(("pattern", "offset"), [("_dbs.couch", 4200), ("shards/*/commcarehq.*.couch", -40)])
def test_what_was_looked_at_is_what_passed(
    couch_node: Make, monkeypatch: pytest.MonkeyPatch, pattern: str, offset: int
) -> None:
    host = CouchHost(couch_node("t0"))

    def flip() -> None:
        with next(host.data.glob(pattern)).open("r+b") as file:
            at = file.seek(offset, os.SEEK_SET if offset > 0 else os.SEEK_END)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1]))

    refused_when(host, monkeypatch, flip, "another than when it began")


def test_another_directory_than_couchdb_s_is_refused(couch_node: Make) -> None:
    host = CouchHost(couch_node("t0"))
    place = host.couch.workdir / "place"
    place.mkdir()
    elsewhere = host.but(store={"data_dir": place})
    assert "is not in it" in elsewhere.backup().error
    (place / "commcarehq.couch").write_bytes(b"x")
    done = elsewhere.backup()
    assert done.code is Exit.PREFLIGHT
    assert "CouchDB 1" in done.error


def test_a_node_of_another_name_than_the_files_is_told(couch_node: Make) -> None:
    host = CouchHost(couch_node("t0", node_name="couchdb@restored.example"))
    assert "other-node" in host.good_backup().warnings


def test_a_linked_tree_is_refused_for_its_files_would_be_missing(couch_node: Make) -> None:
    host = CouchHost(couch_node("t0"))
    host.couch.stop()
    (host.data / "shards").rename(host.couch.workdir / "elsewhere")
    (host.data / "shards").symlink_to(host.couch.workdir / "elsewhere")
    done = host.backup()
    assert done.code is Exit.PREFLIGHT
    assert "symbolic link" in done.error


def test_too_many_files_for_the_limit_is_told_with_the_line_to_set(
    couch_node: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = CouchHost(couch_node("t0"))
    monkeypatch.setattr(limits.resource, "getrlimit", lambda _: (64, 128))

    def refuse(*_: object) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(limits.resource, "setrlimit", refuse)
    done = host.backup()
    assert done.code is Exit.PREFLIGHT
    assert "hard nofile" in done.error
    assert "LimitNOFILE=" in done.error


def test_a_low_soft_limit_is_raised(couch_node: Make) -> None:
    host = CouchHost(couch_node("t0"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
    try:
        assert host.backup().code is Exit.OK
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > limits.SPARE
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_files_that_never_stand_still_end_in_an_error(
    couch_node: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "PAUSE", 0)
    host = CouchHost(couch_node("t0"))
    real = snapshot.listed
    number = 0

    def listed(root: Path) -> snapshot.Listing:
        nonlocal number
        number += 1
        (root / "shards" / "00000000-7fffffff" / f"made-{number}.1.couch").write_bytes(b"")
        return real(root)

    monkeypatch.setattr(snapshot, "listed", listed)
    done = host.backup()
    assert done.code is Exit.ERROR
    assert "faster than they can be opened" in done.error


@pytest.mark.parametrize("harm", ["flip", "swap", "drop"])
def test_verify_compares_every_file_with_the_manifest(couch_node: Make, harm: str) -> None:
    host = CouchHost(couch_node("t0"))
    host.good_backup()
    assert host.verify().code is Exit.OK
    manifest = host.backups / f".{host.artifact.name}.json"
    text = manifest.read_text()
    if harm == "flip":
        sums = [line for line in text.splitlines() if '"sha256"' in line]
        text = text.replace(sums[-1], sums[-1].replace(sums[-1][-20:-10], "0123456789"), 1)
    elif harm == "swap":
        text = text.replace('"shards/', '"shards/x', 1)
    else:
        text = text.replace('"_users.couch": {', '"_other.couch": {')
    manifest.write_text(text)
    done = host.verify()
    assert done.code is Exit.BAD_BACKUP, done
