"""Tell what is wrong with the settings in Django's system checks."""

from __future__ import annotations

from typing import Any

from django.core.checks import CheckMessage, Error, Warning

from hq_backups import conf


def check_settings(**kwargs: Any) -> list[CheckMessage]:
    """Return every finding as a message of Django's."""
    return [as_message(finding) for finding in conf.resolve().check()]


def as_message(finding: conf.Finding) -> CheckMessage:
    """Return one finding as Django shows it."""
    kind = Error if finding.level == "error" else Warning
    id_ = f"hq_backups.{finding.id}"
    return kind(finding.message, hint=finding.hint or None, obj=finding.setting, id=id_)
