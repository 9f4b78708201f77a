"""Samples of what HQ's database says of its blobs, for ``verify_backup`` to look for in a backup.

Where they come from can be changed: the setting ``blobdb_verifier`` names a function that takes how many are wanted
and yields ``(key, size, created)``: the key as BlobMeta has it, the bytes on the disk, an aware moment.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from itertools import islice
from typing import Any

from django.utils.module_loading import import_string

from hq_backups.engine.events import format_utc
from hq_backups.engine.requests import BlobRecord

LIMIT = 1000
"""Records that are compared."""
_RUN = 20
"""Records that are read from one place: each place costs a search."""

Row = tuple[str, int, datetime]
Verifier = Callable[[int], Iterable[Row]]


class NoRecords(Exception):
    """There are no records to compare with, and this says why."""


def sample(verifier: str | bool | None) -> tuple[BlobRecord, ...]:
    """Return some records, by the function that the setting names; raises NoRecords."""
    if not verifier:
        raise NoRecords("blobdb_verifier is switched off")
    try:
        function: Verifier = import_string(str(verifier))
        rows = list(islice(function(LIMIT), LIMIT))
        found = tuple(BlobRecord(str(key), int(size), format_utc(created)) for key, size, created in rows)
    except NoRecords:
        raise
    except Exception as error:
        # A backup is verified with HQ's database down, too.
        raise NoRecords(f"{verifier} failed: {type(error).__name__}: {error}") from error
    if not found:
        raise NoRecords("HQ's database knows no blobs")
    return found


def blob_meta(limit: int) -> Iterator[Row]:
    """Sample HQ's own table, over all databases that it is spread over."""
    try:
        from corehq.blobs.models import BlobMeta  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise NoRecords("HQ is not installed here") from None
    return of_model(BlobMeta, limit, _aliases())


def of_model(model: Any, limit: int, aliases: Iterable[str] = ("default",)) -> Iterator[Row]:
    """Sample any model with BlobMeta's columns, in short runs from places that chance chooses."""
    aliases = list(aliases)
    for alias in aliases:
        rows = model.objects.using(alias).order_by("id")
        first, last = (rows.values_list("id", flat=True).first(), rows.values_list("id", flat=True).last())
        if first is None or last is None:
            continue
        seen: set[int] = set()
        for _ in range(max(1, limit // len(aliases) // _RUN)):
            start = random.randint(first, last)
            for row in rows.filter(id__gte=start)[:_RUN]:
                if row.id not in seen:
                    seen.add(row.id)
                    yield row.key, _stored(row), row.created_on


def _stored(row: Any) -> int:
    """Return the bytes on the disk: HQ compresses some blobs."""
    compressed = getattr(row, "compressed_length", None)
    return int(row.content_length if compressed is None else compressed)


def _aliases() -> Iterable[str]:
    try:
        from corehq.sql_db.util import (  # type: ignore[import-not-found,unused-ignore]
            get_db_aliases_for_partitioned_query,
        )
    except ImportError:
        return ("default",)
    found: Iterable[str] = get_db_aliases_for_partitioned_query()
    return found
