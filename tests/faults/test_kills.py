"""kill -9 of the engine at step boundaries and at any moment; then what is left, and the next run.

``HQ_BACKUPS_TESTS_SWEEP=N`` kills at N steps and N moments of each verb instead of a few.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from hq_backups.engine.config import Job
from tests.faults.engine_process import Outcome
from tests.faults.victim import HostVictim, PostgresVictim, Victim
from tests.testbed.process import wait_until
from tests.testbed.s3 import S3Service

pytestmark = [pytest.mark.faults, pytest.mark.postgres15]
MODES = ("plain", "dump", "tablespaces", "blobdb", "couch")
SWEEP = int(os.environ.get("HQ_BACKUPS_TESTS_SWEEP", "0"))
SEED = 20261122
IN_SHORT = ("test_a_restore_killed_while_it_loads_leaves_no_server",)
ONLY = {
    # Only of these a deep verify starts a server.
    "test_a_deep_verify_that_is_killed_leaves_nothing_to_the_next_run": ("plain", "dump", "tablespaces"),
    "test_a_restore_killed_while_it_loads_leaves_no_server": ("dump",),
}


def steps_of(victim: Victim, job: Job) -> list[str]:
    """Do a job and return the calls in it that changed something, in order."""
    log = victim.tmp / "steps"
    victim.run(job, {"log": str(log)}).expect(0)
    steps = log.read_text().splitlines()
    log.unlink()
    return steps


def chosen(steps: Sequence[str], calls: tuple[str, ...], few: int) -> list[int]:
    """Return the numbers of some steps: all kinds in ``calls``, or with a sweep that many over all."""
    if SWEEP:
        return sorted({1 + round(i * (len(steps) - 1) / SWEEP) for i in range(SWEEP + 1)})
    telling = [n for n, step in enumerate(steps, 1) if step.split(" ")[0] in calls]
    return telling if len(telling) <= few else sorted(random.Random(SEED).sample(telling, few))


def run_of(outcome: Outcome) -> str:
    return str(outcome.events[0]["run"]) if outcome.events else "none"


class Chain:
    """Killed backups one after another: each comes upon what the one before has left."""

    def __init__(self, victim: Victim) -> None:
        self.victim = victim
        self.last = victim.good()[0]["run"]

    def killed(self, plan: Mapping[str, Any]) -> None:
        """Kill one; the last good one must be there, or this one whole in its place."""
        outcome = self.victim.run(self.victim.backup(), plan)
        if not outcome.killed:
            outcome.expect(0)
        self.check(outcome)

    def check(self, outcome: Outcome) -> None:
        self.victim.settled()
        self.last = self.victim.assert_survived({self.last, run_of(outcome)})
        in_bucket = self.victim.good("s3")
        assert in_bucket, "the bucket has no good backup any more"

    def ended(self) -> None:
        """Run undisturbed: nothing of the killed ones may be left."""
        outcome = self.victim.run(self.victim.backup()).expect(0)
        self.victim.assert_clean()
        assert self.victim.stray_temporaries() == []
        self.last = self.victim.assert_survived({run_of(outcome)})
        self.victim.assert_survived({self.last}, source="s3")


def test_a_backup_killed_between_any_two_steps(in_bucket: Victim) -> None:
    steps = steps_of(in_bucket, in_bucket.backup())
    chain = Chain(in_bucket)
    renames = [n for n, step in enumerate(steps, 1) if step.startswith("rename")]
    assert len(renames) >= 5, steps
    # From behind: the artifact's and the manifest's rename come first.
    for step in reversed(chosen(steps, ("rename",), 6)):
        chain.killed({"kill": step})
        if SWEEP:
            chain.ended()
    for step in chosen(steps, ("fsync", "unlink"), 2) if not SWEEP else ():
        chain.killed({"kill": step})
    chain.ended()


@pytest.mark.parametrize(
    ("operation", "moment"),
    [
        pytest.param("CreateMultipartUpload", "after", marks=pytest.mark.slow),
        pytest.param("CompleteMultipartUpload", "before", marks=pytest.mark.slow),
        ("CompleteMultipartUpload", "after"),
        pytest.param("PutObject", "after", marks=pytest.mark.slow),
    ],
)
def test_a_backup_killed_at_a_request_to_the_bucket(in_bucket: Victim, operation: str, moment: str) -> None:
    in_bucket.run(in_bucket.backup()).expect(0)
    chain = Chain(in_bucket)
    killed = in_bucket.run(in_bucket.backup(), {"s3": [operation, moment]})
    assert killed.killed
    chain.check(killed)
    chain.ended()


@pytest.mark.slow
def test_a_backup_killed_at_any_moment(in_bucket: Victim) -> None:
    began = time.monotonic()
    in_bucket.run(in_bucket.backup()).expect(0)
    duration = time.monotonic() - began
    chain, dice = Chain(in_bucket), random.Random(SEED)
    for _ in range(SWEEP or 2):
        with in_bucket.engine(in_bucket.backup()) as engine:
            kill_after(dice.uniform(0.1, duration), engine.process.poll)
            engine.kill()
            outcome = engine.wait()
        chain.check(outcome)
    chain.ended()


def kill_after(seconds: float, ended: Callable[[], int | None]) -> None:
    """Let a run go on for a while that the seed chose, or to its end."""
    deadline = time.monotonic() + seconds
    while ended() is None and time.monotonic() < deadline:
        time.sleep(0.005)


@pytest.fixture(params=[pytest.param("versioned", marks=pytest.mark.slow), "dated"])
def to_send(request: pytest.FixtureRequest, victim: Victim, s3: S3Service) -> Iterator[Victim]:
    """Give a bucket of either kind to a victim whose one backup is not in it yet."""
    bucket = s3.make_bucket(versioned=request.param == "versioned")
    victim.run(victim.backup()).expect(0)
    victim.use_bucket(s3, bucket)
    yield victim
    s3.remove_bucket(bucket)


def test_an_upload_killed_at_any_request_is_repeated_once(to_send: Victim) -> None:
    (entry,) = to_send.good()
    requests = [
        ("CreateMultipartUpload", "after"),
        ("UploadPart", "after"),
        ("CompleteMultipartUpload", "after"),
    ]
    for operation, moment in [*requests, ("PutObject", "before")]:
        assert to_send.run(to_send.upload(), {"s3": [operation, moment]}).killed
        to_send.assert_survived({entry["run"]})
        assert to_send.good("s3") == []
    to_send.run(to_send.upload()).expect(0)
    to_send.assert_clean()
    to_send.assert_survived({entry["run"]}, source="s3")
    # Not a second time what already stood there whole.
    assert sorted(to_send.objects().values()) == [1, 1]
    assert len(to_send.entries("all")) == 1


@pytest.mark.slow
def test_an_upload_killed_between_any_two_steps(to_send: Victim) -> None:
    (entry,) = to_send.good()
    for step in range(1, SWEEP or 14, 1 if SWEEP else 4):
        if not to_send.run(to_send.upload(), {"kill": step}).killed:
            break
        to_send.assert_survived({entry["run"]})
    to_send.run(to_send.upload()).expect(0)
    to_send.assert_clean()
    to_send.assert_survived({entry["run"]}, source="s3")


def aged(victim: Victim, days: Sequence[int]) -> list[str]:
    """Turn a victim's one backup into one more for each age; return the names, newest first."""
    from datetime import UTC, datetime, timedelta

    from hq_backups.engine import names
    from hq_backups.engine.manifest import load_manifest
    from tests.factories import manifest as make

    (entry,) = victim.good()
    real = load_manifest((victim.backups / f".{entry['name']}.json").read_bytes(), "the newest")
    made = [entry["name"]]
    for n, age in enumerate(days):
        then = datetime.now(UTC) - timedelta(days=age)
        name = names.local_name(victim.store, real.env, "daily", then, real.mode, real.codec)
        content = f"the backup of {age} days ago".encode()
        described = make(
            name, content, store=victim.store, mode=real.mode, env=real.env, host=real.host, run=f"run-{n}",
            started_at=f"{then:%Y-%m-%dT%H:%M:%SZ}", finished_at=f"{then:%Y-%m-%dT%H:%M:%SZ}",
            local_date=f"{then:%Y-%m-%d}",
        )  # fmt: skip
        for path, body in ((name, content), (f".{name}.json", described.to_json())):
            (victim.backups / path).write_bytes(body)
        made.append(name)
    return made


def test_a_prune_killed_between_any_two_steps(victim: Victim) -> None:
    victim.run(victim.backup()).expect(0)
    (entry,) = victim.good()
    names = aged(victim, [1, 2, 3, 4])
    assert [e["name"] for e in victim.good()] == names
    for step in range(1, 200):
        if not victim.run(victim.prune(), {"kill": step}).killed:
            break
        if step % 6 == 0 or SWEEP:
            victim.assert_survived({entry["run"]})
    victim.run(victim.prune()).expect(0)
    assert [e["name"] for e in victim.good()] == names[:2]
    # A manifest whose artifact was just removed is nothing, and nothing else may be there.
    assert victim.stray_files() <= {f".{name}.json" for name in names}


class Restored:
    """A server that is restored to an earlier state again and again, and always brought back from there."""

    def __init__(self, victim: Victim) -> None:
        self.victim = victim
        victim.run(victim.backup(upload=False)).expect(0)
        self.then = victim.fingerprint()
        victim.change_data()
        self.now = victim.fingerprint()
        assert self.then != self.now

    def beside(self) -> list[str]:
        """Return what lies beside the data directory that restores have made."""
        server = cast("HostVictim", self.victim).server
        return sorted(n for n in os.listdir(server.workdir) if n.startswith((".data.", "data.")))

    def assert_old_data(self) -> None:
        assert self.victim.is_serving()
        assert self.victim.fingerprint() == self.now

    def undone(self) -> None:
        """Demand that one undo brings the old data back, whatever was killed where."""
        outcome = self.victim.run(self.victim.undo())
        if outcome.status == 5:
            assert "there is no restore" in outcome.errors
        else:
            outcome.expect(0)
        self.assert_old_data()

    def ended(self) -> None:
        """Restore undisturbed: the new data serve, and nothing of killed ones is left."""
        self.victim.run(self.victim.restore()).expect(0)
        assert self.victim.fingerprint() == self.then
        self.victim.settled()
        assert [n for n in self.beside() if "staging" in n] == []
        self.victim.run(self.victim.undo()).expect(0)
        self.assert_old_data()


def test_a_restore_killed_between_any_two_steps(own_victim: Callable[..., Victim]) -> None:
    victim = own_victim()
    restored = Restored(victim)
    steps = steps_of(victim, victim.restore())
    assert victim.fingerprint() == restored.then
    restored.undone()
    moves = [
        n
        for n, s in enumerate(steps, 1)
        if s.startswith("rename") and ".journal" not in s and ".json" not in s
    ]
    assert len(moves) == 2, steps
    # Before the old data are set aside, between the two renames, and after the second one.
    some = chosen(steps, (), 0) if SWEEP else [moves[0], moves[1], moves[1] + 1, len(steps)]
    for step in some:
        assert victim.run(victim.restore(), {"kill": step}).killed
        victim.settled()
        restored.undone()
    restored.ended()


@pytest.mark.slow
def test_a_restore_killed_at_any_moment(own_victim: Callable[..., Victim]) -> None:
    victim = own_victim()
    restored = Restored(victim)
    dice, began = random.Random(SEED), time.monotonic()
    restored.ended()
    duration = time.monotonic() - began
    for _ in range(SWEEP or 2):
        with victim.engine(victim.restore()) as engine:
            kill_after(dice.uniform(0.2, duration / 2), engine.process.poll)
            engine.kill()
            engine.wait()
        victim.settled()
        restored.undone()
    restored.ended()


@pytest.mark.slow
def test_an_undo_killed_between_its_renames_is_repeated(own_victim: Callable[..., Victim]) -> None:
    victim = own_victim()
    restored = Restored(victim)
    victim.run(victim.restore()).expect(0)
    steps = steps_of(victim, victim.undo())
    restored.assert_old_data()
    moves = [
        n
        for n, s in enumerate(steps, 1)
        if s.startswith("rename") and ".journal" not in s and ".json" not in s
    ]
    for step in chosen(steps, (), 0) if SWEEP else [moves[0], moves[1]]:
        victim.run(victim.restore()).expect(0)
        assert victim.run(victim.undo(), {"kill": step}).killed
        restored.undone()


def test_a_deep_verify_that_is_killed_while_it_unpacks_leaves_nothing_to_the_next_run(victim: Victim) -> None:
    victim.run(victim.backup()).expect(0)
    (entry,) = victim.good()
    with victim.engine(victim.verify(deep=True)) as engine:
        unpacked = victim.backups.glob
        wait_until(lambda: any(unpacked(".verify-*/data/*")), what="the unpacking", interval=0.001)
        engine.kill()
        assert engine.wait().killed
    victim.settled()
    victim.assert_survived({entry["run"]})
    assert any(victim.backups.glob(".verify-*"))
    victim.run(victim.backup()).expect(0)
    victim.assert_clean()


@pytest.mark.parametrize("moment", ["starting", "counting"])
def test_a_deep_verify_that_is_killed_leaves_nothing_to_the_next_run(victim: Victim, moment: str) -> None:
    victim.run(victim.backup()).expect(0)
    (entry,) = victim.good()

    def reached(said: list[dict[str, Any]]) -> bool:
        steps = [e.get("name") for e in said if e["kind"] in ("step", "check")]
        return ("deep" if moment == "starting" else "count") in steps

    with victim.engine(victim.verify(deep=True)) as engine:
        wait_until(lambda: reached(engine.said()) or not engine.running, what=moment)
        engine.kill()
        assert engine.wait().killed
    # A server that it had started ends with it, and does not wait for the next run.
    victim.settled()
    if moment == "counting":
        wait_until(lambda: not victim.stray_temporaries(), what="the end of its socket's directory")
    victim.assert_survived({entry["run"]})
    # The next backup, not only the next deep verify: its unpacked tree may fill the disk.
    victim.run(victim.backup()).expect(0)
    victim.assert_clean()
    assert victim.stray_temporaries() == []


def test_a_restore_killed_while_it_loads_leaves_no_server(victim: PostgresVictim) -> None:
    victim.run(victim.backup()).expect(0)
    beside = victim.backups / "beside"
    with victim.engine(victim.restore(target_dir=beside)) as engine:
        wait_until(lambda: victim.is_filling(engine.said()) or not engine.running, what="the loading")
        assert (beside / "postmaster.pid").exists()
        engine.kill()
        assert engine.wait().killed
    victim.settled()
    assert not (beside / "postmaster.pid").exists()


def test_a_cancelled_backup_leaves_nothing(in_bucket: Victim) -> None:
    in_bucket.run(in_bucket.backup()).expect(0)
    (before,) = in_bucket.good()
    with in_bucket.engine(in_bucket.backup()) as engine:
        wait_until(lambda: any(in_bucket.backups.glob(".*.partial")), what="the backup's beginning")
        engine.cancel()
        outcome = engine.wait()
    outcome.expect(1)
    assert "Cancelled" in outcome.errors
    in_bucket.assert_clean()
    assert in_bucket.stray_temporaries() == []
    in_bucket.assert_survived({before["run"]})


def test_a_backup_whose_parent_is_gone_finishes(victim: Victim, tmp_path: Path) -> None:
    with victim.engine(victim.backup()) as engine:
        wait_until(lambda: any(victim.backups.glob(".*.partial")), what="the backup's beginning")
        assert engine.process.stdin is not None
        engine.process.stdin.close()
        engine.wait().expect(0)
        engine.process.stdin = None
    victim.assert_survived({victim.good()[0]["run"]})
    victim.assert_clean()
