"""What only a server with tablespaces can suffer: the spool of its backup, and directories that a restore makes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.producer import in_front
from tests.faults.tablespaces import TablespacesVictim
from tests.faults.test_full_disk import free, only
from tests.testbed.postgres import PostgresServer
from tests.testbed.process import give, wait_until

pytestmark = [pytest.mark.faults, pytest.mark.postgres15, pytest.mark.root]
MIB = 1 << 20


@pytest.fixture
def victim(fresh_pg: Callable[..., PostgresServer]) -> TablespacesVictim:
    server = fresh_pg(15)
    made = TablespacesVictim(server.workdir, server)
    made.make_data(4)
    return made


def test_a_backup_killed_while_its_spool_fills_leaves_nothing_to_the_next(victim: TablespacesVictim) -> None:
    victim.run(victim.backup()).expect(0)
    (entry,) = victim.good()
    with in_front(victim) as slow:
        slow.plan(rate="1M")
        with victim.engine(victim.backup()) as engine:
            wait_until(
                lambda: any(victim.backups.glob(".*.spool/*.tar")) or not engine.running, what="a spool"
            )
            engine.kill()
            assert engine.wait().killed
    # pg_basebackup, whose output is no pipe, ends as well.
    victim.settled()
    victim.assert_survived({entry["run"]})
    victim.run(victim.backup()).expect(0)
    victim.assert_clean()


def test_a_disk_that_fills_up_under_the_spool(
    victim: TablespacesVictim, small_disk: Callable[[str], Path]
) -> None:
    disk = small_disk("200m")
    victim.backups = disk / "backups"
    victim.backups.mkdir(mode=0o700)
    give(victim.backups, victim.user)
    victim.run(victim.backup("weekly")).expect(0)
    (entry,) = victim.good()
    with only(disk, 20 * MIB):
        refused = victim.run(victim.backup()).expect(5)
        assert "NotEnoughSpace" in refused.errors
    victim.assert_survived({entry["run"]})
    # It was there when the run looked.
    with victim.engine(victim.backup()) as engine:
        wait_until(lambda: any(victim.backups.glob(".*.spool/*")) or not engine.running, what="a spool")
        with only(disk, 0):
            done = engine.wait().expect(1)
    assert "DiskFull" in done.errors, done.errors
    assert str(victim.backups) in done.errors
    victim.assert_clean()
    victim.assert_survived({entry["run"]})
    assert free(disk) > 100 * MIB


def test_a_restore_killed_while_it_unpacks_takes_its_directories_with_it(victim: TablespacesVictim) -> None:
    victim.run(victim.backup()).expect(0)
    then, live = victim.fingerprint(), victim.locations()
    victim.change_data()
    now, outside = victim.fingerprint(), victim.outside()
    with victim.engine(victim.restore()) as engine:
        wait_until(lambda: len(victim.outside()) > 2 or not engine.running, what="a new place")
        engine.kill()
        assert engine.wait().killed
    victim.settled()
    assert len(victim.outside()) > 2
    assert victim.fingerprint() == now
    victim.run(victim.restore()).expect(0)
    assert victim.fingerprint() == then
    assert set(victim.locations()).isdisjoint(live)
    # The new ones serve, the old ones wait, and nothing else is there.
    assert len(victim.outside()) == 4
    victim.run(victim.undo()).expect(0)
    assert victim.fingerprint() == now
    assert victim.locations() == live
    assert set(outside) < set(victim.outside())
    assert not any("unfinished" in path.name for path in victim.server.workdir.iterdir())


def test_a_restore_that_does_not_serve_says_what_may_go(victim: TablespacesVictim) -> None:
    victim.run(victim.backup()).expect(0)
    victim.change_data()
    now, live = victim.fingerprint(), victim.locations()
    server, data = victim.server, victim.server.data_dir
    control = f"su {server.os_user} -s /bin/sh -c '{server.bin_dir}/pg_ctl -w -D {data} "
    commands = {
        "stop_command": ("/bin/sh", "-c", f"{control} stop -m fast'"),
        "start_command": (
            "/bin/sh",
            "-c",
            f"ls -d {data}.before-* && exit 1; {control} -l {server.log} start'",
        ),
    }
    done = victim.run(victim.job("restore", victim_request(), store=commands)).expect(8)
    assert victim.fingerprint() == now
    assert victim.locations() == live
    apart = [path for path in victim.disks.iterdir() if str(path) not in live]
    assert len(apart) == 2
    assert all(str(path) in done.errors for path in apart)


def victim_request() -> object:
    from hq_backups.engine.requests import RestoreRequest, Selection

    return RestoreRequest(Selection("postgres", "latest", None))
