"""Addresses of the tests' small HQ."""

from django.contrib import admin
from django.urls import include, path
from health_check.views import HealthCheckView

urlpatterns = [
    path("admin/", admin.site.urls),
    path("backups/", include("hq_backups.urls")),
    path("ht/", HealthCheckView.as_view(checks=["hq_backups.healthcheck.Backups"])),
]
