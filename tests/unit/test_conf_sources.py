from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hq_backups import conf
from hq_backups.engine.errors import ConfigurationError, Exit
from hq_backups.setting import env_name
from hq_backups.settings_table import BY_ANY_NAME

MakeFile = Callable[[str], dict[str, str]]


def django(**settings: Any) -> Any:
    return SimpleNamespace(**{"SERVER_ENVIRONMENT": "prod", **settings})


def resolve(
    given: dict[str, Any] | None = None, environ: dict[str, str] | None = None, **settings: Any
) -> conf.Resolved:
    return conf.resolve(django(HQ_BACKUPS=given or {}, **settings), environ or {})


def ids(resolved: conf.Resolved) -> list[str]:
    return [finding.id for finding in resolved.check()]


@pytest.fixture
def public_yml(tmp_path: Path) -> MakeFile:
    def make(text: str) -> dict[str, str]:
        path = tmp_path / "public.yml"
        path.write_text(text, encoding="utf-8")
        path.chmod(0o600)
        return {"HQ_BACKUPS_CONFIG": str(path)}

    return make


def test_without_any_source_the_defaults_of_the_page_count() -> None:
    resolved = resolve()
    assert ids(resolved) == []
    assert resolved["postgresql_backup_dir"] == "/opt/data/backups/postgresql"
    assert [resolved[f"postgresql_backup_{unit}"] for unit in ("days", "weeks")] == [1, 1]
    assert [resolved[f"couchdb_backup_{unit}"] for unit in ("days", "weeks")] == [1, 1]
    assert [resolved[f"blobdb_backup_{unit}"] for unit in ("days", "weeks")] == [2, 2]
    assert resolved["aws_versioning_enabled"] is True
    assert resolved["postgres_snapshot_bucket"] == "dimagi-prod-postgres-backups"
    assert resolved["postgresql_data_dir"] == "/opt/data/postgresql/14/main"
    assert resolved["elasticsearch_backup_days"] == 3
    assert resolved.enabled == ("postgres",)


def test_each_source_beats_the_next(public_yml: MakeFile) -> None:
    in_file = public_yml("deploy_env: of-file\n")
    everywhere = {**in_file, "HQ_BACKUPS_DEPLOY_ENV": "of-environ"}
    steps: list[tuple[dict[str, Any], dict[str, str], str, str]] = [
        ({"deploy_env": "of-django"}, everywhere, "of-django", "settings.HQ_BACKUPS"),
        ({}, everywhere, "of-environ", "environment variable HQ_BACKUPS_DEPLOY_ENV"),
        ({}, in_file, "of-file", in_file["HQ_BACKUPS_CONFIG"]),
        ({}, {}, "prod", "settings.SERVER_ENVIRONMENT"),
    ]
    for given_, environ, value, source in steps:
        effective = resolve(given_, environ).effective["deploy_env"]
        assert (effective.value, effective.source) == (value, source)
    assert resolve().effective["encrypted_root"].source == "default"


@pytest.mark.parametrize("nothing", [None, "None", "null", "~", "", "  ", "NULL"])
def test_what_means_unset_leaves_the_word_to_the_next_source(nothing: Any, public_yml: MakeFile) -> None:
    environ = public_yml("aws_region: eu-west-1\n")
    assert resolve({"aws_region": nothing}, environ)["aws_region"] == "eu-west-1"
    assert resolve({"aws_region": nothing})["aws_region"] is None


@pytest.mark.parametrize(
    "text", ["aws_region: None", "aws_region: null", "aws_region: ~", "aws_region:", "aws_region: ''"]
)
def test_yaml_s_ways_to_say_nothing_are_unset(text: str, public_yml: MakeFile) -> None:
    resolved = resolve(environ=public_yml(text))
    assert resolved["aws_region"] is None
    assert resolved.effective["aws_region"].source == "default"


@pytest.mark.parametrize("off", [False, None, "None", "False", "no", "off", "~"])
def test_postgres_is_off_by_false_and_by_none(off: Any) -> None:
    assert resolve({"backup_postgres": off}).enabled == ()


def test_an_empty_environment_variable_does_not_switch_postgres_off() -> None:
    assert resolve(environ={"HQ_BACKUPS_BACKUP_POSTGRES": ""}).enabled == ("postgres",)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("postgresql_s3", "postgres_s3"),
        ("couchdb_s3", "couch_s3"),
        ("POSTGRES_S3", "postgres_s3"),
        ("nadirhour", "nadir_hour"),
    ],
)
def test_an_unknown_name_is_an_error_with_the_nearest_match(name: str, near: str) -> None:
    resolved = resolve({name: True})
    with pytest.raises(ConfigurationError, match=name) as caught:
        resolved.config()
    assert caught.value.hint == f"Is {near} meant?"
    assert caught.value.exit_code == Exit.USAGE


def test_an_unknown_variable_is_an_error_with_the_nearest_match() -> None:
    (finding,) = resolve(environ={"HQ_BACKUPS_POSTGRESQL_S3": "1"}).check()
    assert (finding.id, finding.hint) == ("E002", "Is HQ_BACKUPS_POSTGRES_S3 meant?")


def test_variables_that_are_no_settings_are_left_alone(public_yml: MakeFile) -> None:
    environ = {
        **public_yml("{}"),
        "HQ_BACKUPS_ENV_FILE": "/x",
        "HQ_BACKUPS_TESTS_REQUIRE_SERVICES": "1",
        "HOME": "/",
    }
    assert ids(resolve(environ=environ)) == []


def test_an_unknown_name_in_a_map_of_ours_is_an_error() -> None:
    assert ids(resolve({"postgres_users": {"replication": {"user": "x"}}})) == ["E002"]
    resolved = resolve({"postgres_users": {"replication": {"username": "hqrepl"}}})
    assert resolved["postgres_users.replication.username"] == "hqrepl"
    assert ids(resolve(environ={"HQ_BACKUPS_COUCHDB2_USERNAME": "x"})) == []


def test_a_whole_public_yml_may_be_given(public_yml: MakeFile) -> None:
    environ = public_yml(
        "nadir_hour: 16\nusers: {dev_users: {present: []}}\nDATADOG_ENABLED: True\npostgres_s3: yes\n"
        "couch_backup_dir: '{{ encrypted_root }}/b/{{deploy_env}}'\nother: '{{ lookup(\"pipe\", \"id\") }}'\n"
        "root_email: ops@example.com\n"
        "postgres_users: {commcare: {username: hq}, replication: {password: p}}\n"
        "localsettings: {AMAZON_S3_ACCESS_KEY: AK, SOME_OTHER: 1}\n"
        "localsettings_private: {AMAZON_S3_SECRET_KEY: SK}\n"
    )
    resolved = resolve(environ=environ)
    assert ids(resolved) == []
    assert resolved["nadir_hour"] == 16
    assert resolved["couch_backup_dir"] == "/opt/data/b/prod"
    assert resolved["AMAZON_S3_ACCESS_KEY"] == "AK"
    assert resolved.effective["AMAZON_S3_SECRET_KEY"].source.endswith("public.yml (localsettings_private)")
    assert resolved["postgres_users.replication.password"] == "p"


def test_our_own_map_within_localsettings_is_read_strictly(public_yml: MakeFile) -> None:
    assert resolve(environ=public_yml("localsettings: {HQ_BACKUPS: {nadir_hour: 4}}"))["nadir_hour"] == 4
    assert ids(resolve(environ=public_yml("localsettings: {HQ_BACKUPS: {nadirhour: 4}}"))) == ["E002"]


def test_an_encrypted_value_counts_as_unset_and_is_said(public_yml: MakeFile) -> None:
    vault = "!vault |\n    $ANSIBLE_VAULT;1.1;AES256\n    6162\n"
    environ = public_yml(
        f"postgres_s3: True\naws_region: {vault}localsettings_private:\n  AMAZON_S3_ACCESS_KEY: {vault}"
    )
    resolved = resolve(environ=environ)
    assert resolved["AMAZON_S3_ACCESS_KEY"] is None
    assert [f.setting for f in resolved.check() if f.id == "W002"] == ["aws_region", "AMAZON_S3_ACCESS_KEY"]
    assert any("HQ_BACKUPS_AWS_REGION" in note for note in resolved.notes)


def test_an_encrypted_value_is_not_said_when_another_source_has_it(public_yml: MakeFile) -> None:
    environ = public_yml(
        "localsettings_private: {AMAZON_S3_ACCESS_KEY: !vault 'x', AMAZON_S3_SECRET_KEY: !vault 'x'}"
    )
    resolved = resolve(environ=environ, S3_ACCESS_KEY="AK", S3_SECRET_KEY="SK")
    assert resolved["AMAZON_S3_ACCESS_KEY"] == "AK"
    assert ids(resolved) == []


def test_an_encrypted_section_is_said(public_yml: MakeFile) -> None:
    assert ids(resolve(environ=public_yml("localsettings_private: !vault 'x'\n"))) == ["W002"]


def test_a_secret_that_speaks_of_the_vault_counts_as_unset(public_yml: MakeFile) -> None:
    environ = public_yml(
        "localsettings: {COUCH_PASSWORD: '{{ localsettings_private.COUCH_PASSWORD }}'}\nbackup_couch: True"
    )
    resolved = resolve(environ=environ)
    assert resolved["COUCH_PASSWORD"] is None
    assert "W002" in ids(resolved)
    assert not any(id_.startswith("E") for id_ in ids(resolved))


@pytest.mark.parametrize(
    "text",
    [
        "a: !!python/object/apply:os.system ['touch {mark}']",
        "a: !!python/name:os.system",
        "- a\n- b",
        "just text",
        "a: [1",
        "a: *nowhere",
        "\x00",
        "$ANSIBLE_VAULT;1.1;AES256\n6162",
        "? {a: b}\n: c",
    ],
)
def test_a_file_that_is_no_safe_map_is_an_error_and_runs_nothing(
    text: str, tmp_path: Path, public_yml: MakeFile
) -> None:
    mark = tmp_path / "mark"
    assert ids(resolve(environ=public_yml(text.replace("{mark}", str(mark))))) == ["E001"]
    assert not mark.exists()


@pytest.mark.parametrize("path", ["/nonexistent/public.yml", "/", "relative.yml"])
def test_a_file_that_cannot_be_opened_is_an_error(path: str) -> None:
    resolved = resolve(environ={"HQ_BACKUPS_CONFIG": path})
    with pytest.raises(ConfigurationError, match="cannot be read"):
        resolved.config()


def test_the_file_may_be_named_in_django_too(public_yml: MakeFile) -> None:
    path = public_yml("nadir_hour: 5\n")["HQ_BACKUPS_CONFIG"]
    assert resolve(HQ_BACKUPS_CONFIG=path)["nadir_hour"] == 5


def test_two_names_of_one_setting_must_agree(public_yml: MakeFile) -> None:
    assert resolve({"elastcsearch_backup_days": 9})["elasticsearch_backup_days"] == 9
    assert resolve({"couchdb_data_dir": "/a", "couch_data_dir": "/a/"})["couch_data_dir"] == "/a"
    resolved = resolve({"couchdb_data_dir": "/a", "couch_data_dir": "/b", "backup_couch": True})
    assert "E012" in ids(resolved)
    with pytest.raises(ConfigurationError, match="two names"):
        resolved.require("couch")
    stronger = resolve({"couchdb_data_dir": "/a"}, public_yml("couch_data_dir: /b"))
    assert (stronger["couch_data_dir"], ids(stronger)) == ("/a", [])


@pytest.mark.parametrize(
    "text", ["{{ aws_region }}", "a{% if x %}b", "{{ encrypted_root | upper }}", "{{ encrypted_root"]
)
def test_other_expressions_are_errors_and_never_run(text: str, public_yml: MakeFile) -> None:
    assert ids(resolve({"aws_region": text})) == ["E004"]
    assert ids(resolve(environ=public_yml(f"aws_region: '{text}'"))) == ["E004"]


@pytest.mark.parametrize(
    "given_",
    [
        {"encrypted_root": "/{{ encrypted_root }}"},
        {"deploy_env": "{{ env_monitoring_id }}", "env_monitoring_id": "{{ deploy_env }}"},
    ],
)
def test_expressions_that_go_in_a_circle_are_errors(given_: dict[str, Any]) -> None:
    resolved = resolve(given_)
    assert "E004" in ids(resolved)
    with pytest.raises(ConfigurationError):
        resolved.config()


def test_a_secret_may_look_like_an_expression_outside_of_a_file() -> None:
    resolved = resolve({"AMAZON_S3_SECRET_KEY": "a{{b"})
    assert resolved["AMAZON_S3_SECRET_KEY"] == "a{{b"


def test_hq_s_own_settings_are_used() -> None:
    resolved = resolve(
        S3_ACCESS_KEY="AK",
        S3_SECRET_KEY="SK",
        SHARED_DRIVE_CONF=SimpleNamespace(blob_dir="/opt/shared_prod/blobdb"),
        COUCH_DATABASES={
            "default": {"COUCH_USERNAME": "u", "COUCH_PASSWORD": "p", "COUCH_SERVER_ROOT": "proxy:25984"}
        },
        ELASTICSEARCH_HOSTS=["es0", "es1:9201"],
        ELASTICSEARCH_PORT=9200,
        DATABASES={"default": {"ENGINE": "django.db.backends.postgresql", "HOST": "pgb", "PORT": "6432"}},
    )
    assert resolved["AMAZON_S3_SECRET_KEY"] == "SK"
    assert resolved["blobdb_dir_path"] == "/opt/shared_prod/blobdb"
    assert (resolved["COUCH_USERNAME"], resolved["COUCH_PASSWORD"]) == ("u", "p")
    assert resolved["couchdb_url"] == "http://127.0.0.1:15984"
    assert resolved["elasticsearch_url"] == ("http://es0:9200", "http://es1:9201")
    assert resolved["postgresql_host"] is None
    assert resolved["postgresql_port"] == 5432
    assert ids(resolved) == []


@pytest.mark.parametrize("wrong", [5, "text", ["postgres_s3"]])
def test_a_map_that_is_none_is_an_error(wrong: Any) -> None:
    assert ids(conf.resolve(django(HQ_BACKUPS=wrong), {})) == ["E001"]


def test_a_misfit_names_the_setting_and_the_source() -> None:
    (finding,) = resolve(environ={"HQ_BACKUPS_POSTGRESQL_BACKUP_DAYS": "-1"}).check()
    assert finding.message == (
        "postgresql_backup_days in environment variable HQ_BACKUPS_POSTGRESQL_BACKUP_DAYS "
        "must be at least 0, not '-1'"
    )
    assert finding.store == "postgres"


def test_settings_are_read_at_use(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings.HQ_BACKUPS = {"nadir_hour": 7}
    assert conf.resolve()["nadir_hour"] == 7
    monkeypatch.setenv("HQ_BACKUPS_NADIR_HOUR", "9")
    settings.HQ_BACKUPS = {}
    assert conf.resolve()["nadir_hour"] == 9


@given(
    st.dictionaries(
        st.sampled_from(sorted(BY_ANY_NAME)), st.text() | st.integers() | st.booleans() | st.none()
    )
)
def test_nonsense_is_told_and_never_raised(values: dict[str, Any]) -> None:
    resolved = resolve(values)
    assert all(isinstance(finding.message, str) for finding in resolved.check())
    assert conf.describe(resolved)
    for store in ("postgres", "couch"):
        with contextlib.suppress(ConfigurationError):
            resolved.config((store,))


@given(st.dictionaries(st.sampled_from(sorted(map(env_name, BY_ANY_NAME))), st.text()))
def test_a_nonsensical_environment_is_told_and_never_raised(environ: dict[str, str]) -> None:
    assert isinstance(resolve(environ=environ).check(), tuple)


def test_nothing_is_read_of_the_process_when_an_environment_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "HQ_BACKUPS_NADIR_HOUR", "9")
    assert resolve()["nadir_hour"] == 0


def test_expressions_are_expanded_at_any_depth(public_yml: MakeFile) -> None:
    environ = public_yml(
        "postgresql_stop_command: ['{{ encrypted_root }}/stop', now]\n"
        "backup_hosts: {'pg-{{ deploy_env }}': [postgres]}\n"
    )
    resolved = resolve(environ=environ)
    assert resolved["postgresql_stop_command"] == ("/opt/data/stop", "now")
    assert resolved["backup_hosts"] == {"pg-prod": ("postgres",)}


def test_an_expression_of_what_is_not_set_is_an_error() -> None:
    settings = SimpleNamespace(HQ_BACKUPS={"postgresql_backup_dir": "/b/{{ deploy_env }}"})
    assert [finding.id for finding in conf.resolve(settings, {}).check()] == ["E004", "E005"]


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n"])
def test_an_empty_file_says_nothing(text: str, public_yml: MakeFile) -> None:
    assert ids(resolve(environ=public_yml(text))) == []


def test_ansible_s_unsafe_text_is_text(public_yml: MakeFile) -> None:
    assert resolve(environ=public_yml("aws_region: !unsafe eu-west-1"))["aws_region"] == "eu-west-1"


def test_a_tag_on_one_of_our_names_is_an_error(public_yml: MakeFile) -> None:
    assert ids(resolve(environ=public_yml("aws_region: !secret x\nother: !secret y"))) == ["E003"]


@pytest.mark.parametrize(
    ("hosts", "urls"),
    [("es0", ("http://es0:9200",)), (["https://es0:443"], ("https://es0:443",)), (["es0", "es1"], None)],
)
def test_elasticsearch_s_hosts_may_be_written_in_several_ways(hosts: Any, urls: Any) -> None:
    resolved = resolve(ELASTICSEARCH_HOSTS=hosts)
    assert resolved["elasticsearch_url"] == (urls or ("http://es0:9200", "http://es1:9200"))


def test_an_ill_typed_setting_of_hq_stops_only_its_store() -> None:
    resolved = resolve({"es_local_repo": True}, ELASTICSEARCH_HOSTS=5)
    assert "settings.ELASTICSEARCH_HOSTS" in resolved.check()[0].message
    resolved.require("postgres")
    with pytest.raises(ConfigurationError):
        resolved.require("elasticsearch")


def test_a_default_that_does_not_fit_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    (finding,) = resolve(environ={"XDG_STATE_HOME": "/state\x01"}).check()
    assert (finding.id, finding.setting) == ("E003", "backup_state_dir")
