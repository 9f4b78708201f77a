"""Secrets appear nowhere but in the job."""

from __future__ import annotations

import json
import logging
import pickle
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hq_backups import conf
from hq_backups.conf.secrets import Secret
from hq_backups.engine.config import Job
from hq_backups.engine.errors import ConfigurationError
from hq_backups.setting import env_name
from hq_backups.settings_table import SETTINGS

CANARY = "cAnArY0123456789"
SECRETS = [name for name, setting in SETTINGS.items() if setting.secret]


def everything_shown(resolved: conf.Resolved) -> str:
    """Return all that could end on a screen, in a log or in a traceback."""
    shown = [
        repr(resolved),
        str(resolved),
        repr(resolved.effective),
        repr(resolved.check()),
        repr(resolved.notes),
    ]
    shown.append(json.dumps(conf.describe(resolved)))
    for require in (None, "postgres", "couch", "blobdb", "elasticsearch"):
        try:
            config = resolved.config((require,) if require else ())
        except ConfigurationError as error:
            frames = traceback.TracebackException.from_exception(error, capture_locals=True)
            shown.append("".join(frames.format()) + error.hint)
        else:
            shown += [repr(config), str(config), f"{config.stores}", repr(list(config.stores.values()))]
            shown.append(repr(Job("backup", config)))
    return "\n".join(shown)


def given_everywhere(name: str, value: str, tmp_path: Path) -> list[conf.Resolved]:
    path = tmp_path / "public.yml"
    path.write_text(json.dumps({"localsettings_private": {name: value}}), encoding="utf-8")
    on = {
        "deploy_env": "prod",
        "postgres_s3": True,
        "backup_couch": True,
        "backup_blobdb": True,
        "es_local_repo": True,
    }
    return [
        conf.resolve(SimpleNamespace(HQ_BACKUPS={**on, name: value}), {}),
        conf.resolve(SimpleNamespace(HQ_BACKUPS=on), {env_name(name): value}),
        conf.resolve(SimpleNamespace(HQ_BACKUPS=on), {"HQ_BACKUPS_CONFIG": str(path)}),
        conf.resolve(SimpleNamespace(HQ_BACKUPS=on, S3_SECRET_KEY=value, S3_ACCESS_KEY=value), {}),
    ]


@pytest.mark.parametrize("name", SECRETS)
@pytest.mark.parametrize(
    "value", [CANARY, f"{CANARY}\nx", f"{{{{ {CANARY} }}}}", f"{CANARY}{{%", f"*{CANARY}"]
)
def test_a_secret_is_shown_nowhere(name: str, value: str, tmp_path: Path) -> None:
    for resolved in given_everywhere(name, value, tmp_path):
        assert CANARY not in everything_shown(resolved)


@pytest.mark.parametrize("wrong", [[CANARY], {"key": CANARY}, {CANARY: 1}])
@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_of_the_wrong_type_is_shown_nowhere(name: str, wrong: Any) -> None:
    resolved = conf.resolve(SimpleNamespace(HQ_BACKUPS={"deploy_env": "x", name: wrong}), {})
    assert CANARY not in everything_shown(resolved)


@pytest.mark.parametrize("name", ["couchdb_url", "elasticsearch_url", "aws_endpoint", "swift_url"])
@pytest.mark.parametrize(
    "url",
    [
        "http://user:{}@couch:5984",
        "http://{}@couch:5984",
        "http://u:{}@h:port",
        "ftp://u:{}@h",
        "http://u:1/{}@couch:5984",
        "http://u:{}/2@couch:5984",
    ],
)
def test_a_password_in_an_address_is_shown_nowhere(name: str, url: str) -> None:
    on = {"deploy_env": "x", "postgres_s3": True, "backup_couch": True, "es_local_repo": True}
    resolved = conf.resolve(SimpleNamespace(HQ_BACKUPS={**on, name: url.format(CANARY)}), {})
    assert CANARY not in everything_shown(resolved)


def test_a_secret_under_a_misspelt_name_is_shown_nowhere() -> None:
    settings = SimpleNamespace(HQ_BACKUPS={"deploy_env": "x", "AMAZON_S3_SECRET": CANARY})
    resolved = conf.resolve(settings, {"HQ_BACKUPS_AMAZON_S3_SECRET": CANARY})
    assert CANARY not in everything_shown(resolved)


@pytest.mark.parametrize(
    "text",
    [
        "AMAZON_S3_SECRET_KEY: *{}",
        "AMAZON_S3_SECRET_KEY: &{} a\nb: [",
        "AMAZON_S3_SECRET_KEY: '{}",
        "AMAZON_S3_SECRET_KEY: !!python/{} x",
        "AMAZON_S3_SECRET_KEY: !{} x",
        "AMAZON_S3_SECRET_KEY: {}\n\t bad",
        "!!int {}",
    ],
)
def test_a_file_that_cannot_be_read_is_not_quoted(text: str, tmp_path: Path) -> None:
    path = tmp_path / "public.yml"
    path.write_text(text.format(CANARY), encoding="utf-8")
    resolved = conf.resolve(SimpleNamespace(SERVER_ENVIRONMENT="x"), {"HQ_BACKUPS_CONFIG": str(path)})
    assert any(finding.level == "error" for finding in resolved.check())
    assert CANARY not in everything_shown(resolved)


def test_reading_logs_no_secret(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    with caplog.at_level(logging.DEBUG):
        given_everywhere("AMAZON_S3_SECRET_KEY", CANARY, tmp_path)
    assert CANARY not in caplog.text


def test_the_job_does_carry_secrets() -> None:
    given = {
        "deploy_env": "x",
        "postgres_s3": True,
        "AMAZON_S3_ACCESS_KEY": "AK",
        "AMAZON_S3_SECRET_KEY": CANARY,
    }
    config = conf.resolve(SimpleNamespace(HQ_BACKUPS=given), {}).config()
    assert CANARY in Job("backup", config).to_json()
    assert config.s3 is not None
    assert type(config.s3.secret_key) is str


@given(st.text())
def test_a_secret_behaves_like_text_and_hides_itself(text: str) -> None:
    secret = Secret(text)
    assert secret == text
    assert json.dumps([secret]) == json.dumps([text])
    assert pickle.loads(pickle.dumps(secret)) == text  # noqa: S301
    assert repr([secret]) == "['********']"
