"""The Django app."""

from django.apps import AppConfig
from django.core.checks import register

from hq_backups.checks import check_settings
from hq_backups.commandline import is_standalone


class HQBackupsConfig(AppConfig):
    """CommCare HQ's backups."""

    name = "hq_backups"
    label = "hq_backups"
    verbose_name = "Backups"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        """Have ``manage.py check`` check us, and Celery's beat start what is due."""
        register(check_settings)
        if not is_standalone():
            # Celery takes its time to load, and a host without HQ has none.
            from hq_backups import beat

            register(beat.check_beat)
            beat.install()
