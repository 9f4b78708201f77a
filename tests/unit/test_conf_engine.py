from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hq_backups import conf
from hq_backups.engine.config import Job, StoreConfig
from hq_backups.engine.errors import ConfigurationError, NotBuiltYet
from hq_backups.settings_table import BUILT_MODES


def resolve(environ: dict[str, str] | None = None, **given: Any) -> conf.Resolved:
    settings = SimpleNamespace(HQ_BACKUPS={"deploy_env": "prod", "backup_host_name": "pg0", **given})
    return conf.resolve(settings, environ or {})


def postgres(**given: Any) -> StoreConfig:
    return resolve(**given).config().store("postgres")


def test_defaults_make_a_whole_store() -> None:
    config = resolve().config()
    assert (config.env, config.host, config.compression, config.compression_level) == (
        "prod",
        "pg0",
        "gzip",
        1,
    )
    assert config.s3 is None
    store = config.store("postgres")
    assert (store.mode, store.s3, store.hourly) == ("plain", False, False)
    assert store.backup_dir == Path("/opt/data/backups/postgresql")
    assert store.data_dir == Path("/opt/data/postgresql/14/main")
    assert (store.retention.days, store.retention.weeks, store.retention.hours) == (1, 1, 1)
    assert (store.options["version"], store.options["port"], store.options["host"]) == (None, 5432, None)


def test_every_setting_of_postgres_reaches_the_engine() -> None:
    store = postgres(
        backup_postgres="dump",
        postgresql_backup_dir="/b",
        postgresql_backup_days=3,
        postgresql_backup_weeks="4",
        postgresql_backup_hours=5,
        postgres_backup_hourly=True,
        postgres_s3=True,
        postgres_snapshot_bucket="mine",
        postgresql_version="15",
        postgresql_port=5433,
        postgresql_host="/run/pg",
        postgresql_bin_dir="/pg/bin",
        postgresql_dir_path="/pgdata",
        postgresql_backup_os_user="pgowner",
        postgresql_stop_command="systemctl stop 'my pg'",
        postgresql_start_command=["systemctl", "start", "pg"],
    )
    assert (store.mode, store.backup_dir, store.hourly, store.s3) == ("dump", Path("/b"), True, True)
    assert (store.retention.days, store.retention.weeks, store.retention.hours) == (3, 4, 5)
    assert (store.bucket, store.bucket_fallback) == ("mine", None)
    assert store.data_dir == Path("/pgdata/15/main")
    assert store.os_user == "pgowner"
    assert store.stop_command == ("systemctl", "stop", "my pg")
    assert store.start_command == ("systemctl", "start", "pg")
    assert [store.options[k] for k in ("version", "port", "host", "bin_dir")] == [
        "15",
        5433,
        "/run/pg",
        "/pg/bin",
    ]


def test_the_misspelt_bucket_is_a_fallback_of_the_default_only() -> None:
    assert postgres().bucket_fallback == "dimagi-prod-posgres-backups"
    assert postgres(postgres_snapshot_bucket="dimagi-prod-postgres-backups").bucket_fallback is None


def test_postgres_can_be_restored_while_its_backups_are_off() -> None:
    resolved = resolve(backup_postgres=False)
    assert (resolved.enabled, resolved.local) == ((), ())
    assert resolved.config(("postgres",)).store("postgres").mode == "plain"
    with pytest.raises(ConfigurationError, match="switched off"):
        resolved.require("postgres", backup=True)


def test_what_is_not_built_is_said_and_refused_for_a_backup_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(BUILT_MODES, "elasticsearch")
    resolved = resolve(backup_postgres="dump", backup_couch=True, backup_blobdb="yes", es_local_repo=True)
    assert resolved.enabled == ("postgres", "couch", "blobdb")
    assert resolved.unbuilt == ("elasticsearch",)
    assert len(resolved.notes) == 1
    for store in resolved.unbuilt:
        resolved.require(store)
        with pytest.raises(NotBuiltYet, match="not built"):
            resolved.require(store, backup=True)


def test_stores_that_are_on_reach_the_engine_too() -> None:
    stores = (
        resolve(backup_couch=True, backup_blobdb=True, backup_es_s3=True, couchdb_backup_days=9)
        .config()
        .stores
    )
    assert list(stores) == ["postgres", "couch", "blobdb", "elasticsearch"]
    assert stores["couch"].retention.days == 9
    assert stores["couch"].options["url"] == "http://127.0.0.1:15984"
    assert stores["blobdb"].bucket == "dimagi-prod-blobdb-backups"
    assert stores["blobdb"].options["owner"] == "cchq"
    assert (stores["elasticsearch"].s3, stores["elasticsearch"].retention.days) == (True, 3)
    assert stores["elasticsearch"].options["repository"] == "prod_es_snapshot"


def test_a_host_for_copies_and_a_release_reach_the_engine() -> None:
    found = resolve(
        backup_couch=True, remote_couch_backup="couchdb@backup0", couchdb_release_dir="/opt/couchdb/"
    )
    couch = found.config().store("couch")
    assert (couch.mirror, couch.options["release_dir"]) == ("couchdb@backup0", "/opt/couchdb")
    off = resolve(backup_couch=True, remote_couch_backup=False).config()
    assert [store.mirror for store in off.stores.values()] == [None, None]
    assert off.store("couch").options["release_dir"] is None


def test_an_error_of_one_store_does_not_stop_another() -> None:
    resolved = resolve(backup_es_s3=True, elasticsearch_backup_days="many", couchdb2_port=0)
    resolved.require("postgres", backup=True)
    assert list(resolved.config(("postgres",)).stores) == ["postgres"]
    with pytest.raises(ConfigurationError, match="elasticsearch_backup_days"):
        resolved.config(("elasticsearch",))


def test_a_store_with_unusable_settings_is_never_built_from_defaults() -> None:
    resolved = resolve(postgresql_backup_days="7d")
    assert "postgres" not in resolved.config().stores
    with pytest.raises(ConfigurationError, match="postgresql_backup_days"):
        resolved.require("postgres")


def test_a_switch_that_cannot_be_read_counts_as_on() -> None:
    resolved = resolve(backup_postgres="pgbackrest")
    assert resolved.enabled == ("postgres",)
    with pytest.raises(ConfigurationError, match="pgbackrest"):
        resolved.require("postgres", backup=True)


@pytest.mark.parametrize("general", [{"encrypted_root": "data"}, {"unknown": 1}, {"timezone": "Nowhere"}])
def test_a_general_error_stops_everything(general: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        resolve(**general).config()


@pytest.mark.parametrize(
    ("endpoint", "region", "expected"),
    [
        (None, None, (None, None)),
        (None, "eu-west-1", (None, "eu-west-1")),
        ("s3.eu-west-1.amazonaws.com", None, (None, "eu-west-1")),
        ("https://s3-us-west-2.amazonaws.com", None, (None, "us-west-2")),
        ("S3.amazonaws.com", None, (None, None)),
        ("s3.None.amazonaws.com", "None", (None, None)),
        ("s3.cn-north-1.amazonaws.com.cn", None, (None, "cn-north-1")),
        ("s3.us-east-1.amazonaws.com", "us-east-2", (None, "us-east-2")),
        ("s3.wasabisys.com", "us-east-1", ("https://s3.wasabisys.com", "us-east-1")),
        ("http://10.0.0.5:9000/", None, ("http://10.0.0.5:9000", None)),
        ("s3.amazonaws.com.example.com", None, ("https://s3.amazonaws.com.example.com", None)),
    ],
)
def test_aws_s_own_endpoints_count_as_aws(
    endpoint: str | None, region: str | None, expected: tuple[str, str]
) -> None:
    s3 = resolve(aws_endpoint=endpoint, aws_region=region, postgres_s3=True).config().s3
    assert s3 is not None
    assert (s3.endpoint, s3.region) == expected


def test_s3_settings_reach_the_engine() -> None:
    s3 = resolve(
        AMAZON_S3_ACCESS_KEY="AK",
        AMAZON_S3_SECRET_KEY="SK",
        aws_versioning_enabled=False,
        backup_upload_limit="50MB",
    ).config().s3  # fmt: skip
    assert s3 is not None
    assert (s3.access_key, s3.secret_key, s3.versioning, s3.upload_limit) == ("AK", "SK", False, 50_000_000)


def test_a_job_carries_the_whole_configuration() -> None:
    config = resolve(
        postgres_s3=True,
        AMAZON_S3_SECRET_KEY="SK",
        backup_couch=True,
        COUCH_PASSWORD="p",
        postgres_users={"replication": {"username": "u", "password": "q"}},
    ).config()
    assert Job.from_json(Job("backup", config).to_json()).config == config


def test_a_store_belongs_to_the_host_that_backup_hosts_names(tmp_path: Path) -> None:
    assert resolve(backup_hosts={"pg0": ["postgres"]}).local == ("postgres",)
    assert resolve(backup_hosts={"pg1": ["postgres"]}).local == ()
    assert resolve(postgresql_data_dir=str(tmp_path)).local == ("postgres",)
    assert resolve(postgresql_data_dir=str(tmp_path / "missing")).local == ()


def test_another_hosts_server_is_backed_up_where_that_is_said(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    elsewhere = resolve(
        pg_backup_from="pg1",
        postgresql_data_dir=missing,
        postgres_users={"replication": {"username": "hqrepl", "password": "q"}},
    )
    assert elsewhere.local == ("postgres",)
    options = elsewhere.config().store("postgres").options
    assert (options["backup_from"], options["replication_user"]) == ("pg1", "hqrepl")
    assert not elsewhere.notes
    for off in (False, None, "False"):
        here = resolve(pg_backup_from=off, postgresql_data_dir=missing)
        assert here.local == ()
        assert here.config().store("postgres").options["backup_from"] is None
    assert resolve(pg_backup_from="pg1", backup_hosts={"other": ["postgres"]}).local == ()


def test_a_data_directory_that_may_not_be_looked_at_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Any) -> Any:
        raise PermissionError

    resolved = resolve()
    monkeypatch.setattr("os.stat", denied)
    local = resolved.local
    monkeypatch.undo()
    assert local == ("postgres",)


def test_the_state_directory_is_the_system_s_or_the_user_s(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(backup_state_dir="/srv/state").state_dir == Path("/srv/state")
    monkeypatch.setattr("os.access", lambda *_: True)
    assert resolve().state_dir == Path("/var/lib/hq_backups")
    monkeypatch.setattr("os.access", lambda *_: False)
    assert resolve({"HOME": "/home/x"}).state_dir == Path("/home/x/.local/state/hq_backups")
    assert resolve({"HOME": "/home/x", "XDG_STATE_HOME": "/s/../t"}).state_dir == Path("/t/hq_backups")
    assert resolve({"HOME": "/home/x", "XDG_STATE_HOME": "rel"}).state_dir == Path(
        "/home/x/.local/state/hq_backups"
    )


def test_a_host_name_that_would_not_do_is_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, mended in [("pg0.example.com", "pg0.example.com"), ("-pg 0/", "pg0"), ("", "localhost")]:
        monkeypatch.setattr("socket.gethostname", lambda name=name: name)
        resolved = conf.resolve(SimpleNamespace(SERVER_ENVIRONMENT="x"), {})
        assert resolved["backup_host_name"] == mended


def test_settings_are_described_as_plain_data() -> None:
    rows = {
        row["name"]: row
        for row in conf.describe(resolve(AMAZON_S3_ACCESS_KEY="A" * 20, backup_hosts={"a": "couch"}))
    }
    assert rows["AMAZON_S3_ACCESS_KEY"]["value"] == "set, 20 characters"
    assert rows["AMAZON_S3_ACCESS_KEY"]["source"] == "settings.HQ_BACKUPS"
    assert rows["backup_hosts"]["value"] == {"a": ["couch"]}
    assert rows["encrypted_root"] == {
        "name": "encrypted_root",
        "value": "/opt/data",
        "source": "default",
        "help": "The directory that holds data and backups.",
        "status": "live",
        "store": None,
    }
