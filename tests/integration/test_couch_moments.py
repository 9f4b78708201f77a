"""Whatever is written meanwhile, a backup restores to a state that was there at one moment."""

from __future__ import annotations

import getpass
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hq_backups.engine.couch import snapshot, unpacked
from hq_backups.engine.couch.couchfile import CouchFile
from hq_backups.engine.errors import Exit
from tests.integration.couch_helpers import CouchHost
from tests.testbed.couch import CHECKOUT, FakeCouch
from tests.testbed.couch_data import FIXTURE_NODE
from tests.testbed.couch_writer import write_couch
from tests.testbed.process import wait_until

State = dict[str, dict[str, str]]
"""The revision of every document by database."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out sync(2): it waits for whatever else this machine writes."""
    monkeypatch.setattr("os.sync", lambda: None)


class SlowSystem:
    """The os module of a machine with other work: between two looks at files, anything can happen."""

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def fstat(self, fd: int) -> os.stat_result:
        time.sleep(0.0005)
        return os.fstat(fd)

    def open(self, path: Path, flags: int) -> int:
        time.sleep(0.0005)
        return os.open(path, flags)


@pytest.fixture(autouse=True)
def slow_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """Widen the gaps in which a snapshot could go wrong."""
    monkeypatch.setattr(snapshot, "os", SlowSystem())


@contextmanager
def churning(data_dir: Path, log: Path, seed: int) -> Iterator[None]:
    """Let a process of our own write for the length of the block."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.testbed.couch_churn", data_dir, log, "--seed", str(seed)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=CHECKOUT,
    ) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        try:
            assert writer.stdout.readline() == b"ready\n"
            yield
            assert writer.poll() is None, "the writer ended by itself"
        finally:
            writer.stdin.close()
            writer.wait(20)


def wait_for_another(log: Path) -> None:
    """Wait until the writer has written something more, however little of a processor is left to it."""
    size = log.stat().st_size
    wait_until(lambda: log.stat().st_size > size, what="the writer to go on", timeout=60, interval=0.01)


def states(log: Path) -> list[State]:
    """Return every state that ever was, in order."""
    now: State = {}
    found = []
    for line in log.read_text().splitlines():
        name, revs = json.loads(line)
        now = {db: docs for db, docs in now.items() if db != name}
        if revs is not None:
            now[name] = revs
        found.append(now)
    return found


def restored(tree: Path) -> State:
    """Return what a restored directory holds, read without a node."""
    found: State = {}
    for each in unpacked.read(tree, "it").maps:
        docs = found.setdefault(each.name, {})
        for path in each.files():
            with CouchFile(tree / path) as file:
                docs |= {doc.id: doc.rev for doc in file.docs()}
    return found


def check(tmp_path: Path, backups: int, seed: int) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write_couch(data / "_dbs.couch", [])
    write_couch(data / "_nodes.couch", [{"_id": FIXTURE_NODE}])
    # There is no node: what would be served is in the files.
    host = CouchHost(
        FakeCouch(tmp_path, data, os_user=None),
        options={"url": "http://127.0.0.1:9"},
        store={"os_user": getpass.getuser()},
    )
    taken: list[State] = []
    with churning(data, tmp_path / "log", seed):
        for number in range(backups):
            done = host.good_backup("manual", accept_shrink=True)
            assert done.manifest["source"]["one_moment"]
            target = tmp_path / f"restored-{number}"
            unpacked_ = host.restore(str(host.backups / done.manifest["name"]), target_dir=target)
            assert unpacked_.code is Exit.OK, unpacked_
            taken.append(restored(target))
            (host.backups / done.manifest["name"]).unlink()
            wait_for_another(tmp_path / "log")
    known = states(tmp_path / "log")
    moments = [known.index(state) if state in known else None for state in taken]
    assert None not in moments, moments
    assert moments == sorted(moments, key=lambda moment: moment or 0), (
        "a later backup is of an earlier moment"
    )
    assert len(set(moments)) > backups // 2, "the writer wrote next to nothing"


def test_eight_backups_in_a_row_are_each_of_one_moment(tmp_path: Path) -> None:
    check(tmp_path, 8, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [11, 12])
def test_fifty_backups_in_a_row_are_each_of_one_moment(tmp_path: Path, seed: int) -> None:
    check(tmp_path, 50, seed)
