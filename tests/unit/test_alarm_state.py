"""The file in which alarms are remembered: whole, private, and of no harm when it is not."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hq_backups import alarm_state
from hq_backups.alarm_state import Alarm, Checked, Good, Outcome, State, Undelivered, load, opened
from hq_backups.problems import Problem

NOW = datetime(2026, 11, 24, 3, 0, tzinfo=UTC)
LATE = Problem("missed/postgres@pg0/daily", "alert", "postgres", "no daily backup for 31 hours")
FULL = State(
    NOW,
    {LATE.key: Alarm(LATE, NOW, NOW, None, NOW)},
    {"postgres/backup": Outcome(NOW, LATE), "couch/backup": Outcome(NOW)},
    {"postgres/daily": Good(NOW, "postgres_icds_daily_2026_11_22.tar.gz", 5)},
    {"postgres": Checked(NOW, (LATE,))},
    Undelivered(NOW, NOW, "refused"),
)


def put(directory: Path, text: str) -> Path:
    path = directory / alarm_state.NAME
    path.write_text(text)
    path.chmod(0o600)
    return path


def test_what_is_remembered_is_read_back_and_only_its_owner_can_read_it(tmp_path: Path) -> None:
    directory = tmp_path / "made" / "state"
    with opened(directory, NOW) as held:
        held.state = FULL
    assert held.notes == []
    assert load(directory) == FULL
    assert stat.S_IMODE((directory / alarm_state.NAME).stat().st_mode) == 0o600
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert os.listdir(directory) == [alarm_state.NAME]


def test_nothing_is_written_when_nothing_changed(tmp_path: Path) -> None:
    with opened(tmp_path, NOW) as held:
        held.state = FULL
    before = (tmp_path / alarm_state.NAME).stat().st_ino
    with opened(tmp_path, NOW + timedelta(hours=1)):
        pass
    assert (tmp_path / alarm_state.NAME).stat().st_ino == before


def damaged() -> list[Any]:
    plain = FULL.to_plain()
    key = LATE.key
    return [
        "",
        "{",
        "[]",
        "null",
        "[" * 100_000,
        json.dumps({**plain, "version": 2}),
        json.dumps({**plain, "alarms": [1]}),
        json.dumps({**plain, "alarms": {key: {**plain["alarms"][key], "told_at": 5}}}),
        json.dumps({**plain, "alarms": {key: {**plain["alarms"][key], "since": "yesterday"}}}),
        json.dumps({**plain, "alarms": {key: {**plain["alarms"][key], "problem": {"key": ""}}}}),
        json.dumps(
            {**plain, "good": {"postgres/daily": {"at": "2026-11-22T00:00:02Z", "name": 5, "size": 1}}}
        ),
        json.dumps({**plain, "runs": {"postgres/backup": None}}),
        json.dumps({**plain, "undelivered": "x"}),
    ]


@pytest.mark.parametrize("number", range(len(damaged())))
def test_a_damaged_file_is_empty_is_said_and_is_replaced(tmp_path: Path, number: int) -> None:
    put(tmp_path, damaged()[number])
    with opened(tmp_path, NOW) as held:
        assert held.state == State(since=NOW)
    assert "cannot be used, so alarms begin anew" in held.notes[0]
    assert load(tmp_path) == State(since=NOW)


@given(st.binary(max_size=200), st.integers(0, 2000))
def test_any_bytes_are_read_without_a_fault(
    tmp_path_factory: pytest.TempPathFactory, junk: bytes, at: int
) -> None:
    directory = tmp_path_factory.mktemp("state")
    text = json.dumps(FULL.to_plain()).encode()
    path = put(directory, "")
    path.write_bytes(text[: at % len(text)] + junk)
    assert isinstance(load(directory), State)


@pytest.mark.parametrize("kind", ["link", "pipe", "directory", "others", "huge"])
def test_a_file_that_others_could_have_made_is_not_believed_and_never_waited_for(
    tmp_path: Path, kind: str
) -> None:
    path = tmp_path / alarm_state.NAME
    text = json.dumps(FULL.to_plain())
    if kind == "link":
        (tmp_path / "elsewhere").write_text(text)
        path.symlink_to(tmp_path / "elsewhere")
    elif kind == "pipe":
        os.mkfifo(path, 0o600)
    elif kind == "directory":
        path.mkdir()
    elif kind == "others":
        put(tmp_path, text).chmod(0o666)
    else:
        put(tmp_path, " " * (alarm_state.MAX_BYTES + 1))
    with opened(tmp_path, NOW) as held:
        held.state = replace(FULL, since=NOW)
    assert "cannot be used" in held.notes[0]
    if kind != "directory":
        assert load(tmp_path) == FULL


def test_a_directory_that_cannot_be_written_is_said_and_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with opened(tmp_path / "file" / "state", NOW) as held:
        held.state = FULL
    assert any("cannot be written" in note for note in held.notes)


def test_a_second_process_waits_for_the_first_and_then_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alarm_state, "LOCK_SECONDS", 0.2)
    with opened(tmp_path, NOW), opened(tmp_path, NOW) as second:
        second.state = FULL
    assert "cannot be locked: somebody has held it for 0.2 s" in second.notes[0]
