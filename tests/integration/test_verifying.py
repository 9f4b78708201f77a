"""Verify now: handed to a worker where there is a broker, else a process that outlives the page."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery, current_app

from hq_backups import conf, detached, verifying
from hq_backups.engine.errors import HQBackupsError
from hq_backups.models import Artifact
from tests.testbed.process import free_port, wait_until

AT = datetime(2026, 11, 22, tzinfo=UTC)
SETTINGS = {"deploy_env": "demo", "backup_host_name": "pg0"}


def artifact(**changes: Any) -> Artifact:
    fields = {"store": "postgres", "host": "pg0", "name": "a.tar.gz", "taken_at": AT}
    return Artifact(**{**fields, "locations": [{"kind": "local", "path": "/b/a.tar.gz"}], **changes})


def resolved(**changes: Any) -> conf.Resolved:
    return conf.resolve(SimpleNamespace(HQ_BACKUPS=SETTINGS | changes), {})


@pytest.fixture
def broker() -> Iterator[Celery]:
    """Have the current app speak to a broker in this process."""
    app = current_app._get_current_object()
    before = app.conf.broker_url
    app.conf.broker_url = "memory://"
    yield app
    app.conf.broker_url = before


def waiting(app: Celery, queue: str) -> dict[str, Any]:
    with app.connection_for_read() as connection:
        message = connection.SimpleQueue(queue).get(timeout=5)
        message.ack()
        return {"body": message.payload, **message.headers}


def test_a_hosts_own_queue_gets_the_message_where_hosts_have_theirs(broker: Celery) -> None:
    said = verifying.start(artifact(name="it's.tar.gz"), resolved(backup_hosts={"pg0": ["postgres"]}))
    assert "hq_backups.pg0" in said
    message = waiting(broker, "hq_backups.pg0")
    assert message["task"] == verifying.TASK
    assert message["expires"] is not None
    assert message["ignore_result"] is True
    words = ["verify_backup", "--store", "postgres", "--host", "pg0", "it's.tar.gz"]
    assert message["body"][0] == [words]


def test_else_the_queue_of_hqs_periodic_tasks(broker: Celery, settings: Any) -> None:
    settings.CELERY_PERIODIC_QUEUE = "periodic"
    assert "periodic" in verifying.start(artifact(host="other"), resolved())
    assert waiting(broker, "periodic")["task"] == verifying.TASK


def test_a_broker_that_is_away_is_said_soon(settings: Any) -> None:
    settings.CELERY_BROKER_URL = f"amqp://guest:hidden@127.0.0.1:{free_port()}//"
    with pytest.raises(HQBackupsError, match="the broker does not take the message") as caught:
        verifying.start(artifact(), resolved())
    assert "hidden" not in str(caught.value)


def test_without_a_broker_a_process_of_its_own_does_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    manage = tmp_path / "manage.py"
    manage.write_text(
        "import os, sys\n"
        "open('seen.new', 'w').write(repr((sys.argv[1:], os.getsid(0) == os.getpid())))\n"
        "os.rename('seen.new', 'seen')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "tests.settings")
    here = resolved(backup_state_dir=str(tmp_path / "state"))
    assert "verifies a.tar.gz" in verifying.start(artifact(), here)
    seen = tmp_path / "seen"
    wait_until(seen.exists, what="the process")
    words = ["verify_backup", "--store", "postgres", "--host", "pg0", "a.tar.gz"]
    assert seen.read_text() == repr((words, True))


def test_a_worker_runs_nothing_but_verify_backup(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(detached, "start", lambda resolved, words: started.append(words))
    for words in ([], ["restore_backup", "postgres", "latest"], ["runserver"]):
        with pytest.raises(HQBackupsError, match="nothing else"):
            verifying.verify(words)
    assert started == []
    verifying.verify(["verify_backup", "x"])
    assert started == [["verify_backup", "x"]]


def test_only_a_copy_within_reach_is_verified_without_a_broker() -> None:
    with pytest.raises(HQBackupsError, match="its only copy lies on pg9") as caught:
        verifying.start(artifact(host="pg9"), resolved())
    assert "verify_backup --store postgres --host pg9 a.tar.gz" in caught.value.hint
