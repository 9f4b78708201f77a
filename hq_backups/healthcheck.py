"""How the backups stand, as a check of django-health-check 4. Extra ``health-check``.

In a host's ``HealthCheckView``: ``checks=[…, "hq_backups.healthcheck.Backups"]``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta

from django.db import connections
from health_check.base import HealthCheck
from health_check.exceptions import ServiceUnavailable, ServiceWarning

from hq_backups.problems import WARNING
from hq_backups.report import report


@dataclass
class Backups(HealthCheck):  # type: ignore[misc] # it has no types
    """Fails while a backup is missing, late or bad, and while that cannot be known."""

    store: str | None = None
    """The one store that is asked for; every one when it is not named."""
    timeout: timedelta = field(default=timedelta(seconds=20), repr=False)

    def run(self) -> None:
        """Raise what is wrong, in words without secrets."""
        try:
            problems = report().problems
        finally:
            # It runs in a thread of its own, whose connection nobody else would close.
            connections.close_all()
        if self.store is not None:
            problems = tuple(each for each in problems if each.store in (None, self.store))
        words = "; ".join(f"{each.store}: {each.title}" if each.store else each.title for each in problems)
        if any(each.severity != WARNING for each in problems):
            raise ServiceUnavailable(words)
        if words:
            raise ServiceWarning(words)
