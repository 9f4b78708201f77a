"""What the history's lists can be narrowed by, at a cost that does not grow with their rows."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import TYPE_CHECKING, Any

from django.contrib import admin
from django.contrib.admin.views.main import ChangeList
from django.db.models import JSONField, QuerySet
from django.http import HttpRequest
from django.utils import timezone

from hq_backups.cards import LABELS
from hq_backups.clock import aware
from hq_backups.engine.config import TYPES

VERBS = ("backup", "restore", "verify", "upload", "prune", "undo", "check")
RECENT = 1000
"""Hosts are looked for in so many of the newest rows."""
SHOWN = ("warnings", "locations")
"""The JSON that a list shows."""

if TYPE_CHECKING:
    Rows = QuerySet[Any]
else:
    # Subscripts are the stubs' alone.
    Rows = QuerySet


class List(ChangeList):
    """A list that leaves in the database what it does not show."""

    def get_queryset(self, request: HttpRequest, exclude_parameters: Any = None) -> QuerySet[Any]:
        """Return the rows without manifests, steps and facts."""
        fields = self.model._meta.concrete_fields
        long = [f.name for f in fields if isinstance(f, JSONField) and f.name not in SHOWN]
        return super().get_queryset(request, exclude_parameters).defer(*long)


class ByDate(Rows):
    """Rows of a list with a date hierarchy."""

    def datetimes(self, field_name: str, kind: str, *_: Any, **__: Any) -> list[datetime]:  # type: ignore[override]
        """Return every year, month or day from the first row's to the last one's.

        Django would cut down each row's time to find those that have one.
        """
        at = self.order_by(field_name).values_list(field_name, flat=True)
        first, last = at.first(), at.last()
        if first is None or last is None:
            return []
        return list(_between(timezone.localtime(aware(first)), timezone.localtime(aware(last)), kind))


def _between(first: datetime, last: datetime, kind: str) -> Iterable[datetime]:
    def start(year: int, month: int = 1, day: int = 1) -> datetime:
        return datetime(year, month, day, tzinfo=first.tzinfo)

    if kind == "year":
        yield from (start(year) for year in range(first.year, last.year + 1))
    elif kind == "month":
        for number in range(first.year * 12 + first.month - 1, last.year * 12 + last.month):
            yield start(number // 12, number % 12 + 1)
    else:
        for number in range(first.toordinal(), last.toordinal() + 1):
            day = datetime.fromordinal(number)
            yield start(day.year, day.month, day.day)


class Known(admin.SimpleListFilter):
    """A column whose values are known without asking."""

    values: tuple[tuple[str, str], ...] = ()

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        """Return them."""
        return list(self.values)

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        """Narrow the rows."""
        return queryset.filter(**{self.parameter_name or "": self.value()}) if self.value() else queryset


class Store(Known):
    """By store."""

    title = parameter_name = "store"
    values = tuple(LABELS.items())


class Type(Known):
    """By type of backup."""

    title = parameter_name = "type"
    values = tuple((type, type) for type in TYPES)


class Verb(Known):
    """By what was done."""

    title = parameter_name = "verb"
    values = tuple((verb, verb) for verb in VERBS)


class State(Known):
    """By whether it is still there."""

    title, parameter_name = "state", "state"
    values = (("there", "there"), ("gone", "gone"))

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        """Narrow the rows."""
        return queryset.filter(gone_at__isnull=self.value() == "there") if self.value() else queryset


class Host(Known):
    """By host: those of the newest rows, and the one that was asked for."""

    title = parameter_name = "host"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        """Return the hosts."""
        newest = model_admin.model._default_manager.values_list("host", flat=True)[:RECENT]
        hosts = {*newest, self.used_parameters.get("host")} - {"", None}
        return [(host, host) for host in sorted(map(str, hosts))]
