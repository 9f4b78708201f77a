"""Tell what is wrong with the settings in Django's system checks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from django.core.checks import CheckMessage, Error, Warning

from hq_backups import conf, mailing


def check_settings(**kwargs: Any) -> list[CheckMessage]:
    """Return every finding as a message of Django's."""
    resolved = conf.resolve()
    return [as_message(finding) for finding in (*resolved.check(), *_receivers(resolved))]


def _receivers(resolved: conf.Resolved) -> Iterator[conf.Finding]:
    """Yield that alarms have no receiver; commands, which somebody looks at, need not repeat it."""
    if resolved.switched_on and not mailing.recipients(resolved):
        message = "alarms are mailed to nobody: neither check_s3_backups_email nor ADMINS is set"
        yield conf.Finding("W016", message, "Set check_s3_backups_email.", None, "check_s3_backups_email")


def as_message(finding: conf.Finding) -> CheckMessage:
    """Return one finding as Django shows it."""
    kind = Error if finding.level == "error" else Warning
    id_ = f"hq_backups.{finding.id}"
    return kind(finding.message, hint=finding.hint or None, obj=finding.setting, id=id_)
