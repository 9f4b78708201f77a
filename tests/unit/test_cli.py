"""Options that reach us through commcare-cloud, names, exit codes of several jobs."""

from __future__ import annotations

import argparse
import importlib
import io
from typing import Any

import pytest
import time_machine
from django.core.management import call_command
from django.core.management.base import CommandError

from hq_backups import cli, clock, standalone
from hq_backups.engine.config import Config
from hq_backups.engine.errors import Exit

VERBS = standalone.commands()
WRAPPERS_OWN = ("--server", "--release", "--tee", "--tmux", "--quiet")


def parser_of(verb: str) -> argparse.ArgumentParser:
    command = importlib.import_module(f"hq_backups.management.commands.{verb}").Command()
    parser: argparse.ArgumentParser = command.create_parser("manage.py", verb)
    return parser


def ours(verb: str) -> list[str]:
    return [option for action in parser_of(verb)._actions for option in action.option_strings]


@pytest.mark.parametrize("verb", VERBS)
def test_no_option_is_eaten_by_commcare_cloud(verb: str) -> None:
    eaten = [o for o in ours(verb) if o.startswith("--") and any(own.startswith(o) for own in WRAPPERS_OWN)]
    assert eaten == []
    # argparse takes -sX as -s X: a short option of ours would be in its way.
    assert {o for o in ours(verb) if not o.startswith("--")} <= {"-h", "-v"}


@pytest.mark.parametrize("verb", VERBS)
def test_what_commcare_cloud_parses_leaves_our_options_alone(verb: str) -> None:
    wrapper = argparse.ArgumentParser(add_help=False)
    for option in WRAPPERS_OWN:
        wrapper.add_argument(option, nargs="?")
    words = [f"{option}=x" for option in ours(verb) if option.startswith("--")]
    assert wrapper.parse_known_args(words)[1] == words


@pytest.mark.parametrize("verb", VERBS)
def test_options_cannot_be_shortened(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert parser_of(verb).allow_abbrev is False
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"hq_backups.management.commands.{verb}").Command().run_from_argv(
            [
                "manage.py",
                verb,
                "--verbosi=1",
                *(["postgres", "latest"] if verb == "restore_backup" else ["postgres"]),
            ]
        )
    assert ended.value.code == 2


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_examples_of_the_program_that_was_called(verb: str) -> None:
    help_text = parser_of(verb).format_help()
    assert "\nexamples:\n" in help_text
    assert f"  manage.py {verb}" in help_text
    assert "%(prog)s" not in help_text


def test_couchdb_is_couch_and_a_wrong_name_is_answered_with_the_nearest() -> None:
    assert cli.store_name("couchdb") == "couch"
    assert cli.store_name("Postgres") == "postgres"
    assert cli.store_or_all("ALL") == "all"
    with pytest.raises(argparse.ArgumentTypeError, match="did you mean postgres"):
        cli.store_name("postgresql")
    with pytest.raises(argparse.ArgumentTypeError, match="not a store"):
        cli.store_name("all")


@pytest.mark.parametrize(
    ("name", "store"),
    [
        ("postgres_demo_daily_2026_11_22.tar.gz", "postgres"),
        ("postgres_daily_pg0.tar.gz", "postgres"),
        ("/opt/data/backups/couchdb2/couchdb_daily_2026_11_22.tar.gz", "couch"),
        ("blobdb_weekly_2026_11_22.tar.gz", "blobdb"),
        ("latest", None),
        ("postgresql.tar", None),
    ],
)
def test_a_name_says_its_store(name: str, store: str | None) -> None:
    assert cli.store_of_name(name) == store


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ([], 0),
        ([0, 0], 0),
        ([5], 5),
        ([7], 7),
        ([0, 7], 7),
        ([6, 7], 6),
        ([7, 6, 0], 6),
        ([3, 0], 1),
        ([2, 6, 7], 1),
        ([5, 0], 1),
    ],
)
def test_several_jobs_end_in_one_exit_code(codes: list[int], code: int) -> None:
    assert cli.worst([Exit(each) for each in codes]) == code


@pytest.mark.parametrize(
    ("moment", "zone", "type_"),
    [
        ("2026-11-22T12:00:00Z", "UTC", "weekly"),
        ("2026-11-23T12:00:00Z", "UTC", "daily"),
        ("2026-11-21T23:30:00Z", "Asia/Kolkata", "weekly"),
        ("2026-11-22T23:30:00Z", "Asia/Kolkata", "daily"),
        ("2026-11-23T03:00:00Z", "America/New_York", "weekly"),
    ],
)
def test_auto_goes_by_the_hosts_own_sunday(moment: str, zone: str, type_: str) -> None:
    with time_machine.travel(moment, tick=False):
        assert clock.automatic_type(Config("demo", "pg0", timezone=zone)) == type_


def test_the_hosts_zone_is_not_the_one_that_django_put_into_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    assert clock.host_time_zone() != "Pacific/Kiritimati"
    monkeypatch.setattr(clock.os.path, "realpath", lambda _: "/usr/share/zoneinfo/posix/Africa/Dakar")
    assert clock.host_time_zone() == "Africa/Dakar"


def test_a_zone_of_a_copied_file_is_read_elsewhere_or_unknown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    named = tmp_path / "timezone"
    monkeypatch.setattr(clock.os.path, "realpath", lambda _: "/etc/localtime")
    monkeypatch.setattr(clock, "Path", lambda _: named)
    assert clock.host_time_zone() is None
    named.write_text("Asia/Kolkata\n")
    assert clock.host_time_zone() == "Asia/Kolkata"


def test_bad_arguments_are_refused_by_name() -> None:
    for convert, bad in (
        (cli.days, "-1"),
        (cli.days, "x"),
        (cli.local_date, "22.11.2026"),
        (cli.local_date, "2026-13-01"),
    ):
        with pytest.raises(argparse.ArgumentTypeError, match=bad):
            convert(bad)
    assert (cli.days("90"), cli.local_date("2026-11-22")) == (90, "2026-11-22")


def test_called_from_code_a_wrong_option_is_a_command_error() -> None:
    with pytest.raises(CommandError):
        call_command("run_backup", "nothing", stdout=io.StringIO())
