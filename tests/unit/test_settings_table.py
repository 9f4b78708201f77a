from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hq_backups import setting, settings_table
from hq_backups.conf.casting import KINDS
from hq_backups.conf.findings import IDS
from hq_backups.engine.config import STORES
from hq_backups.settings_table import BY_ANY_NAME, GROUPS, SETTINGS

ROOT = Path(__file__).parents[2]

# Every name of the page that the user knows, and of the roles behind it.
PAGE = [
    "AMAZON_S3_ACCESS_KEY",
    "AMAZON_S3_SECRET_KEY",
    "aws_endpoint",
    "aws_region",
    "aws_versioning_enabled",
    "check_s3_backups_email",
    "postgresql_backup_dir",
    "backup_postgres",
    "postgresql_backup_days",
    "postgresql_backup_weeks",
    "postgres_s3",
    "postgres_snapshot_bucket",
    "backup_couch",
    "couch_s3",
    "couch_backup_dir",
    "couchdb_backup_days",
    "couchdb_backup_weeks",
    "backup_blobdb",
    "blobdb_s3",
    "blobdb_backup_dir",
    "blobdb_backup_days",
    "blobdb_backup_weeks",
    "backup_es_s3",
    "es_local_repo",
    "es_repository_name",
]
ROLES = [
    "postgres_backup_hourly",
    "postgresql_backup_hours",
    "couch_backup_hourly",
    "couchdb_backup_hours",
    "blobdb_backup_hourly",
    "blobdb_backup_hours",
    "nadir_hour",
    "nadir_hour_frequency",
    "pg_backup_from",
    "pg_backup_to",
    "hot_standby_server",
    "postgresql_version",
    "postgresql_port",
    "postgresql_dir_path",
    "postgresql_data_dir",
    "postgresql_user_home",
    "postgres_users.replication.username",
    "postgres_users.replication.password",
    "postgres_users.backup.username",
    "postgres_users.backup.password",
    "couch_data_dir",
    "couchdb_data_dir",
    "couchdb_snapshot_bucket",
    "couchdb_user",
    "couchdb_group",
    "remote_couch_backup",
    "couchdb2_port",
    "couchdb_version",
    "couchdb_service_name",
    "COUCH_USERNAME",
    "COUCH_PASSWORD",
    "couchdb2.username",
    "couchdb2.password",
    "blobdb_dir_path",
    "blobdb_user",
    "blobdb_snapshot_bucket",
    "es_snapshot_bucket",
    "elastcsearch_backup_days",
    "elasticsearch_backup_days",
    "backup_es_swift",
    "swift_url",
    "swift_container",
    "swift_username",
    "secrets.es_swift_username",
    "secrets.es_swift_password",
    "elasticsearch_data_dir",
    "elasticsearch_version",
    "ELASTICSEARCH_PORT",
    "encrypted_root",
    "deploy_env",
    "env_monitoring_id",
    "virtualenv_home",
    "cchq_user",
    "root_email",
    "postgresql_backup_master",
    "backup_es",
]
OURS = [
    "backup_health_token",
    "backup_host_name",
    "backup_hosts",
    "backup_run_in",
    "backup_schedule",
    "backup_compression",
    "backup_compression_level",
    "backup_state_dir",
    "backup_upload_limit",
    "backup_heartbeat_url",
    "postgresql_host",
    "postgresql_bin_dir",
    "postgresql_stop_command",
    "postgresql_start_command",
    "couchdb_stop_command",
    "couchdb_start_command",
    "couchdb_url",
    "couchdb_release_dir",
    "elasticsearch_url",
    "postgresql_backup_os_user",
    "couchdb_backup_os_user",
    "blobdb_backup_os_user",
    "blobdb_restore_owner",
    "blobdb_restore_group",
    "blobdb_verifier",
    "elasticsearch_backup_dir",
    "elasticsearch_username",
    "elasticsearch_password",
    "elasticsearch_ca_file",
    "es_repository_location",
    "es_repository_readonly",
    "es_wait_minutes",
    "es_stall_minutes",
    "timezone",
]


@pytest.mark.parametrize("name", PAGE + ROLES + OURS)
def test_every_name_is_known(name: str) -> None:
    assert name in BY_ANY_NAME


def test_no_other_name_is_made_up() -> None:
    assert set(BY_ANY_NAME) - set(PAGE) - set(ROLES) - set(OURS) == {"swift_password"}


def test_no_name_stands_twice() -> None:
    everything = [name for group in GROUPS.values() for one in group for name in one.names]
    assert len(everything) == len(set(everything))


def test_no_two_names_share_an_environment_variable() -> None:
    assert len({setting.env_name(name) for name in BY_ANY_NAME}) == len(BY_ANY_NAME)


@pytest.mark.parametrize("one", SETTINGS.values(), ids=SETTINGS)
def test_every_setting_is_complete(one: setting.Setting) -> None:
    assert one.kind in KINDS
    assert one.store in (None, *STORES)
    assert one.help or one.reason
    secret_words = ("password", "_key", "_token", "heartbeat_url")
    assert one.secret == any(word in one.name.lower() for word in secret_words)
    assert one.status in (setting.LIVE, setting.NOT_BUILT) or one.reason


def test_what_is_built_are_stores() -> None:
    assert set(settings_table.BUILT_MODES) <= set(STORES)


def test_the_reference_page_is_fresh() -> None:
    tool = ROOT / "tools" / "settings_reference.py"
    made = subprocess.run([sys.executable, str(tool)], capture_output=True, text=True, check=True).stdout
    assert (ROOT / "docs" / "settings.rst").read_text(encoding="utf-8") == made, "run: make docs"


def test_the_reference_page_tells_every_name_and_every_finding() -> None:
    page = (ROOT / "docs" / "settings.rst").read_text(encoding="utf-8")
    assert [name for name in BY_ANY_NAME if f"``{name}``" not in page] == []
    assert [id_ for id_ in IDS if f"``hq_backups.{id_}``" not in page] == []
