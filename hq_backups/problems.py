"""What is wrong with the backups, in one form for mails, pages, metrics and commands. Plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

ERROR, ALERT, WARNING = "error", "alert", "warning"
SEVERITIES = (ERROR, ALERT, WARNING)
"""Gravest first. An error keeps backups from being made or judged, an alert says that some are missing or bad."""

LONGEST_KEY = 200
LONGEST = {"title": 300, "cause": 4000, "command": 1000, "host": 255, "last_good": 600}
"""Characters that one field has at most: what comes from servers and file names may be of any length."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong."""

    key: str
    """A stable identity, such as ``postgres/missed/daily``: who was told of a key is not told again."""
    severity: str
    store: str | None
    title: str
    """One line, plain words."""
    cause: str = ""
    """Why, one paragraph."""
    command: str = ""
    """The exact next command to type."""
    host: str = ""
    last_good: str = ""
    """The last good backup, such as ``postgres_icds_daily_2026_11_22.tar.gz, 31 hours old``."""

    def to_plain(self) -> dict[str, Any]:
        """Return plain data."""
        return dataclasses.asdict(self)

    @classmethod
    def from_plain(cls, data: object) -> Problem | None:
        """Read what may have been damaged or written by somebody else; None when it is no problem at all."""
        if not isinstance(data, Mapping):
            return None
        key, title, store = data.get("key"), data.get("title"), data.get("store")
        if not (isinstance(key, str) and key and isinstance(title, str) and title):
            return None
        severity = data.get("severity")
        return cls(
            key[:LONGEST_KEY],
            severity if severity in SEVERITIES else ERROR,
            store[:32] if isinstance(store, str) and store else None,
            title[: LONGEST["title"]],
            **{name: str(data.get(name) or "")[:limit] for name, limit in LONGEST.items() if name != "title"},
        )


def ordered(problems: Iterable[Problem]) -> list[Problem]:
    """Return each key once, the gravest first; of two with one key, the graver."""
    found: dict[str, Problem] = {}
    for problem in problems:
        known = found.get(problem.key)
        if known is None or rank(problem) < rank(known):
            found[problem.key] = problem
    return sorted(found.values(), key=lambda each: (rank(each), each.store or "", each.key))


def rank(problem: Problem) -> int:
    """Return how grave it is: 0 is the gravest."""
    return SEVERITIES.index(problem.severity) if problem.severity in SEVERITIES else 0
