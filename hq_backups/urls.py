"""Addresses for monitoring, to be included by a host's own: ``path("backups/", include("hq_backups.urls"))``."""

from __future__ import annotations

from django.urls import path

from hq_backups import views

app_name = "hq_backups"
urlpatterns = [
    path("health/", views.health, name="health"),
    path("metrics/", views.metrics, name="metrics"),
]
