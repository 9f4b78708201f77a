"""What a check of the bucket found, as problems and as what is to be told of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from hq_backups.alarm_state import State
from hq_backups.alerts import Report
from hq_backups.commandline import typed
from hq_backups.engine import judgement
from hq_backups.engine.errors import HQBackupsError
from hq_backups.engine.judgement import age_words
from hq_backups.last_good import good_words
from hq_backups.problems import ALERT, ERROR, LONGEST_KEY, WARNING, Problem

if TYPE_CHECKING:
    from hq_backups.conf import Resolved

FRESH = ("missing", "stale", "late")
"""One problem that grows: it keeps its key, so that it is told once."""
SEVERITY = {judgement.ERROR: ERROR, judgement.ALERT: ALERT, judgement.WARNING: WARNING}


def problem(
    resolved: Resolved, store: str, finding: Mapping[str, Any], state: State, now: datetime
) -> Problem | None:
    """Return a finding as a problem; None for one that says that all is well."""
    severity = SEVERITY.get(str(finding.get("severity")))
    if severity is None:
        return None
    host = str(resolved["backup_host_name"] or "")
    key, title, words = _about(store, finding)
    line = str(finding.get("line") or "").partition("] ")[2]
    cause = ". ".join(part for part in (line, str(finding.get("hint") or "")) if part)
    full = asked_key(store, host) if severity == ERROR else f"check/{store}@{host}/{key}"
    last = good_words(state, store, now)
    if finding.get("code") in ("stale", "late") and finding.get("age_seconds") is not None:
        last = f"{finding.get('key')}, {_age(finding)} old"
    return Problem(
        _bounded(full), severity, store, title, cause, typed(resolved, *words, host=host), host, last
    )


def _about(store: str, finding: Mapping[str, Any]) -> tuple[str, str, list[str]]:
    """Return the last part of the key, the title and the next command."""
    code, type_ = str(finding.get("code")), str(finding.get("type") or "")
    name, message = str(finding.get("key") or ""), str(finding.get("line") or "").partition("] ")[2]
    if code in FRESH:
        age = f" for {_age(finding)}" if finding.get("age_seconds") is not None else ""
        return f"fresh/{type_}", f"no {type_} backup{age}", ["run_backup", store, "--type", type_]
    if code == "shrunk":
        words = ["verify_backup", name, "--store", store, "--source", "s3", "--deep"]
        return "shrunk", f"the newest backup shrank: {message}", words
    if finding.get("severity") == judgement.ERROR:
        return "", "the backups could not be checked", ["check_s3_backups", store]
    if name:
        which = "/".join(part for part in (code, name, str(finding.get("version_id") or "")) if part)
        return which, f"a damaged backup: {message}", ["list_backups", store, "--source", "s3"]
    return code, message, ["check_s3_backups", store]


def _age(finding: Mapping[str, Any]) -> str:
    return age_words(timedelta(seconds=float(finding["age_seconds"])))


def _bounded(key: str) -> str:
    if len(key) <= LONGEST_KEY:
        return key
    return f"{key[: LONGEST_KEY - 17]}~{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def asked_key(store: str, host: str) -> str:
    """Return the key of a check that got no answer."""
    return f"asked/{store}@{host}"


def refusal(resolved: Resolved, store: str, error: HQBackupsError, state: State, now: datetime) -> Problem:
    """Return the problem of a check that could not even begin."""
    host = str(resolved["backup_host_name"] or "")
    cause = ". ".join(part.strip(". ") for part in (error.message, error.hint) if part)
    command = typed(resolved, "check_s3_backups", store, host=host)
    return Problem(
        asked_key(store, host), ERROR, store, "the backups could not be checked", cause, command, host,
        good_words(state, store, now),
    )  # fmt: skip


def reports(resolved: Resolved, store: str, problems: Sequence[Problem]) -> list[Report]:
    """Return what a check of one store says: one that got no answer says nothing of the backups."""
    host = str(resolved["backup_host_name"] or "")
    key = asked_key(store, host)
    unanswered = tuple(p for p in problems if p.key == key)
    if unanswered:
        return [Report(key, unanswered)]
    return [Report(key), Report(f"check/{store}@{host}/", tuple(problems))]
