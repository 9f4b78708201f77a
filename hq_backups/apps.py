"""The Django app."""

from django.apps import AppConfig
from django.core.checks import register

from hq_backups.checks import check_settings


class HQBackupsConfig(AppConfig):
    """CommCare HQ's backups."""

    name = "hq_backups"
    label = "hq_backups"
    verbose_name = "Backups"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        """Have the settings checked by ``manage.py check``."""
        register(check_settings)
