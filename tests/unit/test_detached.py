"""A detached run is a process of its own, in the same place and with the same settings."""

from __future__ import annotations

import json
import os
import socket
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from hq_backups import commandline, conf, detached
from tests.testbed.process import wait_until

TELL = """
import json, os, sys
told = {
    "session": os.getsid(0), "pid": os.getpid(), "cwd": os.getcwd(), "words": sys.argv[1:],
    "settings": os.environ["DJANGO_SETTINGS_MODULE"], "TMPDIR": os.environ.get("TMPDIR"),
    "fds": [fd for fd in os.listdir("/proc/self/fd") if os.path.exists("/proc/self/fd/" + fd)],
    "stdin": os.readlink("/proc/self/fd/0"),
}
print(json.dumps(told))
"""


@pytest.fixture
def resolved(settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> conf.Resolved:
    settings.HQ_BACKUPS = {"backup_state_dir": str(tmp_path / "state")}
    monkeypatch.setattr(commandline, "program", lambda: [sys.executable, "-I", "-c", TELL])
    return conf.resolve()


def told(log: Path) -> list[dict[str, Any]]:
    wait_until(lambda: log.exists() and log.read_text().endswith("\n"), what="the process to tell")
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_it_has_a_session_of_its_own_and_nothing_of_its_starter_but_place_and_settings(
    resolved: conf.Resolved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", "/nonexistent")
    with socket.socket() as connection:
        connection.set_inheritable(True)
        detached.start(resolved, ["run_backup", "blobdb"])
        log = tmp_path / "state" / detached.LOG
        (its,) = told(log)
    assert its["session"] == its["pid"] != os.getsid(0)
    assert (its["cwd"], its["settings"], its["TMPDIR"]) == (os.getcwd(), "tests.settings", None)
    assert its["words"] == ["run_backup", "blobdb"]
    assert its["fds"] == ["0", "1", "2"]
    assert its["stdin"] == "/dev/null"
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    assert stat.S_IMODE(log.parent.stat().st_mode) == 0o700


def test_its_log_begins_anew_when_it_is_long(resolved: conf.Resolved, tmp_path: Path) -> None:
    log = tmp_path / "state" / detached.LOG
    log.parent.mkdir()
    log.write_bytes(b"x" * (detached.MOST_LOG + 1))
    detached.start(resolved, [])
    assert len(told(log)) == 1
    assert log.with_suffix(".log.1").stat().st_size == detached.MOST_LOG + 1


def test_it_starts_where_no_log_can_be_written(
    resolved: conf.Resolved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "state").write_text("no directory")
    mark = tmp_path / "mark"
    monkeypatch.setattr(commandline, "program", lambda: ["touch"])
    detached.start(resolved, [str(mark)])
    wait_until(mark.exists, what="the process to run")


def test_manage_py_is_called_where_there_is_one_and_our_own_program_on_a_bare_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert commandline.program() == [sys.executable, "-m", "django"]
    (tmp_path / "manage.py").touch()
    assert commandline.program() == [sys.executable, "manage.py"]
    for ours in ("hq_backups.standalone_settings", "hq_backups.standalone_page_settings"):
        monkeypatch.setattr(commandline, "settings_module", lambda ours=ours: ours)
        assert commandline.program() == [sys.executable, "-m", "hq_backups.standalone"]
