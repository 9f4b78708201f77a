"""The bucket is killed, cut off, stalled, slowed, denied or deleted in the middle of a backup or a restore."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import pytest

from tests.faults.engine_process import Hold, Outcome
from tests.faults.victim import HostVictim, Victim
from tests.testbed.process import short_directory, wait_until
from tests.testbed.s3 import VersityGW, refused_endpoint
from tests.testbed.toxiproxy import Proxy, Toxiproxy

pytestmark = [pytest.mark.faults, pytest.mark.postgres15]
MODES = ("plain", "dump", "tablespaces", "blobdb", "couch")
MIB = 1 << 20
IMPATIENT = {"patience": 2}


@pytest.fixture
def proxy(toxiproxy: Toxiproxy, versitygw: VersityGW) -> Iterator[Proxy]:
    made = toxiproxy.proxy(versitygw.endpoint)
    yield made
    made.remove()


@pytest.fixture
def behind(victim: HostVictim, versitygw: VersityGW, versioned_bucket: str, proxy: Proxy) -> HostVictim:
    """Give the victim a bucket behind a proxy."""
    victim.use_bucket(versitygw, versioned_bucket, proxy.endpoint)
    return victim


@contextmanager
def half_sent(victim: HostVictim, outcome: list[Outcome]) -> Iterator[None]:
    """Hold a backup where its first part has arrived; let it go on after the block."""
    with (
        Hold(victim.tmp, 20 * MIB) as hold,
        victim.engine(victim.backup(), {**IMPATIENT, **hold.plan}) as engine,
    ):
        wait_until(lambda: hold.reached or not engine.running, what="the middle of the backup")
        wait_until(lambda: victim.uploads(), what="the first part")
        yield
        hold.go()
        outcome.append(engine.wait())


def broken_in_the_middle(victim: HostVictim, breaking: Callable[[], object]) -> Outcome:
    """Break the way to the bucket in the middle of a backup, whose local copy must be good nevertheless."""
    outcomes: list[Outcome] = []
    with half_sent(victim, outcomes):
        breaking()
    outcome = outcomes[0].expect(7)
    assert "UploadFailed: the local backup is good, but its upload failed: " in outcome.errors
    assert f"upload_backups {victim.store}" in outcome.errors
    victim.assert_survived({outcome.events[0]["run"]})
    return outcome


def sent_later(victim: HostVictim) -> None:
    """Demand that `upload` sends what is missing, and that nothing unfinished stays in the bucket."""
    (entry,) = victim.good()
    victim.run(victim.upload()).expect(0)
    victim.assert_clean()
    victim.assert_survived({entry["run"]}, source="s3")


@pytest.mark.parametrize(
    "how", [*(pytest.param(how, marks=pytest.mark.slow) for how in ("cut", "reset")), "stall"]
)
def test_a_bucket_lost_in_the_middle_of_a_backup(behind: HostVictim, proxy: Proxy, how: str) -> None:
    breaking: dict[str, Callable[[], object]] = {
        "cut": proxy.disable,
        "reset": lambda: proxy.add_toxic("reset_peer", timeout=0),
        "stall": lambda: proxy.add_toxic("timeout", stream="upstream", timeout=0),
    }
    broken_in_the_middle(behind, breaking[how])
    # The abort did not get through either (only its answer was lost by a reset): it is for the next run.
    assert len(behind.uploads()) == (how != "reset")
    proxy.remove_toxics()
    proxy.enable()
    sent_later(behind)


def test_the_next_backup_aborts_and_sends_what_the_last_one_could_not(
    behind: HostVictim, proxy: Proxy
) -> None:
    lost = broken_in_the_middle(behind, proxy.disable)
    assert len(behind.uploads()) == 1
    proxy.enable()
    behind.run(behind.backup("weekly")).expect(0)
    behind.assert_clean()
    assert lost.events[0]["run"] in {e["run"] for e in behind.good("s3")}
    assert {e["type"] for e in behind.good("s3")} == {"daily", "weekly"}


def test_a_bucket_that_comes_back_costs_nothing(behind: HostVictim, proxy: Proxy) -> None:
    with (
        Hold(behind.tmp, 20 * MIB) as hold,
        behind.engine(behind.backup(), {"patience": 30, **hold.plan}) as engine,
    ):
        wait_until(lambda: hold.reached or not engine.running, what="the middle of the backup")
        # Begun, and told so: what is asked for twice for a lost answer is begun twice, and left to the next run.
        wait_until(lambda: behind.uploads(), what="the upload's beginning")
        proxy.disable()
        hold.go()
        wait_until(lambda: behind.names() & {e["name"] for e in behind.good()}, what="the local copy")
        proxy.enable()
        outcome = engine.wait().expect(0)
    behind.assert_clean()
    behind.assert_survived({outcome.events[0]["run"]}, source="s3")


@pytest.mark.slow
def test_a_slow_bucket_only_takes_longer(behind: HostVictim, proxy: Proxy) -> None:
    proxy.add_toxic("bandwidth", stream="upstream", rate=20_000)
    proxy.add_toxic("latency", latency=50, jitter=20)
    behind.run(behind.backup()).expect(0)
    behind.assert_clean()
    behind.assert_survived({behind.good()[0]["run"]}, source="s3")


def test_nobody_at_the_endpoint_still_leaves_a_local_backup(victim: Victim, versitygw: VersityGW) -> None:
    victim.use_bucket(versitygw, "nowhere", refused_endpoint())
    outcome = victim.run(victim.backup(), IMPATIENT).expect(7)
    assert "cannot be reached" in outcome.errors
    assert victim.stray_files() == set()
    victim.assert_survived({outcome.events[0]["run"]})


@pytest.fixture
def own_gateway(victim: HostVictim) -> Iterator[VersityGW]:
    """Run an S3 server that may be killed, with a bucket of the victim's in it."""
    with short_directory() as place, VersityGW(place / "gw") as service:
        victim.use_bucket(service, service.make_bucket(versioned=True))
        yield service


@pytest.mark.slow
def test_an_s3_server_killed_in_the_middle(victim: HostVictim, own_gateway: VersityGW) -> None:
    broken_in_the_middle(victim, own_gateway.kill)
    own_gateway.start()
    sent_later(victim)


def test_a_key_that_is_revoked_in_the_middle(victim: HostVictim, own_gateway: VersityGW) -> None:
    def revoke() -> None:
        own_gateway.stop()
        own_gateway.secret_key = "another-secret-than-before"
        own_gateway.start()

    outcome = broken_in_the_middle(victim, revoke)
    assert "does not accept the S3 key" in outcome.errors
    sent_later(victim)  # with the new key


def test_a_bucket_deleted_in_the_middle(victim: HostVictim, own_gateway: VersityGW) -> None:
    bucket = cast("str", victim.bucket)
    broken_in_the_middle(victim, lambda: shutil.rmtree(own_gateway.data / bucket))
    # Parts that were under way have made its directory again.
    shutil.rmtree(own_gateway.data / bucket, ignore_errors=True)
    own_gateway.make_bucket(bucket, versioned=True)
    sent_later(victim)


def test_a_dead_bucket_lets_prune_take_one_day_more_only(victim: Victim, versitygw: VersityGW) -> None:
    from tests.faults.test_kills import aged

    victim.run(victim.backup()).expect(0)
    names = aged(victim, [1, 2, 3, 4])
    victim.use_bucket(versitygw, "nowhere", refused_endpoint())
    victim.run(victim.backup(), IMPATIENT).expect(7)
    assert [e["name"] for e in victim.good()] == names[:3]
    victim.s3 = victim.bucket = None
    victim.run(victim.backup()).expect(0)
    assert [e["name"] for e in victim.good()] == names[:2]


# Restore and verify from the bucket


@pytest.fixture
def restorable(
    own_victim: Callable[..., HostVictim], versitygw: VersityGW, versioned_bucket: str, proxy: Proxy
) -> HostVictim:
    """Return a victim whose only backup is in the bucket behind a proxy, and whose data have changed since."""
    made = own_victim()
    made.use_bucket(versitygw, versioned_bucket, proxy.endpoint)
    made.run(made.backup()).expect(0)
    made.forget()
    made.change_data()
    return made


@pytest.mark.parametrize(
    "how", ["cut", *(pytest.param(how, marks=pytest.mark.slow) for how in ("stall", "short"))]
)
def test_a_bucket_lost_while_a_restore_reads_it_changes_nothing(
    restorable: HostVictim, proxy: Proxy, how: str
) -> None:
    data, there = restorable.fingerprint(), restorable.beside()
    proxy.add_toxic("bandwidth", rate=restorable.link)
    with restorable.engine(restorable.restore(source="s3"), {"patience": 2, "child": True}) as engine:
        wait_until(lambda: restorable.is_filling(engine.said()), what="the unpacking")
        if how == "cut":
            proxy.disable()
        elif how == "stall":
            proxy.add_toxic("timeout", timeout=0)
        else:
            # Headers, and next to nothing of the data.
            proxy.add_toxic("limit_data", bytes=3_000)
        outcome = engine.wait()
    assert outcome.status == 1, (outcome.errors, outcome.stderr)
    assert "cannot be reached" in outcome.errors or "breaks off" in outcome.errors
    assert restorable.is_serving()
    assert restorable.fingerprint() == data
    restorable.settled()
    assert restorable.beside() == there


@pytest.mark.slow
def test_connections_that_each_bring_little_only_take_longer(restorable: HostVictim, proxy: Proxy) -> None:
    data = restorable.fingerprint()
    proxy.add_toxic("limit_data", bytes=16_000)
    restorable.run(restorable.restore(source="s3"), {"patience": 2, "child": True}).expect(0)
    assert restorable.is_serving()
    assert restorable.fingerprint() != data


@pytest.mark.slow
def test_a_restore_goes_on_where_the_network_broke_off(restorable: HostVictim, proxy: Proxy) -> None:
    data = restorable.fingerprint()
    slow = proxy.add_toxic("bandwidth", rate=restorable.link)
    with restorable.engine(restorable.restore(source="s3")) as engine:
        wait_until(lambda: restorable.is_filling(engine.said()), what="the unpacking")
        proxy.disable()
        proxy.remove_toxic(slow)
        proxy.enable()
        engine.wait().expect(0)
    assert restorable.is_serving()
    assert restorable.fingerprint() != data
