"""Files of a repository damaged one kind at a time: each is found by the cheapest command that can find it.

And whatever is damaged, a restore from it leaves the live index as it was.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.es_helpers import Host, contents, fill, host_of
from tests.testbed.elasticsearch import ElasticsearchNode

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.elasticsearch6, pytest.mark.faults]

Damage = Callable[[Host, str], None]


@pytest.fixture
def host(es6: ElasticsearchNode) -> Iterator[Host]:
    """Return a host with two daily snapshots: the first is damaged, the second shares its files."""
    with host_of(es6) as made:
        fill(es6, documents=8)
        made.good("run_backup", "elasticsearch", "--type", "daily")
        es6.bulk("cases", {"later": {"name": "later", "parts": []}})
        made.good("run_backup", "elasticsearch", "--type", "daily")
        yield made


def names(host: Host) -> list[str]:
    return [str(entry["name"]) for entry in host.entries()]


def uuid_of(host: Host, name: str) -> str:
    listed = host.node.request(
        "GET", f"/_snapshot/{host.settings['deploy_env']}_es_snapshot/_all?verbose=false"
    )
    return str(next(s["uuid"] for s in listed["snapshots"] if s["snapshot"] == name))


def flip(path: Path) -> None:
    """Change one byte in the middle of a file."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    path.write_bytes(raw)


def blobs(host: Host) -> list[Path]:
    """Return the files of data, the largest first."""
    found = list(host.repository.glob("indices/*/*/__*"))
    assert found
    return sorted(found, key=lambda p: p.stat().st_size, reverse=True)


def newest_list(host: Host) -> Path:
    return max(host.repository.glob("index-*"), key=lambda p: int(p.name.removeprefix("index-")))


def segments_flipped(host: Host, first: str) -> None:
    for path in blobs(host):
        flip(path)


def segments_truncated(host: Host, first: str) -> None:
    for path in blobs(host):
        path.write_bytes(path.read_bytes()[:-1])


def segments_deleted(host: Host, first: str) -> None:
    for path in blobs(host):
        path.unlink()


def shards_flipped(host: Host, first: str) -> None:
    for path in host.repository.glob(f"indices/*/*/snap-{uuid_of(host, first)}.dat"):
        flip(path)


def shards_deleted(host: Host, first: str) -> None:
    for path in host.repository.glob(f"indices/*/*/snap-{uuid_of(host, first)}.dat"):
        path.unlink()


def index_metadata_deleted(host: Host, first: str) -> None:
    for path in host.repository.glob(f"indices/*/meta-{uuid_of(host, first)}.dat"):
        path.unlink()


def root_flipped(host: Host, first: str) -> None:
    flip(host.repository / f"snap-{uuid_of(host, first)}.dat")


def root_deleted(host: Host, first: str) -> None:
    (host.repository / f"snap-{uuid_of(host, first)}.dat").unlink()


def list_corrupt(host: Host, first: str) -> None:
    flip(newest_list(host))


def list_deleted(host: Host, first: str) -> None:
    newest_list(host).unlink()


def everything_deleted(host: Host, first: str) -> None:
    for path in host.repository.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def indices_deleted(host: Host, first: str) -> None:
    shutil.rmtree(host.repository / "indices")


def global_metadata_deleted(host: Host, first: str) -> None:
    (host.repository / f"meta-{uuid_of(host, first)}.dat").unlink()


def shard_lists_deleted(host: Host, first: str) -> None:
    lists = list(host.repository.glob("indices/*/*/index-*"))
    assert lists
    for path in lists:
        path.unlink()


def pointer_deleted(host: Host, first: str) -> None:
    (host.repository / "index.latest").unlink()


LIST, VERIFY, DEEP = "list", "verify", "deep"
DAMAGES: list[tuple[Damage, str]] = [
    (segments_flipped, DEEP),
    (segments_truncated, DEEP),
    (segments_deleted, DEEP),
    (shards_flipped, VERIFY),
    (shards_deleted, VERIFY),
    (index_metadata_deleted, VERIFY),
    (indices_deleted, VERIFY),
    (root_flipped, LIST),
    (root_deleted, LIST),
    (list_corrupt, LIST),
    (everything_deleted, LIST),
]


@pytest.mark.parametrize(("damage", "found_by"), DAMAGES, ids=[d.__name__ for d, _ in DAMAGES])
def test_it_is_found_by_the_cheapest_command_and_never_harms_what_is_live(
    host: Host, damage: Damage, found_by: str
) -> None:
    first, _ = names(host)
    damage(host, first)
    before = contents(host.node)

    listed = host.run("list_backups", "elasticsearch")
    bad = [line for line in listed.text.splitlines() if "BAD:" in line]
    shallow = host.run("verify_backup", first)
    deep = host.run("verify_backup", first, "--deep")
    restored = host.restore(first)

    assert bool(bad) == (found_by == LIST), listed.text
    if found_by == LIST:
        check = host.run("check_s3_backups", "elasticsearch")
        assert check.code in (1, 3), check.text
        assert "[ALERT]" in check.out or "[ERROR]" in check.out
    assert (shallow.code != 0) == (found_by in (LIST, VERIFY)), shallow.text
    assert deep.code in (1, 3), deep.text
    assert restored.code in (1, 3, 8), restored.text
    assert "  next: " in restored.err
    assert contents(host.node) == before


HARMLESS: list[Damage] = [global_metadata_deleted, shard_lists_deleted, pointer_deleted]


@pytest.mark.parametrize("damage", HARMLESS, ids=[d.__name__ for d in HARMLESS])
def test_what_no_restore_needs_is_no_alarm_and_stops_nothing(host: Host, damage: Damage) -> None:
    first, second = names(host)
    then, now = {str(n) for n in range(8)}, {*(str(n) for n in range(8)), "later"}
    damage(host, first)

    assert names(host) == [first, second]
    assert "BAD:" not in host.good("list_backups", "elasticsearch").text
    check = host.good("check_s3_backups", "elasticsearch")
    assert "[ALERT]" not in check.out
    for name in (first, second):
        host.good("verify_backup", name)
        host.good("verify_backup", name, "--deep")
    assert set(host.node.documents("cases")) == now
    restored = host.restore(first)
    assert restored.code == 0, restored.text
    assert set(host.node.documents("cases")) == then
    # What is taken afterwards is whole too.
    host.good("run_backup", "elasticsearch", "--type", "daily")
    host.good("verify_backup", names(host)[-1], "--deep")


def test_a_list_that_went_back_in_time_is_noticed_by_what_is_missing(host: Host) -> None:
    first, second = names(host)
    list_deleted(host, first)
    listed = host.run("list_backups", "elasticsearch")
    assert [line.split()[0] for line in listed.out.splitlines() if "missing in the repository" in line] == [
        second
    ]
    check = host.run("check_s3_backups", "elasticsearch", "--no-email")
    assert check.code == 3
    assert f"[ALERT] {second}: it is missing in the repository" in check.out
    assert host.restore(second).code == 3


def test_a_directory_that_is_not_there_is_an_alarm_and_all_is_well_when_it_is_back(host: Host) -> None:
    both = names(host)
    away = host.repository.rename(host.repository.with_name(f"{host.repository.name}-away"))
    before = contents(host.node)

    listed = host.run("list_backups", "elasticsearch")
    assert [
        line.split()[0] for line in listed.out.splitlines() if "missing in the repository" in line
    ] == both
    check = host.run("check_s3_backups", "elasticsearch", "--no-email")
    assert check.code == 3
    assert all(f"[ALERT] {name}: it is missing in the repository" in check.out for name in both)
    assert [host.run("verify_backup", name, *deep).code for name in both for deep in ((), ("--deep",))] == [
        3
    ] * 4
    assert host.restore(both[0]).code == 3
    assert contents(host.node) == before

    if host.repository.exists():
        shutil.rmtree(host.repository)
    away.rename(host.repository)
    assert names(host) == both
    assert host.run("check_s3_backups", "elasticsearch").code == 0
    host.good("verify_backup", both[1], "--deep")


def test_damaged_metadata_of_the_newest_snapshot_are_an_alarm_of_the_check(host: Host) -> None:
    _, second = names(host)
    assert host.run("check_s3_backups", "elasticsearch").code == 0
    shards_deleted(host, second)
    check = host.run("check_s3_backups", "elasticsearch")
    assert check.code == 3
    assert f"{second} is damaged" in check.out


def test_a_safety_snapshot_that_could_not_come_back_stops_the_restore_in_time(host: Host) -> None:
    first, _ = names(host)
    # Only what the second one added is damaged: the first is whole, what is live is saved into damaged files.
    old = set(blobs(host))
    host.node.bulk("cases", {"newest": {"name": "newest", "parts": []}})
    host.good("run_backup", "elasticsearch")
    added = [p for p in blobs(host) if p not in old]
    assert added
    for path in added:
        flip(path)
    before = contents(host.node)

    ended = host.restore(first, "--indices", "cases")

    assert ended.code == 8, ended.text
    assert "left as it was" in ended.err
    assert contents(host.node) == before


def test_a_damaged_snapshot_is_found_out_before_the_live_index_is_even_closed(host: Host) -> None:
    first, _ = names(host)
    host.node.request("DELETE", "/cases")
    host.node.bulk("cases", {"other": {"name": "of another index of that name"}})
    # Nothing of what is live comes from the damaged files, so only the trial can stop it in time.
    segments_flipped(host, first)
    uuid = host.node.request("GET", "/cases/_settings")["cases"]["settings"]["index"]["uuid"]

    ended = host.restore(first, "--indices", "cases")

    assert ended.code == 8, ended.text
    assert "left as it was" in ended.err
    assert list(host.node.documents("cases")) == ["other"]
    opened = [line for line in ended.out.splitlines() if "put back" in line]
    assert opened == []
    assert host.node.request("GET", "/cases/_settings")["cases"]["settings"]["index"]["uuid"] == uuid
