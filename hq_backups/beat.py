"""The schedule among the entries of the host's Celery beat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from celery import _state as celery_state
from celery.schedules import crontab
from django.conf import settings
from django.core.checks import CheckMessage

from hq_backups import conf
from hq_backups.checks import as_message

if TYPE_CHECKING:
    from celery import Celery

DISPATCH, CHECK = "hq_backups.dispatch_due", "hq_backups.check_backups"


def beat_schedule() -> dict[str, dict[str, Any]]:
    """Return our entries, for hosts that merge them into their own beat_schedule.

    The check looks at the clock itself: beat counts in Celery's time zone, the check in the host's.
    """
    queue = getattr(settings, "CELERY_PERIODIC_QUEUE", None)
    options = {"queue": queue} if queue else {}
    return {
        DISPATCH: {"task": DISPATCH, "schedule": crontab(minute="*/10"), "options": dict(options)},
        CHECK: {"task": CHECK, "schedule": crontab(minute="0"), "options": dict(options)},
    }


def install() -> None:
    """Add the entries to every Celery app there is, and to those to come.

    An app may read its settings later, or again, and forgets then what was added before; so each time that it
    has read them, the entries are added.
    """
    state: Any = celery_state  # as Celery's own shared_task does
    state.connect_on_app_finalize(_attach)
    for app in list(state._get_active_apps()):
        _attach(app)


def is_missing(app: Celery) -> bool:
    """Tell whether an app's beat would not start what is due."""
    tasks = {entry.get("task") for entry in app.conf.beat_schedule.values()}
    return DISPATCH not in tasks


def current_app() -> Celery | None:
    """Return the host's Celery app; None where this process has none."""
    state: Any = celery_state  # celery.current_app makes one where there is none
    app: Celery | None = state._tls.current_app
    return app


def check_beat(**kwargs: Any) -> list[CheckMessage]:
    """Return a warning when Celery is there, and its beat would start no backup."""
    resolved, app = conf.resolve(), current_app()
    if app is None or not resolved["backup_schedule"] or not resolved.enabled or not is_missing(app):
        return []
    return [
        as_message(
            conf.Finding(
                "W020",
                "Celery's beat_schedule lacks hq_backups.dispatch_due, so nothing starts the backups that are due",
                "Something sets beat_schedule after the settings were read: merge hq_backups.beat.beat_schedule() "
                "into it, or set backup_schedule: false where cron or a systemd timer starts them.",
                setting="backup_schedule",
            )
        )
    ]


def _attach(app: Any) -> None:
    app.on_after_configure.connect(_configured, weak=False, dispatch_uid="hq_backups.beat")
    if app.configured:
        _configured(app)


def _configured(sender: Celery, source: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
    configuration: Any = sender.conf if source is None else source
    if conf.resolve()["backup_schedule"]:
        configuration.beat_schedule = {**beat_schedule(), **(configuration.beat_schedule or {})}
