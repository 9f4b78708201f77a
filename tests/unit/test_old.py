"""An archive without a manifest is known by the marks in it, and hostile ones cost neither memory nor belief."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import pytest

from hq_backups.engine.archive import extract
from hq_backups.engine.errors import CorruptBackup, UnsafeArchive
from hq_backups.engine.events import Event, Events
from hq_backups.engine.postgres import old
from tests.factories import manifest
from tests.unit.test_archive import plain, special, tar

Member = tuple[str, bytes]
IDENTIFIER = 7_300_000_000_000_000_001
LABEL = b"START WAL LOCATION: 0/2000028 (file 000000010000000000000002)\nBACKUP FROM: %s\nSTART TIME: now\n"


def control(state: int = 1) -> bytes:
    head = IDENTIFIER.to_bytes(8, "little") + (1300).to_bytes(4, "little") + bytes(4)
    return head + state.to_bytes(4, "little") + bytes(8172)


def cluster(prefix: str = "", *, label: bytes | None = LABEL % b"primary", **files: bytes) -> list[Member]:
    """Return the members that mark a cluster, its databases first, as a directory may well give them."""
    made = {
        "base/5/PG_VERSION": b"15\n",
        "pg_wal/000000010000000000000002": bytes(1024),
        "global/pg_control": control(),
        "PG_VERSION": b"15\n",
        **({} if label is None else {"backup_label": label}),
        **{name.replace("__", "."): content for name, content in files.items()},
    }
    return [(prefix + name, content) for name, content in made.items()]


def walk(*members: Any) -> tuple[dict[str, Any], set[str]]:
    told: list[Event] = []
    events = Events(told.append)
    found = old.walk(plain(tar(*members)), events)
    return found, {e.data["code"] for e in told if e.kind == "warning"}


@pytest.mark.parametrize(
    ("prefix", "root"),
    [
        ("", ""),
        ("./", ""),
        ("opt/data/backups/postgresql/NAME/", "opt/data/backups/postgresql/NAME"),
        ("/opt/data/postgresql/9.6/main/", "opt/data/postgresql/9.6/main"),
        ("///srv/x/", "srv/x"),
    ],
)
def test_the_cluster_is_found_by_its_marks_and_unpacked_without_what_is_in_front(
    tmp_path: Path, prefix: str, root: str
) -> None:
    members = [*cluster(prefix), ("elsewhere/file" if root else prefix + "file", b"x")]
    found, warned = walk(*members)
    source = found["source"]
    assert (source["root"], source["version"], source["version_num"]) == (root, "15", 150000)
    assert source["system_identifier"] == str(IDENTIFIER)
    assert source["in_recovery"] is False
    assert (found["members"], found["wal_segments"], warned) == (6, 1, set())
    known = manifest(run="unmanaged-0123456789abcdef", source=source)
    extract(plain(tar(*members)), tmp_path, strip=old.wrapper(known))
    assert (tmp_path / "PG_VERSION").read_bytes() == b"15\n"
    there = {p.name for p in tmp_path.iterdir()}
    assert there == {"base", "pg_wal", "global", "PG_VERSION", "backup_label", *([] if root else ["file"])}


def test_only_a_surveyed_manifest_may_strip_directories() -> None:
    assert old.wrapper(manifest(source={"root": "opt/data"})) == ()


def test_a_wrapper_is_no_way_out_of_the_tree(tmp_path: Path) -> None:
    for name in ("a/../../b", "/a/../../b"):
        with pytest.raises(UnsafeArchive):
            walk(*cluster(), (name, b"x"))
        with pytest.raises(UnsafeArchive):
            extract(plain(tar((name, b"x"))), tmp_path, strip=("a",))


def test_a_cluster_inside_a_cluster_is_a_part_of_it() -> None:
    assert walk(*cluster("x/extracted/"), *cluster("x/"))[0]["source"]["root"] == "x"


@pytest.mark.parametrize(
    "changes",
    [
        {"standby__signal": b""},
        {"recovery__conf": b"standby_mode = on\n"},
        {"label": LABEL % b"standby"},
    ],
)
def test_a_standby_is_known_by_each_of_its_marks(changes: dict[str, bytes]) -> None:
    assert walk(*cluster(**changes))[0]["source"]["in_recovery"] is True


def test_a_copy_without_a_label_is_judged_by_the_state_of_its_server() -> None:
    assert walk(*cluster(label=None))[1] == set()
    assert walk(*cluster(label=None, postmaster__pid=b"1\n"))[1] == {"hot-copy"}
    running = [(n, control(6) if n == "global/pg_control" else c) for n, c in cluster(label=None)]
    assert walk(*running)[1] == {"hot-copy"}


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ([("a", b"x")], "PG_VERSION and global/pg_control is not in it"),
        ([*cluster("a/"), *cluster("b/")], "several clusters: a, b"),
        ([m for m in cluster() if "pg_wal" not in m[0]], "no WAL"),
        (cluster(label=LABEL.replace(b"0002)", b"0007)") % b"primary"), "from 000000010000000000000007 on"),
        (cluster(label=b"nothing"), "does not say where its WAL begins"),
        ([(n, b"" if n == "global/pg_control" else c) for n, c in cluster()], "pg_control is empty"),
        ([(n, b"\x1b[2Jfifteen" if n == "PG_VERSION" else c) for n, c in cluster()], "PG_VERSION says"),
        ([*cluster(), special("pg_tblspc/16385", tarfile.SYMTYPE, "/srv/x")], "pg_tblspc/16385"),
        ([*cluster("d/"), special("d/pg_wal", tarfile.SYMTYPE, "/srv/x")], "the WAL behind it"),
        ([*cluster(), special("log", tarfile.FIFOTYPE)], "log is neither file nor directory"),
        ([special("blobdb", tarfile.SYMTYPE, "/opt/shared")], "a symbolic link and nothing else"),
    ],
)  # fmt: skip
def test_what_cannot_be_restored_is_refused_with_the_cause(members: list[Any], says: str) -> None:
    with pytest.raises(CorruptBackup) as caught:
        walk(*members)
    assert says in caught.value.message
    assert caught.value.hint
    assert caught.value.message.isprintable()


@pytest.mark.parametrize("content", [b"15\n", b"x" * 16384], ids=["many", "large"])
def test_marks_without_end_are_refused_before_they_fill_the_memory(
    content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(old, "_MAX_NOTES", 300)
    many = 400 if len(content) < 100 else 6
    with pytest.raises(CorruptBackup, match="too many"):
        walk(*((f"{n}/PG_VERSION", content) for n in range(many)))


def test_only_what_names_the_old_primary_is_taken_out(tmp_path: Path) -> None:
    auto = tmp_path / "postgresql.auto.conf"
    kept = b"# Do not edit this file manually!\nwork_mem = '4MB'\nx.y = 'primary_conninfo = 1'\n\xff\n"
    auto.write_bytes(kept + b"primary_conninfo = 'host=pg0 password=s'\nPrimary_Slot_Name='x'\n")
    assert list(old.make_primary(tmp_path, manifest(source={"in_recovery": False}))) == []
    assert b"pg0" in auto.read_bytes()
    removed = list(old.make_primary(tmp_path, manifest(source={"in_recovery": True})))
    assert "postgresql.auto.conf" in removed[0]
    assert auto.read_bytes() == kept
    assert list(old.make_primary(tmp_path, manifest(source={"in_recovery": True}))) == []
