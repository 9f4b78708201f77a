from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hq_backups.problems import LONGEST, LONGEST_KEY, Problem, ordered

LATE = Problem(
    "postgres/missed/daily", "alert", "postgres", "no daily backup for 31 hours", "why", "type this"
)


def test_a_problem_survives_the_state_file() -> None:
    assert Problem.from_plain(json.loads(json.dumps(LATE.to_plain()))) == LATE


@pytest.mark.parametrize("data", [None, [], "text", {}, {"key": "", "title": "x"}, {"key": "x", "title": 5}])
def test_what_is_no_problem_is_none(data: object) -> None:
    assert Problem.from_plain(data) is None


_anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=3)
)


@given(st.dictionaries(st.sampled_from([*LATE.to_plain(), "other"]), _anything))
def test_whatever_a_file_holds_is_read_or_refused_and_bounded(data: dict[str, object]) -> None:
    problem = Problem.from_plain(data)
    if problem is not None:
        assert len(problem.key) <= LONGEST_KEY
        assert all(len(getattr(problem, name)) <= limit for name, limit in LONGEST.items())
        assert Problem.from_plain(problem.to_plain()) == problem


def test_one_key_is_told_once_the_graver_of_two_and_the_gravest_first() -> None:
    mild = Problem("a", "warning", None, "mild")
    grave = Problem("a", "error", None, "grave")
    assert ordered([mild, LATE, grave, mild]) == [grave, LATE]
