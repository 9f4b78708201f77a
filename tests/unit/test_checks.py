"""Every id has a case that breaks it, and one beside it that does not."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from django.core import checks
from django.core.management import call_command
from django.core.management.base import SystemCheckError

from hq_backups import conf
from hq_backups.checks import check_settings
from hq_backups.conf.findings import IDS
from hq_backups.engine import crons
from hq_backups.settings_table import BUILT_MODES

S3_ON = {"postgres_s3": True, "AMAZON_S3_ACCESS_KEY": "a", "AMAZON_S3_SECRET_KEY": "b"}
BOUNCER = {"ENGINE": "django.db.backends.postgresql", "HOST": "pgb0", "PORT": 6432}
MAIL = "django.core.mail.backends."

# id, HQ_BACKUPS that breaks it, one that does not, Django settings for both
CASES: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ("E002", {"postgresql_s3": 1}, {"postgres_s3": 0}, {}),
    ("E003", {"postgresql_backup_days": -1}, {"postgresql_backup_days": 0}, {}),
    ("E003", {"backup_compression": "bzip2"}, {"backup_compression": "none"}, {}),
    ("E003", {"backup_postgres": "pgbackrest"}, {"backup_postgres": "plain"}, {}),
    ("E004", {"aws_region": "{{ region }}"}, {"postgresql_backup_dir": "/{{ deploy_env }}"}, {}),
    ("E005", {}, {"deploy_env": "x"}, {"SERVER_ENVIRONMENT": None}),
    ("E006", {"backup_es_swift": True}, {"backup_es_swift": False}, {}),
    (
        "E007",
        {"backup_es_s3": True, "es_local_repo": True},
        {"backup_es_s3": True, "es_local_repo": False},
        {},
    ),
    ("E008", {**S3_ON, "AMAZON_S3_SECRET_KEY": None}, S3_ON, {}),
    ("E009", {"postgresql_port": 6432}, {"postgresql_port": 5432}, {"DATABASES": {"default": BOUNCER}}),
    (
        "E009",
        {"postgresql_port": 6432, "postgresql_host": "pgb0"},
        {"postgresql_port": 6432, "postgresql_host": "pg0"},
        {"DATABASES": {"default": BOUNCER}},
    ),
    ("E010", {"aws_endpoint": "https://h/bucket"}, {"aws_endpoint": "https://h"}, {}),
    ("E010", {"aws_endpoint": "https://key:secret@h"}, {"aws_endpoint": "https://h:9"}, {}),
    (
        "E011",
        {**S3_ON, "postgres_snapshot_bucket": "s3://b/x"},
        {**S3_ON, "postgres_snapshot_bucket": "b"},
        {},
    ),
    (
        "E012",
        {"elastcsearch_backup_days": 1, "elasticsearch_backup_days": 2},
        {"elastcsearch_backup_days": 1, "elasticsearch_backup_days": "1"},
        {},
    ),
    (
        "E013",
        {"postgresql_data_dir": "/pg", "postgresql_backup_dir": "/pg/backups"},
        {"postgresql_data_dir": "/pg", "postgresql_backup_dir": "/pg-backups"},
        {},
    ),
    ("E014", {"backup_blobdb": True}, {"backup_blobdb": False}, {"S3_BLOB_DB_SETTINGS": {"url": "x"}}),
    ("E015", {"backup_compression_level": 9}, {"backup_compression_level": 3}, {}),
    ("W001", {"pg_backup_to": "pg1"}, {"pg_backup_to": False}, {}),
    ("W004", {"postgres_s3": True}, S3_ON, {}),
    ("W005", {"check_s3_backups_email": "a@b.c"}, {}, {"EMAIL_BACKEND": MAIL + "filebased.EmailBackend"}),
    ("W005", {"check_s3_backups_email": "a@b.c"}, {}, {"EMAIL_BACKEND": MAIL + "console.EmailBackend"}),
    (
        "W005",
        {"check_s3_backups_email": "a@b.c"},
        {},
        {"MAILERS": {"default": {"BACKEND": MAIL + "dummy.EmailBackend"}}},
    ),
    (
        "E016",
        {"backup_blobdb": True, "blobdb_dir_path": "/opt/data/blobdb"},
        {"backup_blobdb": True, "blobdb_dir_path": "/opt/shared/../shared/blobdb"},
        {"SHARED_DRIVE_CONF": SimpleNamespace(blob_dir="/opt/shared/blobdb")},
    ),
    ("W006", {"aws_endpoint": "http://s3.example.com"}, {"aws_endpoint": "http://10.0.0.5"}, {}),
    (
        "W007",
        {"aws_endpoint": "s3.us-east-1.amazonaws.com", "aws_region": "eu-west-1"},
        {"aws_endpoint": "s3.us-east-1.amazonaws.com", "aws_region": "us-east-1"},
        {},
    ),
    ("W010", {"postgresql_port": 6432}, {"postgresql_port": 5432}, {}),
    ("W012", {"backup_hosts": {"c0": ["couch"]}}, {"backup_hosts": {"p0": ["postgres"]}}, {}),
    (
        "W013",
        {"postgresql_stop_command": "a"},
        {"postgresql_stop_command": "a", "postgresql_start_command": "b"},
        {},
    ),
    (
        "W014",
        {"pg_backup_from": "pg1"},
        {"pg_backup_from": "pg1", "postgres_users": {"replication": {"username": "hqrepl"}}},
        {},
    ),
    (
        "E016",
        {"backup_blobdb": True, "blobdb_dir_path": "/opt/data/blobdb"},
        {"backup_blobdb": True, "blobdb_dir_path": "/mnt/shared/blobdb"},
        {"SHARED_DRIVE_CONF": SimpleNamespace(blob_dir="/mnt/shared/blobdb")},
    ),
    ("W010", {"postgresql_port": 6432, "pg_backup_from": "pg1"}, {"pg_backup_from": "pg1"}, {}),
]

# id, a file that breaks it, one that does not
FILES = [
    ("E001", "[", "{}"),
    ("W002", "aws_region: !vault x", "aws_region: x"),
    ("W008", "couchdb_s3: True", "couchdb_reduce_limit: True"),
    ("W009", "nadir_hour: 1\nnadir_hour: 2", "nadir_hour: 1\nother: 2\nother: 3"),
    ("W011", "AMAZON_S3_SECRET_KEY: x", "AMAZON_S3_SECRET_KEY:"),
]


def found(
    given: dict[str, Any], django: dict[str, Any], environ: dict[str, str] | None = None
) -> list[conf.Finding]:
    settings = SimpleNamespace(HQ_BACKUPS=given, **{"SERVER_ENVIRONMENT": "prod", **django})
    return list(conf.resolve(settings, {"HOME": "/nonexistent", **(environ or {})}).check())


@pytest.mark.parametrize(("id_", "broken", "whole", "django"), CASES)
def test_a_contradiction_is_found(
    id_: str, broken: dict[str, Any], whole: dict[str, Any], django: dict[str, Any]
) -> None:
    hits = [finding for finding in found(broken, django) if finding.id == id_]
    assert hits
    assert all(finding.message and finding.hint for finding in hits)
    assert id_ not in {finding.id for finding in found(whole, django)}


@pytest.mark.parametrize(("id_", "broken", "whole"), FILES)
def test_a_bad_file_is_found(id_: str, broken: str, whole: str, tmp_path: Path) -> None:
    path = tmp_path / "public.yml"
    path.touch()
    path.chmod(0o644)
    path.write_text(broken, encoding="utf-8")
    environ = {"HQ_BACKUPS_CONFIG": str(path)}
    assert id_ in {finding.id for finding in found({}, {}, environ)}
    path.write_text(whole, encoding="utf-8")
    assert found({}, {}, environ) == []


def test_every_id_has_a_case_that_breaks_it() -> None:
    assert {case[0] for case in CASES} | {case[0] for case in FILES} | {"W003", "W015", "W016"} == set(IDS)


def test_an_old_cron_job_of_a_store_that_is_on_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crons, "CRON_DIR", tmp_path)
    assert found({}, {}) == []
    (tmp_path / "backup_postgres").write_text("0 0 * * * postgres x\n")
    (finding,) = found({}, {})
    assert (finding.id, finding.store) == ("W015", "postgres")
    assert str(tmp_path) in finding.message
    assert found({"backup_postgres": False}, {}) == []


def test_every_default_is_free_of_findings() -> None:
    assert found({}, {}) == []


def test_a_compression_without_its_library_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert [finding.id for finding in found({"backup_compression": "zstd"}, {})] == ["E015"]


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_WEB_IDENTITY_TOKEN_FILE"])
def test_credentials_of_boto_are_enough(variable: str) -> None:
    assert found({"postgres_s3": True}, {}, {variable: "x"}) == []


def test_credentials_in_the_home_directory_are_enough(tmp_path: Path) -> None:
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "credentials").touch()
    assert found({"postgres_s3": True}, {}, {"HOME": str(tmp_path)}) == []


def test_blobs_on_their_way_to_s3_are_still_on_disk() -> None:
    moved = {"S3_BLOB_DB_SETTINGS": {"url": "x"}}
    assert [finding.id for finding in found({"backup_blobdb": True}, moved)] == ["E014"]
    assert found({"backup_blobdb": True}, {**moved, "BLOB_DB_MIGRATING_FROM_FS_TO_S3": True}) == []


def test_a_missing_key_stops_only_the_stores_that_upload() -> None:
    (finding,) = [
        f
        for f in found({"couch_s3": 1, "backup_couch": 1, "AMAZON_S3_ACCESS_KEY": "a"}, {})
        if f.id == "E008"
    ]
    assert finding.stops("couch")
    assert not finding.stops("postgres")


def test_django_s_check_tells_them_with_ids_and_hints(settings: Any) -> None:
    settings.HQ_BACKUPS = {"postgresql_s3": True, "check_s3_backups_email": "a@b.c"}
    messages = {message.id: message for message in check_settings()}
    assert messages["hq_backups.E002"] == checks.Error(
        "settings.HQ_BACKUPS has the unknown name postgresql_s3",
        hint="Is postgres_s3 meant?",
        id="hq_backups.E002",
    )
    # Django's test runner puts locmem in the place of the mail server.
    assert messages["hq_backups.W005"].level == checks.WARNING
    assert messages["hq_backups.W005"].obj == "check_s3_backups_email"


def test_what_is_switched_on_and_not_built_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found({}, {}) == []
    monkeypatch.setitem(BUILT_MODES, "postgres", ("dump",))
    assert [finding.id for finding in found({}, {})] == ["W003"]


def test_alarms_without_a_receiver_are_told_by_django_s_check(settings: Any) -> None:
    def told() -> bool:
        return "hq_backups.W016" in {message.id for message in check_settings()}

    assert told()
    settings.ADMINS = [("Ops", "ops@example.com")]
    assert not told()
    settings.ADMINS = []
    settings.HQ_BACKUPS = {"check_s3_backups_email": "a@b.c"}
    assert not told()
    settings.HQ_BACKUPS = {"backup_postgres": False}
    assert not told()


def test_manage_py_check_runs_them(settings: Any) -> None:
    settings.HQ_BACKUPS = {"nadir_hour": 24}
    with pytest.raises(SystemCheckError, match=r"hq_backups\.E003"):
        call_command("check")
