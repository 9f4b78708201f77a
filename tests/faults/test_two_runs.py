"""One run per store and host: a second one is told who holds it; a killed one holds nothing."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from hq_backups.engine.config import Job
from tests.faults.engine_process import Engine, Hold
from tests.faults.producer import in_front
from tests.faults.victim import HostVictim
from tests.testbed.process import wait_until

pytestmark = [pytest.mark.faults, pytest.mark.postgres15]
MODES = ("plain", "dump", "tablespaces", "blobdb", "couch")
ONLY = {
    # The engine reads CouchDB's files itself: it has no child that could live on.
    "test_a_killed_run_holds_nothing_though_its_children_live_on": ("plain", "dump", "tablespaces", "blobdb"),
}
MIB = 1 << 20


@contextmanager
def halted(victim: HostVictim) -> Iterator[Engine]:
    """Hold a backup in its middle; it ends well after the block."""
    with Hold(victim.tmp, MIB) as hold, victim.engine(victim.backup(), hold.plan) as engine:
        wait_until(lambda: hold.reached or not engine.running, what="the middle of the backup")
        yield engine
        hold.go()
        engine.wait().expect(0)


def test_a_second_run_is_told_who_holds_the_store(victim: HostVictim) -> None:
    victim.run(victim.backup("weekly")).expect(0)
    with halted(victim) as first:
        run = first.said()[0]["run"]
        names = victim.names()
        jobs: list[Job] = [
            victim.backup(),
            victim.backup("hourly"),
            victim.prune(),
            victim.restore(disconnect=True),
        ]
        for job in jobs:
            said = victim.run(job).expect(6).errors
            found = re.search(r"run (\S+) \(backup\), pid (\d+) of user (\S+), since (\S+ \S+) UTC", said)
            assert found is not None, said
            assert found.groups()[:3] == (run, str(first.pid), victim.user)
        # Reading disturbs nobody and is not disturbed.
        assert len(victim.good()) == 1
        victim.run(victim.verify()).expect(0)
        assert {n for n in victim.names() if not n.endswith(".verified.json")} == names
    assert {e["type"] for e in victim.good()} == {"daily", "weekly"}
    victim.assert_clean()


def test_a_killed_run_holds_nothing_though_its_children_live_on(victim: HostVictim, mode: str) -> None:
    with in_front(victim) as fake:
        fake.plan(pause=1, outlive=True)
        with victim.engine(victim.backup()) as first:
            wait_until(lambda: fake.reached or not first.running, what="the middle of the backup")
            assert first.running, first.wait()
            first.kill()
            first.process.wait()
            # Its producer stands still with the pipes open; one that writes into files is tied to the engine.
            assert victim.leftovers() or mode == "tablespaces"
            victim.stand_in(None)
            victim.run(victim.backup()).expect(0)
            fake.go()
    victim.assert_clean()


def test_two_restores_of_one_target(own_victim: Callable[..., HostVictim]) -> None:
    victim = own_victim()
    victim.run(victim.backup()).expect(0)
    data = victim.fingerprint()
    victim.change_data()
    with victim.engine(victim.restore()) as first:
        wait_until(
            lambda: [*victim.server.workdir.glob(".data.*staging-*")] or not first.running,
            what="the staging",
            interval=0.001,
        )
        # Stopped, it holds what it holds, however quick it is.
        os.kill(first.pid, signal.SIGSTOP)
        outcome = victim.run(victim.restore())
        undone = victim.run(victim.undo())
        os.kill(first.pid, signal.SIGCONT)
        first.wait().expect(0)
    assert outcome.status == 6, outcome.errors
    assert f"pid {first.pid} of user root" in outcome.errors
    assert undone.status in (5, 6), undone.errors
    assert victim.is_serving()
    assert victim.fingerprint() == data
