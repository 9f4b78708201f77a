"""How the backups stand, for monitoring: JSON and Prometheus' own form.

Who may ask: staff who may view runs, and whoever knows ``backup_health_token``.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from functools import wraps

from django.db import Error, transaction
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_safe

from hq_backups import conf
from hq_backups.engine.events import utc_now
from hq_backups.report import OK, Report, report, unreadable

View = Callable[[HttpRequest], HttpResponse]


def guarded(view: View) -> View:
    """Answer only who may ask; a database that is dead is said to anybody, and nothing beside it."""

    @wraps(view)
    def answer(request: HttpRequest) -> HttpResponse:
        if knows_token(request):
            return view(request)
        try:
            user = request.user
            allowed = user.is_active and user.is_staff and user.has_perm("hq_backups.view_backuprun")
        except (Error, OSError) as error:
            return _json(Report(utc_now(), (), (unreadable(error),), database=False))
        if not allowed:
            return JsonResponse(
                {"status": "denied", "detail": "log in as staff, or send the token"}, status=403
            )
        return view(request)

    # A host's ATOMIC_REQUESTS would ask a dead database before the view can say that it is dead.
    return transaction.non_atomic_requests(require_safe(never_cache(answer)))


def knows_token(request: HttpRequest) -> bool:
    """Tell whether the request carries the token, in a time that says nothing about it."""
    token = conf.resolve()["backup_health_token"]
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    if not token or scheme.lower() != "bearer":
        return False
    return secrets.compare_digest(given.strip().encode(), str(token).encode())


@guarded
def health(request: HttpRequest) -> HttpResponse:
    """Answer 200 when all is well, 503 when somebody must look."""
    return _json(report())


@guarded
def metrics(request: HttpRequest) -> HttpResponse:
    """Answer in Prometheus' text form."""
    try:
        from prometheus_client import CollectorRegistry, generate_latest
        from prometheus_client.exposition import CONTENT_TYPE_LATEST
    except ImportError:
        return HttpResponse("the extra hq-backups[metrics] is not installed\n", "text/plain", status=501)
    from hq_backups.metrics import BackupCollector

    registry = CollectorRegistry(auto_describe=False)
    registry.register(BackupCollector())
    return HttpResponse(generate_latest(registry), content_type=CONTENT_TYPE_LATEST)


def _json(found: Report) -> JsonResponse:
    return JsonResponse(found.to_plain(), status=200 if found.status == OK else 503)
