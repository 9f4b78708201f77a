"""The history page: how things stand, what ran, what there is. To look at, and to have a backup verified."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

from django.contrib import admin, messages
from django.db.models import Model, QuerySet
from django.http import HttpRequest, HttpResponse
from django.utils.html import format_html
from django.utils.safestring import SafeString
from django.utils.text import capfirst

from hq_backups import cards, charts, conf, details, history, report, verifying
from hq_backups.clock import aware
from hq_backups.engine.errors import HQBackupsError
from hq_backups.engine.space import human_bytes
from hq_backups.listfilters import ByDate, Host, List, State, Store, Type, Verb
from hq_backups.models import Artifact, BackupRun

if TYPE_CHECKING:
    Base = admin.ModelAdmin[Any]
else:
    # Subscripts are the stubs' alone.
    Base = admin.ModelAdmin

MOST_VERIFIED = 10
"""Backups that one click has verified: each is read to its end."""


class ReadOnly(Base):
    """A list that nobody changes: the catalog and the runs themselves write it."""

    list_per_page = 50
    show_full_result_count = False
    # Counting each filter's rows would read the whole table once for each.
    show_facets = admin.ShowFacets.NEVER

    def has_add_permission(self, request: HttpRequest) -> bool:
        """Let nobody add."""
        return False

    def has_change_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        """Let nobody change; who may look is Django's own permission to view."""
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        """Let nobody delete."""
        return False

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        """Return rows whose dates are not counted to be listed."""
        return ByDate(self.model, using=super().get_queryset(request).db).order_by(*self.model._meta.ordering)

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> type[List]:
        """Return a list that leaves the long columns in the database."""
        return List

    @admin.display(description="size", ordering="size")
    def shown_size(self, obj: Any) -> str:
        """Return the size as people read it."""
        return "" if obj.size is None else human_bytes(obj.size)


@admin.register(BackupRun)
class BackupRunAdmin(ReadOnly):
    """Runs, newest first, below how each store stands."""

    list_display = ("began", "state", "verb", "store", "type", "host", "took", "shown_size", "said")
    list_filter = (Store, Type, "status", Verb, Host)
    search_fields = ("run", "artifact", "host", "error")
    date_hierarchy = "started_at"
    change_list_template = "admin/hq_backups/backuprun/change_list.html"
    change_form_template = "admin/hq_backups/backuprun/change_form.html"

    def changelist_view(self, request: HttpRequest, extra_context: Any = None) -> HttpResponse:
        """Show how things stand above the list."""
        found = standing() if self.has_view_permission(request) else {}
        found["may_see_artifacts"] = request.user.has_perm("hq_backups.view_artifact")
        return super().changelist_view(request, {**found, "title": "Backups", **(extra_context or {})})

    def change_view(
        self, request: HttpRequest, object_id: str, form_url: str = "", extra_context: Any = None
    ) -> HttpResponse:
        """Show a run."""
        run = self.get_object(request, object_id)
        if run is not None and self.has_view_permission(request, run):
            artifact = details.made_by(run)
            may_see_artifact = request.user.has_perm("hq_backups.view_artifact")
            extra_context = {
                "title": "Run",
                "subtitle": None,
                "run": run,
                "state": self.state(run),
                "took": self.took(run),
                "size": self.shown_size(run),
                "stages": details.stages(run),
                "warnings": details.warnings(run),
                "facts": details.pretty(run.facts),
                "artifact": artifact if may_see_artifact else None,
                "command": details.restore_command(artifact, conf.resolve()) if artifact else "",
                "manifest": details.pretty(artifact.manifest) if artifact and may_see_artifact else "",
                "places": details.places(artifact) if artifact and may_see_artifact else [],
                **(extra_context or {}),
            }
        return super().change_view(request, object_id, form_url, extra_context)

    @admin.display(description="state", ordering="status")
    def state(self, obj: BackupRun) -> SafeString:
        """Return how it went, in words, a sign and a colour."""
        tone = cards.RUN_TONES.get(obj.status, cards.QUIET)
        return badge(tone, obj.get_status_display())

    @admin.display(description="started (UTC)", ordering="started_at")
    def began(self, obj: BackupRun) -> SafeString:
        """Return when it began."""
        return moment(obj.started_at)

    @admin.display(description="took", ordering="seconds")
    def took(self, obj: BackupRun) -> str:
        """Return how long it took."""
        return "" if obj.seconds is None else cards.duration(obj.seconds)

    @admin.display(description="error or warning")
    def said(self, obj: BackupRun) -> str:
        """Return the first words of what was wrong."""
        text = obj.error or next(iter(details.warnings(obj)), "")
        return text if len(text) <= 100 else f"{text[:99]}…"


@admin.register(Artifact)
class ArtifactAdmin(ReadOnly):
    """Artifacts, newest first."""

    list_display = (
        "name", "state", "store", "type", "host", "env", "taken", "shown_size", "places", "verified",
    )  # fmt: skip
    list_filter = (Store, Type, State, Host, "managed")
    search_fields = ("name", "run", "host")
    date_hierarchy = "taken_at"
    change_list_template = "admin/hq_backups/artifact/change_list.html"
    change_form_template = "admin/hq_backups/artifact/change_form.html"
    actions = ("verify_now",)

    def change_view(
        self, request: HttpRequest, object_id: str, form_url: str = "", extra_context: Any = None
    ) -> HttpResponse:
        """Show an artifact."""
        artifact = self.get_object(request, object_id)
        if artifact is not None and self.has_view_permission(request, artifact):
            may_see_run = artifact.run and request.user.has_perm("hq_backups.view_backuprun")
            extra_context = {
                "title": "Backup",
                "subtitle": None,
                "artifact": artifact,
                "state": self.state(artifact),
                "size": self.shown_size(artifact),
                "made_by": BackupRun.objects.filter(run=artifact.run).first() if may_see_run else None,
                "places": details.places(artifact),
                "command": details.restore_command(artifact, conf.resolve()),
                "manifest": details.pretty(artifact.manifest),
                **(extra_context or {}),
            }
        return super().change_view(request, object_id, form_url, extra_context)

    def has_verify_permission(self, request: HttpRequest) -> bool:
        """Let superusers have backups read: that takes hours of a host's disk."""
        return bool(request.user.is_active and request.user.is_superuser)

    @admin.action(description="Verify now", permissions=["verify"])
    def verify_now(self, request: HttpRequest, queryset: QuerySet[Artifact]) -> None:
        """Have the chosen backups verified, and say what became of that."""
        chosen = list(queryset.defer("manifest")[: MOST_VERIFIED + 1])
        for artifact in chosen[:MOST_VERIFIED]:
            try:
                self.message_user(request, verifying.start(artifact, conf.resolve()), messages.SUCCESS)
            except HQBackupsError as error:
                text = f"Not verified: {artifact.name} ({error.message}). {error.hint}"
                self.message_user(request, text.strip(), messages.ERROR)
        if len(chosen) > MOST_VERIFIED:
            text = f"Only the first {MOST_VERIFIED} are verified: each is read to its end."
            self.message_user(request, text, messages.WARNING)

    @admin.display(description="state", ordering="gone_at")
    def state(self, obj: Artifact) -> SafeString:
        """Return whether it is there and good."""
        if obj.gone_at is not None:
            return badge(cards.QUIET, "gone")
        return badge(cards.BAD, "damaged") if obj.problem else badge(cards.GOOD, "there")

    @admin.display(description="taken (UTC)", ordering="taken_at")
    def taken(self, obj: Artifact) -> SafeString:
        """Return when it was taken."""
        return moment(obj.taken_at)

    @admin.display(description="verified (UTC)", ordering="verified_at")
    def verified(self, obj: Artifact) -> SafeString | str:
        """Return when it was last read to its end."""
        return "never" if obj.verified_at is None else moment(obj.verified_at)

    @admin.display(description="where")
    def places(self, obj: Artifact) -> str:
        """Return the kinds of place that hold it."""
        return " + ".join(dict.fromkeys(place.kind for place in details.places(obj)))


def standing() -> dict[str, Any]:
    """Return what the top of the page shows."""
    found = report.report()
    shown = cards.cards(found.standings, found.at)
    tone, words = cards.summary(shown)
    if found.status != report.OK and tone != cards.BAD:
        tone, words = cards.BAD, f"{words} There are problems:"
    curves = history.points((each.store, each.host) for each in found.standings)
    return {
        "cards": shown,
        "summary_badge": badge(tone, words),
        "problems": [
            (badge(cards.PROBLEM_TONES[each.severity], capfirst(each.title)), each) for each in found.problems
        ],
        "charts": charts.charts(curves),
        "now": cards.minute(found.at),
    }


def badge(tone: str, words: str) -> SafeString:
    """Return words with a sign and a colour."""
    return format_html(
        '<span class="hqb-badge hqb-{}"><span class="hqb-sign" aria-hidden="true">{}</span> {}</span>',
        tone,
        cards.SIGNS[tone],
        words,
    )


def moment(at: datetime) -> SafeString:
    """Return a time that a machine can read too."""
    at = aware(at)
    return format_html('<time datetime="{}">{}</time>', at.isoformat(), cards.minute(at).removesuffix(" UTC"))
