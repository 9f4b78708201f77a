"""The history page: what ran, what there is. To look at only, by superusers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.contrib import admin
from django.db.models import Model
from django.http import HttpRequest

from hq_backups.engine.space import human_bytes
from hq_backups.models import Artifact, BackupRun

if TYPE_CHECKING:
    Base = admin.ModelAdmin[Any]
else:
    # Subscripts are the stubs' alone.
    Base = admin.ModelAdmin


class ReadOnly(Base):
    """A list that nobody changes: the catalog and the runs themselves write it."""

    list_per_page = 50
    show_full_result_count = False
    actions = None

    def has_module_permission(self, request: HttpRequest) -> bool:
        """Show it to superusers."""
        return bool(request.user.is_active and request.user.is_superuser)

    def has_view_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        """Let superusers look."""
        return self.has_module_permission(request)

    def has_add_permission(self, request: HttpRequest) -> bool:
        """Let nobody add."""
        return False

    def has_change_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        """Let nobody change."""
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        """Let nobody delete."""
        return False

    @admin.display(description="size", ordering="size")
    def shown_size(self, obj: Any) -> str:
        """Return the size as people read it."""
        return "" if obj.size is None else human_bytes(obj.size)


@admin.register(BackupRun)
class BackupRunAdmin(ReadOnly):
    """Runs, newest first."""

    list_display = (
        "run",
        "status",
        "verb",
        "store",
        "type",
        "host",
        "started_at",
        "took",
        "shown_size",
        "said",
    )
    list_filter = ("status", "verb", "store", "type", "host")
    search_fields = ("run", "artifact", "error")
    date_hierarchy = "started_at"

    @admin.display(description="seconds", ordering="seconds")
    def took(self, obj: BackupRun) -> str:
        """Return how long it took."""
        return "" if obj.seconds is None else f"{obj.seconds:.1f}"

    @admin.display(description="error or warning")
    def said(self, obj: BackupRun) -> str:
        """Return the first words of what was wrong."""
        text = obj.error or (str(obj.warnings[0]) if isinstance(obj.warnings, list) and obj.warnings else "")
        return text if len(text) <= 100 else f"{text[:99]}…"


@admin.register(Artifact)
class ArtifactAdmin(ReadOnly):
    """Artifacts, newest first."""

    list_display = (
        "name", "store", "type", "host", "env", "taken_at", "shown_size", "places", "managed", "verified_at",
        "gone_at",
    )  # fmt: skip
    list_filter = ("store", "type", "host", "managed", ("gone_at", admin.EmptyFieldListFilter))
    search_fields = ("name", "run", "host")
    date_hierarchy = "taken_at"

    @admin.display(description="where")
    def places(self, obj: Artifact) -> str:
        """Return the kinds of place that hold it."""
        places = obj.locations if isinstance(obj.locations, list) else []
        return " + ".join(dict.fromkeys(str(p.get("kind")) for p in places if isinstance(p, dict)))
