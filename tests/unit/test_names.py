"""Names stay what operators know, and what is written can be read again."""

from __future__ import annotations

from datetime import UTC, date, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hq_backups.engine import names

MOMENT = datetime(2026, 11, 22, 3, 4, 5)


@pytest.mark.parametrize(
    ("store", "type_", "mode", "codec", "name"),
    [
        ("postgres", "daily", "plain", "gzip", "postgres_prod_daily_2026_11_22.tar.gz"),
        ("postgres", "weekly", "dump", "gzip", "postgres_prod_weekly_2026_11_22.gz"),
        ("postgres", "hourly", "plain", "gzip", "postgres_prod_hourly_2026_11_22_03.tar.gz"),
        ("postgres", "manual", "plain", "zstd", "postgres_prod_manual_2026_11_22_030405.tar.zst"),
        ("couch", "daily", "tar", "gzip", "couchdb_daily_2026_11_22.tar.gz"),
        ("blobdb", "daily", "tar", "none", "blobdb_daily_2026_11_22.tar"),
    ],
)
def test_local_names(store: str, type_: str, mode: str, codec: str, name: str) -> None:
    assert names.local_name(store, "prod", type_, MOMENT, mode, codec) == name
    parsed = names.parse_name(name)
    assert parsed is not None
    assert (parsed.store, parsed.type, parsed.date, parsed.mode) == (store, type_, date(2026, 11, 22), mode)


@given(
    env=st.from_regex(r"[a-z0-9][a-z0-9_-]{0,20}[a-z0-9]", fullmatch=True),
    type_=st.sampled_from(["daily", "weekly", "hourly", "manual"]),
    moment=st.datetimes(min_value=datetime(2000, 1, 1), max_value=datetime(2099, 1, 1)),
)
def test_any_environment_can_be_read_back_from_a_name(env: str, type_: str, moment: datetime) -> None:
    parsed = names.parse_name(names.local_name("postgres", env, type_, moment, "plain", "gzip"))
    assert parsed is not None
    assert (parsed.env, parsed.type, parsed.date) == (env, type_, moment.date())


def test_an_environment_with_words_of_ours_in_it() -> None:
    parsed = names.parse_name("postgres_my_daily_env_daily_2026_08_22.tar.gz")
    assert parsed is not None
    assert (parsed.env, parsed.type) == ("my_daily_env", "daily")


@pytest.mark.parametrize(
    "name",
    [
        "s3_backup_status.txt",
        "postgres_data_before_restore.tar.gz",
        "extracted_backup_2026_11_22",
        ".postgres_prod_daily_2026_11_22.tar.gz.json",
        "postgres_prod_daily_2026_13_22.tar.gz",
        "postgres_prod_daily_2026_02_30.tar.gz",
        "postgres_prod_yearly_2026_11_22.tar.gz",
        "../postgres_prod_daily_2026_11_22.tar.gz\n",
    ],
)
def test_what_is_no_artifact(name: str) -> None:
    assert names.parse_name(name) is None


@given(st.text(max_size=40))
def test_safe_text_can_be_part_of_a_path_and_of_a_key(text: str) -> None:
    made = names.safe(text)
    assert made
    assert set(made) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
    assert not made.startswith(("-", "."))


def test_keys() -> None:
    assert names.fixed_key("postgres", "daily", "pg0", "plain", "gzip") == "postgres_daily_pg0.tar.gz"
    name = "postgres_prod_daily_2026_11_22.tar.gz"
    assert names.dated_key(name) == name
    assert names.dated_key(name, host="pg0") == "postgres_prod_daily_2026_11_22_pg0.tar.gz"
    assert names.dated_key(name, time=MOMENT) == "postgres_prod_daily_2026_11_22_030405.tar.gz"


def test_a_run_id_is_its_moment_host_and_store() -> None:
    moment = datetime(2026, 11, 22, 0, 0, 2, tzinfo=UTC)
    assert names.run_id(moment, "pg0", "postgres") == "20261122T000002Z-pg0-postgres"
    assert "/" not in names.run_id(moment, "../../etc", "postgres")


def test_what_lies_beside_an_artifact_is_not_eaten_by_the_old_crons() -> None:
    for name in (names.manifest_name("postgres_x.tar.gz"), names.pending_name("r"), names.partial_name("r")):
        assert name.startswith(".")


# What stood on disks and in buckets since 2016.
OLD = {
    "postgres_prod_daily_2026_08_22.tar.gz": ("postgres", "daily", "prod", None, "plain"),
    "postgres_prod_weekly_2026_08_16.gz": ("postgres", "weekly", "prod", None, "dump"),
    "postgres_prod_hourly_2026_08_22_03.tar.gz": ("postgres", "hourly", "prod", None, "plain"),
    "postgres_prod_hourly_2026_08_22.gz": ("postgres", "hourly", "prod", None, "dump"),
    "postgres_my_daily_env_daily_2026_08_22.gz": ("postgres", "daily", "my_daily_env", None, "dump"),
    "postgres_daily_2017_06_10.tar.gz": ("postgres", "daily", None, None, "plain"),
    "postgres_weekly_2016_10_02.tar.bz": ("postgres", "weekly", None, None, "plain"),
    "postgres_prod_daily_2018_03_14": ("postgres", "daily", "prod", None, "plain"),
    "postgres_daily_2016_07_20": ("postgres", "daily", None, None, "plain"),
    "postgres_2016_02_03.db.gz": ("postgres", None, None, None, "dump"),
    "postgres_daily_2016_07_01.db.gz": ("postgres", "daily", None, None, "dump"),
    "couchdb_daily_2026_08_22.tar.gz": ("couch", "daily", None, None, "tar"),
    "couchdb_weekly_2017_06_04.gz": ("couch", "weekly", None, None, "tar"),
    "couchdb_hourly_2026_08_22_03.tar.gz": ("couch", "hourly", None, None, "tar"),
    "blobdb_2016_03_04.gz": ("blobdb", None, None, None, "tar"),
    "blobdb_weekly_2026_08_16.tar.gz": ("blobdb", "weekly", None, None, "tar"),
}
OLD_KEYS = {
    "postgres_daily_pg0.tar.gz": ("postgres", "daily", None, "pg0", "plain"),
    "postgres_weekly_db.example.org.gz": ("postgres", "weekly", None, "db.example.org", "dump"),
    "postgres_daily_ip-10-0-0-1.tar.gz": ("postgres", "daily", None, "ip-10-0-0-1", "plain"),
    "couchdb_daily_couch0.tar.gz": ("couch", "daily", None, "couch0", "tar"),
    "postgres_daily": ("postgres", "daily", None, None, "plain"),
    "couchdb": ("couch", None, None, None, "tar"),
    "blobdb": ("blobdb", None, None, None, "tar"),
}


@pytest.mark.parametrize("name", [*OLD, *OLD_KEYS])
def test_what_old_scripts_called_their_backups(name: str) -> None:
    store, type_, env, host, mode = {**OLD, **OLD_KEYS}[name]
    key = names.recognise(name, is_key=True)
    assert key is not None
    assert (key.store, key.type, key.env, key.host, key.mode) == (store, type_, env, host, mode)
    # No file was ever called as the keys of versioned buckets are.
    assert (names.recognise(name) is None) is (name in OLD_KEYS)


@pytest.mark.parametrize(
    "name",
    [
        "s3_backup_status.txt",
        "postgres_data_before_restore.tar.gz",
        "couchdb_data_before_restore.tar.gz",
        "extracted_backup_2026_11_22",
        "postgres_prod_daily_2026_02_30.tar.gz",
        "postgres_prod_daily_2026_11_22.tar.gz.manifest.json",
        "postgres_prod_hourly_2026_08_22_24.tar.bz",
        "--remove-files",
        "backup.info",
    ],
)
def test_what_no_script_made(name: str) -> None:
    assert names.recognise(name) is None
    assert names.recognise(name, is_key=True) is None
