"""Settings: where they come from, what they add up to, and what is wrong with them."""

from hq_backups.conf.describe import describe
from hq_backups.conf.findings import Finding
from hq_backups.conf.resolved import Effective, Resolved
from hq_backups.conf.resolver import resolve

__all__ = ["Effective", "Finding", "Resolved", "describe", "resolve"]
