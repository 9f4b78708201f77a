from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hq_backups import process_id
from hq_backups.process_id import ProcessId
from tests.testbed.process import wait_until

SLEEP = [sys.executable, "-I", "-c", "import sys; sys.stdin.read()"]


def of(pid: int) -> ProcessId:
    mine = ProcessId.mine()
    assert mine is not None
    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return dataclasses.replace(mine, pid=pid, started=stat[19])


def test_this_process_is_alive_and_survives_being_written_down() -> None:
    mine = ProcessId.mine()
    assert mine is not None
    assert mine.pid == os.getpid()
    assert ProcessId.parse(str(mine)) == mine
    assert len(str(mine)) <= 128
    assert mine.is_alive is True


def test_a_process_that_was_killed_is_dead_before_and_after_its_parent_looks() -> None:
    child = subprocess.Popen(SLEEP, stdin=subprocess.PIPE)
    its = of(child.pid)
    assert its.is_alive is True
    child.send_signal(signal.SIGKILL)
    wait_until(lambda: its.is_alive is False, what="a zombie to count as dead")
    child.communicate()
    assert its.is_alive is False


def test_a_number_that_another_process_has_now_is_not_the_same_process() -> None:
    mine = ProcessId.mine()
    assert mine is not None
    assert dataclasses.replace(mine, started="1").is_alive is False


def test_nothing_survives_a_restart_of_the_host() -> None:
    mine = ProcessId.mine()
    assert mine is not None
    assert dataclasses.replace(mine, boot="0-0").is_alive is False


def test_a_process_of_another_container_cannot_be_seen() -> None:
    mine = ProcessId.mine()
    assert mine is not None
    assert dataclasses.replace(mine, namespace="1").is_alive is None


@pytest.mark.parametrize("text", ["", "a", "a b c d", "a b 1 2 3"])
def test_what_is_no_process_is_none(text: str) -> None:
    assert ProcessId.parse(text) is None


def test_where_the_kernel_does_not_tell_there_is_no_identity(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mine = ProcessId.mine()
    monkeypatch.setattr(process_id, "PROC", tmp_path)
    assert ProcessId.mine() is None
    assert mine is not None
    assert mine.is_alive is None
