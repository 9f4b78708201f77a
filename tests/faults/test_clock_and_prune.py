"""Pruning with a clock that jumped back, after failed runs, and beside damaged artifacts."""

from __future__ import annotations

import json

import pytest

from tests.faults.producer import failing
from tests.faults.test_kills import aged
from tests.faults.victim import HostVictim, Victim

pytestmark = [pytest.mark.faults, pytest.mark.postgres15]
MODES = ("plain", "dump", "tablespaces", "blobdb", "couch")
DAY = 86400


def test_a_clock_set_back_lets_nothing_be_removed_and_says_why(victim: Victim) -> None:
    victim.run(victim.backup()).expect(0)
    names = aged(victim, [1, 2, 30])
    files = {n for n in victim.names() if not n.endswith(".verified.json")}
    for job in (victim.prune(), victim.prune(manual_older_than=0)):
        outcome = victim.run(job, {"clock": -3 * DAY}).expect(0)
        assert outcome.kind("pruned") == []
        assert {e["name"] for e in outcome.kind("kept")} == set(names)
        assert all("clock" in e["reason"] and "jumped back" in e["reason"] for e in outcome.kind("kept"))
    assert victim.names() == files
    # A backup made with that clock is good, and prunes nothing either.
    outcome = victim.run(victim.backup("weekly"), {"clock": -3 * DAY}).expect(0)
    assert outcome.kind("pruned") == []
    assert set(names) < {e["name"] for e in victim.good()}
    # When it is right again, the old ones go.
    assert [e["name"] for e in victim.run(victim.prune()).expect(0).kind("pruned")] != []
    assert {e["name"] for e in victim.good() if e["type"] == "daily"} == set(names[:2])


def test_a_single_manifest_from_the_future_stops_pruning(victim: Victim) -> None:
    victim.run(victim.backup()).expect(0)
    names = aged(victim, [3, 4])
    path = victim.backups / f".{names[1]}.json"
    manifest = json.loads(path.read_bytes())
    path.write_text(json.dumps({**manifest, "started_at": "2099-01-01T00:00:00Z"}))
    outcome = victim.run(victim.prune()).expect(0)
    assert outcome.kind("pruned") == []
    assert names[1] in outcome.kind("kept")[0]["reason"]


def test_failed_runs_remove_nothing_however_many(victim: HostVictim) -> None:
    victim.run(victim.backup()).expect(0)
    names = aged(victim, [2, 9])
    (victim.backups / names[0]).unlink()
    (victim.backups / f".{names[0]}.json").unlink()
    with failing(victim):
        for _ in range(2):
            assert victim.run(victim.backup()).expect(1).kind("pruned") == []
    assert [e["name"] for e in victim.good()] == names[1:]
    # Pruned by hand, the newest good one stays, old as it is.
    outcome = victim.run(victim.prune()).expect(0)
    assert [e["name"] for e in outcome.kind("pruned")] == names[2:]
    assert "newest good daily backup, which is never removed" in outcome.kind("kept")[0]["reason"]
    assert [e["name"] for e in victim.good()] == names[1:2]


def test_a_damaged_newer_artifact_does_not_stand_in_for_a_good_older_one(victim: Victim) -> None:
    victim.run(victim.backup()).expect(0)
    names = aged(victim, [3, 4, 5])
    for name in (names[0], names[1]):
        with (victim.backups / name).open("ab") as file:
            file.write(b"more than its manifest says")
    outcome = victim.run(victim.prune()).expect(0)
    assert {e["name"] for e in outcome.kind("kept")} == {names[0], names[2]}
    assert [e["name"] for e in victim.good()] == [names[2]]


def test_other_hosts_environments_and_types_are_counted_by_themselves(victim: Victim) -> None:
    victim.run(victim.backup()).expect(0)
    names = aged(victim, [3, 4, 5])
    for name, change in (
        (names[1], {"host": "pg1"}),
        (names[2], {"env": "india"}),
        (names[3], {"type": "weekly"}),
    ):
        path = victim.backups / f".{name}.json"
        path.write_text(json.dumps({**json.loads(path.read_bytes()), **change}))
    outcome = victim.run(victim.prune()).expect(0)
    assert outcome.kind("pruned") == []
    assert len(victim.good()) == 4
