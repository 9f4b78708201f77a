"""A job travels as one line of JSON and comes out as it went in; nothing ill-typed comes in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hq_backups.engine.config import Config, Job, Retention, S3Config, StoreConfig, from_plain
from hq_backups.engine.errors import (
    ConfigurationError,
    Exit,
    HQBackupsError,
    ProtocolMismatch,
    UsageError,
    rebuild,
)
from hq_backups.engine.requests import RestoreRequest, Selection

CANARY = "canary-secret-7f3a"


def job() -> Job:
    store = StoreConfig(
        "postgres", "plain", Path("/b"), Retention(2, 3, 4), s3=True, bucket="b", data_dir=Path("/d"),
        stop_command=("systemctl", "stop", "x y"), options={"port": 5432, "password": CANARY},
    )  # fmt: skip
    config = Config("prod", "pg0", s3=S3Config("key", CANARY, "https://s3"), stores={"postgres": store})
    request = RestoreRequest(Selection("postgres"), target_dir=Path("/t"))
    from hq_backups.engine.config import to_plain

    return Job("restore", config, to_plain(request), run="r")


def test_a_job_survives_its_journey() -> None:
    line = job().to_json()
    assert "\n" not in line
    again = Job.from_json(line)
    assert again == job()
    assert from_plain(RestoreRequest, again.request).target_dir == Path("/t")


def test_no_repr_shows_a_secret() -> None:
    assert CANARY not in repr(job())
    assert CANARY not in repr(Job.from_json(job().to_json()))


@pytest.mark.parametrize("text", ["", "[]", "{", "null"])
def test_what_is_not_a_job_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        Job.from_json(text)


def test_another_protocol_is_refused_before_anything_is_read() -> None:
    with pytest.raises(ProtocolMismatch) as caught:
        Job.from_json(json.dumps({"protocol": 99, "entirely": "other"}))
    assert caught.value.exit_code is Exit.USAGE


@pytest.mark.parametrize(
    "change",
    [{"env": 1}, {"unknown": 1}, {"stores": []}, {"compression_level": "1"}, {"s3": {"versioning": "yes"}}],
    ids=str,
)
def test_an_ill_typed_or_unknown_field_is_refused(change: dict[str, object]) -> None:
    body = json.loads(job().to_json())
    body["config"].update(change)
    with pytest.raises(UsageError):
        Job.from_json(json.dumps(body))


def test_a_store_that_is_not_configured_says_how_to_see_the_settings() -> None:
    with pytest.raises(ConfigurationError) as caught:
        job().config.store("couch")
    assert "list_backups --config" in caught.value.hint


def _leaves(cls: type[HQBackupsError]) -> list[type[HQBackupsError]]:
    return [cls, *(leaf for child in cls.__subclasses__() for leaf in _leaves(child))]


@pytest.mark.parametrize("cls", _leaves(HQBackupsError), ids=lambda c: c.__name__)
def test_an_error_keeps_its_code_and_exit_through_an_event(cls: type[HQBackupsError]) -> None:
    again = rebuild(cls.__name__, "what happened", "what to do")
    assert type(again) is cls
    assert (str(again), again.message, again.hint) == ("what happened", "what happened", "what to do")
    assert again.exit_code is cls.exit_code


def test_an_unknown_error_is_still_an_error() -> None:
    assert rebuild("FromTheFuture", "x", "").exit_code is Exit.ERROR
