"""A producer that dies, however late and quietly, leaves nothing: no file, no object, no unfinished upload."""

from __future__ import annotations

import os
import signal
import tarfile
from collections.abc import Iterator
from typing import Any, cast

import pytest

from tests.faults.producer import FakeProducer, in_front
from tests.faults.victim import VICTIMS, HostVictim, processes
from tests.testbed.places import server_user
from tests.testbed.postgres import PostgresServer
from tests.testbed.process import short_directory, wait_until
from tests.testbed.s3 import S3Service

pytestmark = [pytest.mark.faults, pytest.mark.postgres15]
# CouchDB's files have no producer: test_source_files is about what can happen to them.
MODES = ("plain", "dump", "blobdb")
IN_SHORT = ("test_one_killed_after_its_last_byte_leaves_nothing",)
SERVERS = ("plain", "dump")
ONLY = {
    "test_one_that_stops_inside_a_member_s_header_leaves_nothing": ("plain",),
    "test_the_real_one_killed_leaves_nothing": SERVERS,
    "test_the_server_s_sender_killed_leaves_nothing": SERVERS,
    "test_a_server_stopped_at_once_in_the_middle_leaves_nothing": SERVERS,
}
MIB = 1 << 20
CUT = "its output is not whole"
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def attacked(server: PostgresServer, mode: str, s3: S3Service) -> Iterator[HostVictim]:
    """Return a victim with one good backup here and in a bucket; no attack of this module may change that."""
    bucket = s3.make_bucket(versioned=True)
    with short_directory(server_user()) as home:
        victim = VICTIMS[mode](home, server)
        victim.use_bucket(s3, bucket)
        victim.run(victim.backup()).expect(0)
        victim.assert_survived({victim.good()[0]["run"]}, source="s3")
        yield victim
    s3.remove_bucket(bucket)


@pytest.fixture
def fake(attacked: HostVictim) -> Iterator[FakeProducer]:
    """Put the fake producer in front of the real one, for the length of a test."""
    with in_front(attacked) as made:
        yield made


class Before:
    """What was there before an attack, and must be all that is there after it."""

    def __init__(self, victim: HostVictim) -> None:
        self.victim = victim
        (self.run,) = [e["run"] for e in victim.good("all")]
        self.objects = victim.objects()

    def assert_nothing_came(self) -> None:
        victim = self.victim
        assert victim.objects() == self.objects
        victim.assert_clean()
        assert [e["run"] for e in victim.entries("all")] == [self.run]
        victim.assert_survived({self.run})


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        # Late and quiet ones first: every byte came, or all but the end, or the status is a good one.
        pytest.param(
            {"status": 1, "say": "pg_basebackup: error: could not fsync"}, "could not fsync", id="all-then-1"
        ),
        pytest.param({"signal": 9}, "SIGKILL", id="all-then-kill-9"),
        pytest.param({"signal": 15}, "SIGTERM", id="all-then-kill-15", marks=slow),
        pytest.param({"close": True, "wait": 1.0, "status": 3}, "status 3", id="all-closed-then-3"),
        pytest.param(
            {"bytes": -512, "status": 0},
            CUT,
            id="half-an-end-and-0",
            marks=slow,
        ),
        pytest.param({"bytes": -1024, "status": 0}, CUT, id="no-end-and-0"),
        pytest.param({"bytes": -1, "status": 0}, CUT, id="last-byte-missing-and-0"),
        pytest.param({"bytes": 20 * MIB, "status": 0}, CUT, id="cut-and-0"),
        pytest.param({"bytes": 0, "status": 0}, CUT, id="nothing-and-0"),
        pytest.param({"bytes": 0, "status": 1}, "status 1", id="nothing-and-1", marks=slow),
        pytest.param({"bytes": 20 * MIB + 77, "signal": 9}, "SIGKILL", id="cut-and-kill-9", marks=slow),
    ],
)
def test_a_producer_that_dies_leaves_nothing(
    attacked: HostVictim, fake: FakeProducer, plan: dict[str, Any], said: str
) -> None:
    before = Before(attacked)
    fake.plan(**plan)
    assert said in attacked.run(attacked.backup()).expect(1).errors
    before.assert_nothing_came()


@pytest.mark.parametrize("status", [0, pytest.param(1, marks=slow)])
def test_one_that_stops_inside_a_member_s_header_leaves_nothing(
    attacked: HostVictim, fake: FakeProducer, status: int
) -> None:
    before = Before(attacked)
    (entry,) = attacked.good()
    with tarfile.open(attacked.backups / entry["name"]) as tar:
        late = next(m for m in tar.getmembers() if m.offset > 20 * MIB)
    fake.plan(bytes=late.offset + 300, status=status)
    said = attacked.run(attacked.backup()).expect(1).errors
    assert ("status 1" if status else "end of the archive") in said
    before.assert_nothing_came()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_one_killed_after_its_last_byte_leaves_nothing(
    attacked: HostVictim, fake: FakeProducer, number: signal.Signals
) -> None:
    before = Before(attacked)
    fake.plan(reached=True)
    with attacked.engine(attacked.backup()) as engine:
        wait_until(lambda: fake.reached or not engine.running, what="the last byte")
        os.kill(cast("int", fake.reached), number)
        assert number.name in engine.wait().expect(1).errors
    before.assert_nothing_came()


class Slow:
    """A real producer, the engine's own child, that is slow enough to be hit where one wants."""

    def __init__(self, victim: HostVictim, fake: FakeProducer) -> None:
        self.victim, self.fake = victim, fake
        fake.plan(rate="6M")

    def pid(self) -> int | None:
        server = str(self.victim.server.socket_dir)
        for pid, words in processes():
            is_real = words.split(" ")[0].endswith("/pg_basebackup") and "--max-rate" in words
            if server in words and (is_real or str(self.fake.program) in words):
                return pid
        return None

    def written(self) -> int:
        return max((p.stat().st_size for p in self.victim.backups.glob(".*.partial")), default=0)

    def wait_for(self, moment: str) -> int:
        """Wait until it has begun, or is in the middle; return its pid."""
        # Asked once more it may have no name for a moment: it executes another program.
        found: list[int] = []
        wait_until(lambda: found.extend(filter(None, [self.pid()])) or found, what="the producer")
        if moment == "middle":
            wait_until(lambda: self.written() > 17 * MIB, what="the middle of the backup")
        return found[0]


@pytest.mark.parametrize("moment", ["start", "middle"])
@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=slow)])
def test_the_real_one_killed_leaves_nothing(
    attacked: HostVictim, fake: FakeProducer, moment: str, number: signal.Signals
) -> None:
    before = Before(attacked)
    slow = Slow(attacked, fake)
    with attacked.engine(attacked.backup()) as engine:
        os.kill(slow.wait_for(moment), number)
        engine.wait().expect(1)
    before.assert_nothing_came()


@pytest.mark.parametrize("how", [pytest.param("terminate", marks=slow), "kill"])
def test_the_server_s_sender_killed_leaves_nothing(
    attacked: HostVictim, fake: FakeProducer, how: str
) -> None:
    before = Before(attacked)
    slow = Slow(attacked, fake)
    sender = f"SELECT pid FROM pg_stat_activity WHERE {attacked.copying} AND pid <> pg_backend_pid()"
    with attacked.engine(attacked.backup()) as engine:
        slow.wait_for("middle")
        pid = slow.victim.server.psql(sender)
        if how == "terminate":
            slow.victim.server.psql(f"SELECT pg_terminate_backend({pid})")
        else:
            os.kill(int(pid), signal.SIGKILL)  # the server restarts all its sessions after that
        engine.wait().expect(1)
    wait_until(lambda: slow.victim.server.psql("SELECT 1") == "1", what="the server to recover")
    before.assert_nothing_came()


def test_a_server_stopped_at_once_in_the_middle_leaves_nothing(
    attacked: HostVictim, fake: FakeProducer
) -> None:
    before = Before(attacked)
    slow = Slow(attacked, fake)
    with attacked.engine(attacked.backup()) as engine:
        slow.wait_for("middle")
        attacked.server.stop("immediate")
        engine.wait().expect(1)
    attacked.server.start()
    before.assert_nothing_came()


def test_what_it_writes_to_its_error_output_never_blocks_it(attacked: HostVictim, fake: FakeProducer) -> None:
    fake.plan(say="x" * (4 * MIB) + "\nthe last word\n", status=1)
    said = attacked.run(attacked.backup()).expect(1)
    assert "the last word" in said.errors
    assert len(said.stdout) < 100_000


def test_the_next_run_after_failed_ones_is_good(attacked: HostVictim) -> None:
    before = Before(attacked)
    with in_front(attacked) as fake:
        fake.plan(status=1)
        attacked.run(attacked.backup()).expect(1)
    attacked.run(attacked.backup()).expect(0)
    assert {k: n - before.objects[k] for k, n in attacked.objects().items()} == dict.fromkeys(
        before.objects, 1
    )
    attacked.assert_clean()
    newest = attacked.good("all")[0]
    assert newest["run"] != before.run
    assert len(newest["locations"]) == 2
    attacked.assert_survived({newest["run"]}, source="s3")
