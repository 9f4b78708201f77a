"""The schedule is among beat's entries, whenever the host's Celery reads its settings."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery, _state

from hq_backups import beat
from hq_backups.conf import findings

THEIRS = {"task": "theirs", "schedule": 10.0}
OURS = {beat.DISPATCH, beat.CHECK}


@pytest.fixture
def state() -> Iterator[Any]:
    """Leave Celery's own idea of the current app as it was."""
    kept: Any = _state
    before = kept._tls.current_app, set(kept._on_app_finalizers)
    yield kept
    kept._tls.current_app = before[0]
    kept._on_app_finalizers.clear()
    kept._on_app_finalizers.update(before[1])


def host_app(**changes: Any) -> Celery:
    return Celery("host", broker="memory://", **changes)


def entries(app: Celery) -> set[str]:
    app.finalize()
    return set(app.conf.beat_schedule)


def test_an_app_that_was_there_before_has_the_entries(state: Any) -> None:
    app = host_app()
    beat.install()
    assert entries(app) == OURS


def test_an_app_that_has_read_its_settings_already_has_them(state: Any) -> None:
    app = host_app()
    assert app.conf.beat_schedule == {}
    beat.install()
    assert entries(app) == OURS


def test_an_app_that_is_made_later_has_them(state: Any) -> None:
    beat.install()
    assert entries(host_app()) == OURS


@pytest.mark.parametrize("read_before", [True, False])
def test_settings_that_are_read_later_leave_them_in_place(state: Any, read_before: bool) -> None:
    app = host_app()
    if read_before:
        assert app.conf.beat_schedule == {}
    beat.install()
    app.config_from_object(SimpleNamespace(beat_schedule={"theirs": THEIRS}))
    assert entries(app) == OURS | {"theirs"}
    app.config_from_object(SimpleNamespace(beat_schedule={"others": THEIRS}))
    assert entries(app) == OURS | {"others"}


def test_the_hosts_own_dictionary_and_its_own_entry_stay_as_they_are(state: Any) -> None:
    own = {beat.DISPATCH: {"task": beat.DISPATCH, "schedule": 60.0}}
    app = host_app()
    beat.install()
    app.config_from_object(SimpleNamespace(beat_schedule=own))
    assert entries(app) == OURS
    assert app.conf.beat_schedule[beat.DISPATCH]["schedule"] == 60.0
    assert set(own) == {beat.DISPATCH}


def test_the_setting_switches_them_off(state: Any, settings: Any) -> None:
    settings.HQ_BACKUPS = {"backup_schedule": False}
    app = host_app()
    beat.install()
    assert entries(app) == set()
    assert beat.check_beat() == []


def test_the_entries_go_to_the_hosts_queue_for_periodic_tasks(settings: Any) -> None:
    assert {str(entry["options"]) for entry in beat.beat_schedule().values()} == {"{}"}
    settings.CELERY_PERIODIC_QUEUE = "celery_periodic"
    queues = [entry["options"]["queue"] for entry in beat.beat_schedule().values()]
    assert queues == ["celery_periodic", "celery_periodic"]


def test_a_host_that_overwrites_them_is_told_by_the_system_checks(state: Any) -> None:
    app = host_app()
    beat.install()
    app.finalize()
    assert beat.check_beat() == []
    app.conf.beat_schedule = {"theirs": THEIRS}
    (message,) = beat.check_beat()
    assert message.id == "hq_backups.W020"
    assert "beat_schedule()" in (message.hint or "")
    assert "W020" in findings.IDS


def test_a_process_without_celery_is_told_nothing(state: Any) -> None:
    state._tls.current_app = None
    assert beat.check_beat() == []
