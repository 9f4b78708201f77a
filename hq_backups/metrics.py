"""How the backups stand, as metrics: a collector that asks the records when it is scraped. Extra ``metrics``.

In a process that exports metrics already: ``prometheus_client.REGISTRY.register(BackupCollector())``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from hq_backups.problems import SEVERITIES
from hq_backups.report import Report, report


class BackupCollector(Collector):
    """Yields what is known at this moment; a dead database is a metric that says so, never an exception."""

    def describe(self) -> Iterator[Metric]:
        """Ask nothing when it is registered."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Yield every metric."""
        try:
            found = report()
        except Exception:
            # A scrape that fails loses the metrics of everything else in this process.
            found = None
        yield _gauge("up", "1 when the records could be read.", float(found is not None and found.database))
        if found is not None:
            yield from _of_backups(found)
            yield from _of_stores(found)
            yield _problems(found)


def _gauge(
    name: str, help: str, value: float | None = None, labels: tuple[str, ...] | None = None
) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"hq_backups_{name}", help, value=value, labels=labels)


def _of_backups(found: Report) -> Iterator[Metric]:
    labels = ("store", "host", "type")
    at = _gauge("last_success_timestamp_seconds", "When the newest good backup began.", labels=labels)
    age = _gauge("last_success_age_seconds", "How old the newest good backup is.", labels=labels)
    size = _gauge("last_success_size_bytes", "Its stored size.", labels=labels)
    took = _gauge("last_success_duration_seconds", "How long it took.", labels=labels)
    late = _gauge("late", "1 when one that was due is not there, grace included.", labels=labels)
    for each in found.standings:
        for type, good in sorted(each.last_good.items()):
            names = (each.store, each.host, type)
            at.add_metric(names, good.taken_at.timestamp())
            age.add_metric(names, (found.at - good.taken_at).total_seconds())
            if good.size is not None:
                size.add_metric(names, good.size)
            if good.seconds is not None:
                took.add_metric(names, good.seconds)
        for type in ("daily", "weekly", "hourly"):
            late.add_metric((each.store, each.host, type), float(type in each.late))
    yield from (at, age, size, took, late)


def _of_stores(found: Report) -> Iterator[Metric]:
    labels = ("store", "host")
    verified = _gauge("verified_timestamp_seconds", "When a backup was last proven whole.", labels=labels)
    restored = _gauge("restore_duration_seconds", "What the last restore or deep verify took.", labels=labels)
    failed = _gauge("last_run_failed", "1 when no good backup came after the last failed one.", labels=labels)
    running = _gauge("running", "1 while a backup runs.", labels=labels)
    for each in found.standings:
        names = (each.store, each.host)
        if each.verified_at is not None:
            verified.add_metric(names, each.verified_at.timestamp())
        if each.restored_in is not None:
            restored.add_metric(names, each.restored_in)
        failed.add_metric(names, float(each.last_failed is not None))
        running.add_metric(names, float(each.running is not None))
    yield from (verified, restored, failed, running)


def _problems(found: Report) -> Metric:
    """Count the problems of each store and severity, none included, so that an alert can fall back."""
    family = _gauge(
        "problems", "What is wrong now; store is empty for what concerns all.", labels=("store", "severity")
    )
    counted = Counter((each.store or "", each.severity) for each in found.problems)
    stores = dict.fromkeys(["", *(each.store for each in found.standings)])
    for store in stores:
        for severity in SEVERITIES:
            family.add_metric((store, severity), counted.pop((store, severity), 0))
    for names, count in counted.items():
        family.add_metric(names, count)
    return family
