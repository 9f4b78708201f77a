"""What a check found, as problems with keys that stay, and what of it ends an alarm."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from django.test import override_settings

from hq_backups import checked, conf
from hq_backups.alarm_state import Good, State
from hq_backups.engine.errors import Unreachable
from hq_backups.engine.judgement import ALERT, ERROR, OK, WARNING, Finding
from hq_backups.problems import LONGEST_KEY

NOW = datetime(2026, 11, 24, 3, 0, tzinfo=UTC)
KNOWN = State(good={"postgres/daily": Good(NOW - timedelta(hours=31), "x.tar.gz")})


@pytest.fixture
def resolved() -> Iterator[conf.Resolved]:
    with override_settings(HQ_BACKUPS={"deploy_env": "icds", "backup_host_name": "pg0"}):
        yield conf.resolve()


def problem(resolved: conf.Resolved, finding: Finding) -> Any:
    return checked.problem(resolved, "postgres", finding.to_plain(), KNOWN, NOW)


def test_a_backup_that_is_late_and_then_stale_is_one_problem_that_grows(resolved: conf.Resolved) -> None:
    hours = [("late", 31), ("stale", 55)]
    found = [
        problem(
            resolved, Finding(code, ALERT, "m", "h", "daily", "postgres_daily_pg0.tar.gz", age=3600.0 * age)
        )
        for code, age in hours
    ]
    assert {p.key for p in found} == {"check/postgres@pg0/fresh/daily"}
    assert [p.title for p in found] == ["no daily backup for 31 hours", "no daily backup for 2 days"]
    assert found[0].last_good == "postgres_daily_pg0.tar.gz, 31 hours old"
    assert found[0].command == "commcare-cloud icds django-manage run_backup postgres --type daily"


def test_each_damaged_backup_is_a_problem_of_its_own(resolved: conf.Resolved) -> None:
    keys = {
        problem(resolved, Finding(code, ALERT, "m", key=key, version_id=version)).key
        for code, key, version in (
            ("gone", "a", "1"),
            ("gone", "a", "2"),
            ("gone", "b", None),
            ("empty", "a", "1"),
        )
    }
    assert len(keys) == 4


def test_names_that_are_too_long_stay_apart(resolved: conf.Resolved) -> None:
    first, second = (problem(resolved, Finding("gone", ALERT, "m", key="n" * 900 + end)).key for end in "ab")
    assert first != second
    assert max(len(first), len(second)) <= LONGEST_KEY


def test_a_hostile_key_is_no_command_of_its_own(resolved: conf.Resolved) -> None:
    found = problem(resolved, Finding("shrunk", ALERT, "m", key="x; rm -rf /\n$(id)"))
    assert "verify_backup 'x; rm -rf /?$(id)' --store postgres" in found.command


def test_all_is_well_is_no_problem_and_a_warning_is_one_that_is_not_mailed(resolved: conf.Resolved) -> None:
    assert problem(resolved, Finding("newest", OK, "m")) is None
    assert problem(resolved, Finding("old-cron", WARNING, "m")).severity == "warning"


def test_a_bucket_that_did_not_answer_says_nothing_of_what_it_holds(resolved: conf.Resolved) -> None:
    shrunk = problem(resolved, Finding("shrunk", ALERT, "m", key="k"))
    unreachable = problem(
        resolved, Finding("unreachable", ERROR, "The postgres backups could not be checked: x")
    )
    assert unreachable.key == "asked/postgres@pg0"
    assert unreachable.last_good == "x.tar.gz, 31 hours old"
    (silent,) = checked.reports(resolved, "postgres", [unreachable])
    assert not silent.covers(shrunk.key)
    answered = checked.reports(resolved, "postgres", [shrunk])
    assert any(report.covers(unreachable.key) for report in answered)
    assert any(report.covers(shrunk.key) and shrunk in report.problems for report in answered)


def test_a_check_that_could_not_begin_is_one_that_got_no_answer(resolved: conf.Resolved) -> None:
    error = Unreachable(endpoint="https://s3", message="no route", hint="Look.")
    found = checked.refusal(resolved, "postgres", error, KNOWN, NOW)
    assert (found.key, found.cause) == ("asked/postgres@pg0", "https://s3 cannot be reached: no route. Look")
