"""The schedule on a real broker, with real workers and beats, and what kills them."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Callable, Iterator

import pytest

from hq_backups.engine.accounts import me
from hq_backups.process_id import ProcessId
from tests.testbed.celery_host import CeleryHost, CeleryWorker
from tests.testbed.process import short_directory, wait_until
from tests.testbed.redis import RedisServer

PERIODIC = "celery_periodic"
LONG, SHORT = 8 << 30, 600 << 20
"""Bytes of nothing, which take no room: minutes of reading, and seconds."""

MANAGE = """\
import sys
from pathlib import Path
from django.core.management import execute_from_command_line
Path("managed").touch()
execute_from_command_line(sys.argv)
"""
"""What HQ has, which makes paths that its code needs."""

Hosts = Callable[..., CeleryHost]


@pytest.fixture
def hosts(redis: RedisServer) -> Iterator[Hosts]:
    """Return a factory of hosts that share one history and one broker."""
    with short_directory() as place:
        yield lambda name="here", **settings: CeleryHost(place, name, redis, me(), **settings)


def fill(host: CeleryHost, size: int) -> None:
    """Make reading the blobs last."""
    path = host.blobs / "video"
    path.touch()
    os.truncate(path, size)


def wait(condition: Callable[[], object], what: str) -> None:

    wait_until(condition, what=what, timeout=60, interval=0.1)


def time_moves_on(host: CeleryHost) -> None:
    """Let half an hour pass for what failed."""
    host.rows("UPDATE hq_backups_duerun SET started_at = datetime(started_at, '-1 hour')")


def ended(host: CeleryHost, state: str) -> Callable[[], bool]:
    return lambda: {row[1] for row in host.due()} == {state}


def ticks(worker: CeleryWorker) -> list[float]:
    """Return how many seconds a worker was busy with each look at what is due."""
    said = re.findall(r"Task hq_backups.dispatch_due\S* succeeded in ([0-9.]+)s", worker.text)
    return [float(found) for found in said]


def test_two_beats_make_one_run_which_leaves_its_worker_free_and_outlives_it(hosts: Hosts) -> None:
    host = hosts()
    (host.home / "manage.py").write_text(MANAGE)
    fill(host, SHORT)
    with host.beat(), host.beat("beat2"), host.worker(PERIODIC) as worker:
        wait(lambda: host.runs() and ticks(worker), "a run that is due to begin")
        took = ticks(worker)
        worker.kill_all()
        assert host.runs() == [("here", "weekly", "running")]
        assert max(took) < 1
        wait(ended(host, "done"), "the run to end without its worker")
        worker.start()
        wait(lambda: len(ticks(worker)) > 3, "the new worker to have looked whether anything is due")
    # A weekly backup counts as the daily one that is due as well.
    assert host.runs() == [("here", "weekly", "ok")]
    assert host.due() == [("here", "done", 1)]
    (artifact,) = host.backups.glob("blobdb_weekly_*.tar.gz")
    assert host.rows("SELECT name FROM hq_backups_artifact") == [(artifact.name,)]
    (steps, process) = host.rows("SELECT steps, process FROM hq_backups_backuprun")[0]
    assert '"name": "publish"' in steps
    assert len(process.split()) == 4
    assert (host.home / "managed").exists()


def test_a_worker_killed_in_the_middle_is_one_failed_run_and_a_good_one_after(hosts: Hosts) -> None:
    host = hosts(backup_run_in="queue")
    fill(host, LONG)
    queues = (PERIODIC, "hq_backups.here")
    with host.beat(), host.worker(*queues) as worker:
        wait(host.runs, "a run that is due to begin")
        worker.kill_all()
        assert host.runs() == [("here", "weekly", "running")]
        fill(host, 100)
        worker.start()
        wait(lambda: host.runs() == [("here", "weekly", "failed")], "the run to be told dead")
        assert host.rows("SELECT error FROM hq_backups_backuprun") == [("the run was killed",)]
        wait(lambda: host.due() == [("here", "failed", 1)], "what was due to be told failed")
        time_moves_on(host)
        wait(ended(host, "done"), "a second attempt")
    assert host.runs() == [("here", "weekly", "failed"), ("here", "weekly", "ok")]
    assert host.due() == [("here", "done", 2)]
    assert len(list(host.backups.glob("blobdb_weekly_*.tar.gz"))) == 1


def test_a_run_of_its_own_killed_in_the_middle_is_made_again_too(hosts: Hosts) -> None:
    host = hosts()
    fill(host, LONG)
    with host.beat(), host.worker(PERIODIC):
        wait(host.runs, "a run that is due to begin")
        ((process,),) = host.rows("SELECT process FROM hq_backups_backuprun")
        its = ProcessId.parse(process)
        assert its is not None
        assert its.is_alive
        os.kill(its.pid, signal.SIGKILL)
        fill(host, 100)
        wait(lambda: host.due() == [("here", "failed", 1)], "what was due to be told failed")
        time_moves_on(host)
        wait(ended(host, "done"), "a second attempt")
    assert host.runs() == [("here", "weekly", "failed"), ("here", "weekly", "ok")]


def test_two_hosts_do_their_own_stores_only(hosts: Hosts) -> None:
    named = {"here": ["blobdb"], "there": ["blobdb"], "nowhere": ["blobdb"]}
    here, there = hosts("here", backup_hosts=named), hosts("there", backup_hosts=named)
    with contextlib.ExitStack() as stack:
        stack.enter_context(here.beat())
        first = stack.enter_context(here.worker(PERIODIC, "hq_backups.here"))
        second = stack.enter_context(there.worker("hq_backups.there"))
        done = lambda: [row for row in here.due() if row[1] == "done"]  # noqa: E731
        wait(lambda: len(done()) == 2, "both to be done")
        # A message that comes to the wrong host, and one that comes again, find nothing to do.
        rows = here.rows("SELECT id, queued_at FROM hq_backups_duerun ORDER BY host")
        for pk, queued_at in rows:
            for queue in ("hq_backups.here", "hq_backups.there"):
                here.send("hq_backups.run_due", f"{pk}@{queued_at}+00:00", queue=queue)
        idle = lambda log: log.count("nothing to do for")  # noqa: E731
        wait(lambda: idle(first.text) == idle(second.text) == 3, "the messages to be refused")
    assert sorted(here.runs()) == [("here", "weekly", "ok"), ("there", "weekly", "ok")]
    assert here.due() == [("here", "done", 1), ("nowhere", "queued", 0), ("there", "done", 1)]
    for host in (here, there):
        assert len(list(host.backups.glob("blobdb_weekly_*.tar.gz"))) == 1


def test_what_cron_made_is_not_made_again_and_a_broker_that_was_down_is_found_again(
    hosts: Hosts, redis: RedisServer
) -> None:
    host = hosts()
    host.run("run_backup", "all", "--type", "weekly")
    with host.beat() as beat, host.worker(PERIODIC) as worker:
        wait(lambda: len(ticks(worker)) > 3, "some looks at what is due")
        assert host.due() == []
        redis.kill()
        wait(lambda: "Connection to broker lost" in worker.text, "the worker to see it")
        # What was made is forgotten, so that something is due when the broker is back, and empty.
        for table in ("backuprun", "artifact"):
            host.rows(f"DELETE FROM hq_backups_{table}")
        redis.start()
        wait(ended(host, "done"), "the next run")
        assert worker.running
        assert beat.running
    assert host.runs() == [("here", "weekly", "ok")]


@pytest.mark.slow
def test_a_message_that_redis_hands_out_again_makes_no_second_run(hosts: Hosts, redis: RedisServer) -> None:
    """What a worker took, and cannot begin while it reads its blobs, is in its queue again after a while."""
    host = hosts(backup_run_in="queue")
    host.visibility = 1
    fill(host, 3 * SHORT)
    queue = "hq_backups.here"
    with host.worker(PERIODIC, queue) as worker:
        host.send("hq_backups.dispatch_due", queue=PERIODIC)
        wait(host.runs, "a run that is due to begin")
        (row,) = host.rows("SELECT id, queued_at FROM hq_backups_duerun")
        host.send("hq_backups.run_due", f"{row[0]}@{row[1]}+00:00", queue=queue)
        taken = re.compile(r"Task hq_backups.run_due\S+ received")
        wait(lambda: len(taken.findall(worker.text)) == 2, "the worker to take the message beside its run")
        wait(lambda: redis.ask("LLEN", queue) == ":1", "Redis to have the message again")
        assert host.runs() == [("here", "weekly", "running")]
        wait(lambda: worker.text.count("nothing to do for") == 2, "both of them to be refused")
    assert len(host.runs()) == 1
    assert host.due() == [("here", "done", 1)]


VERIFY_NOW = """\
from hq_backups import conf, verifying
from hq_backups.models import Artifact
print(verifying.start(Artifact.objects.get(), conf.resolve()))
"""


def test_what_the_page_asks_for_is_verified_by_a_worker_that_never_saw_the_page(hosts: Hosts) -> None:
    host = hosts()
    host.run("run_backup", "blobdb")
    verified = "SELECT count(*) FROM hq_backups_artifact WHERE verified_at IS NOT NULL"
    assert host.rows(verified) == [(0,)]
    with host.worker(PERIODIC):
        assert PERIODIC in host.run("shell", "--no-imports", "--command", VERIFY_NOW).stdout
        wait(lambda: host.rows(verified) == [(1,)], "the verification")
