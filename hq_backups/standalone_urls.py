"""Addresses of the history page of a host without HQ."""

from __future__ import annotations

from collections.abc import Callable

from django.contrib import admin
from django.http import HttpRequest, HttpResponse
from django.urls import include, path
from django.views.generic import RedirectView

POLICY = (
    "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; frame-ancestors 'none'; "
    "form-action 'self'"
)

admin.site.site_header = admin.site.site_title = "Backups"
admin.site.index_title = "History"
admin.site.site_url = None


def only_from_here(respond: Callable[[HttpRequest], HttpResponse]) -> Callable[[HttpRequest], HttpResponse]:
    """Tell browsers to run and load nothing that is not a file of this server."""

    def middleware(request: HttpRequest) -> HttpResponse:
        response = respond(request)
        response.headers.setdefault("Content-Security-Policy", POLICY)
        return response

    return middleware


urlpatterns = [
    # Browsers ask for it unasked.
    path("favicon.ico", lambda request: HttpResponse(status=204)),
    path("", RedirectView.as_view(pattern_name="admin:hq_backups_backuprun_changelist")),
    path("admin/", admin.site.urls),
    path("backups/", include("hq_backups.urls")),
]
