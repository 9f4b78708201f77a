"""Has one backup verified by another process: one that a worker starts where there is a broker, else one of ours."""

from __future__ import annotations

from datetime import timedelta

from celery import current_app, shared_task
from django.conf import settings

from hq_backups import conf, detached, details, dispatch
from hq_backups.commandline import typed
from hq_backups.conf import Resolved
from hq_backups.engine.errors import HQBackupsError
from hq_backups.models import Artifact

TASK = "hq_backups.verify"
EXPIRES = timedelta(hours=6)
"""A message that no worker took by then is dropped: whoever asked has looked elsewhere."""
CONNECT = 5.0
"""Seconds that a broker may take to answer a page."""


def start(artifact: Artifact, resolved: Resolved) -> str:
    """Have it verified, and return what was done; raises HQBackupsError when nothing was."""
    words = _words(artifact)
    queue = _queue(artifact, resolved)
    command = typed(resolved, *words, host=artifact.host)
    if _broker() is None:
        if not _is_within_reach(artifact, resolved):
            raise HQBackupsError(
                f"its only copy lies on {artifact.host}, and no Celery broker is set",
                hint=f"Type it there: {command}",
            )
        detached.start(resolved, words)
        return f"A process on {resolved['backup_host_name']} verifies {artifact.name} ({command})."
    _send(words, queue)
    where = f"the queue {queue}" if queue else "the workers' usual queue"
    hours = round(EXPIRES.total_seconds() / 3600)
    return f"Put into {where}: {artifact.name}. A worker must take it within {hours} hours to verify it."


@shared_task(name=TASK, ignore_result=True, acks_late=False)
def verify(words: list[str]) -> None:
    """Start the process and be gone: it takes longer than a worker's time limit."""
    if words[:1] != ["verify_backup"]:
        raise HQBackupsError(f"{TASK} runs verify_backup and nothing else")
    detached.start(conf.resolve(), words)


def _words(artifact: Artifact) -> list[str]:
    if artifact.gone_at is not None:
        raise HQBackupsError("it is gone", hint="Choose one that is there.")
    words = ["verify_backup", "--store", artifact.store]
    if {place.kind for place in details.places(artifact)} == {"s3"}:
        words += ["--source", "s3"]
    if artifact.host:
        words += ["--host", artifact.host]
    return [*words, "--", artifact.name] if artifact.name.startswith("-") else [*words, artifact.name]


def _queue(artifact: Artifact, resolved: Resolved) -> str | None:
    """Return the queue of the backup's own host where hosts have theirs, else one that every worker serves."""
    if artifact.host and artifact.host in (resolved["backup_hosts"] or {}):
        return dispatch.queue(artifact.host)
    return getattr(settings, "CELERY_PERIODIC_QUEUE", None)


def _is_within_reach(artifact: Artifact, resolved: Resolved) -> bool:
    kinds = {place.kind for place in details.places(artifact)}
    return kinds != {"local"} or artifact.host in ("", resolved["backup_host_name"])


def _broker() -> str | None:
    return getattr(settings, "CELERY_BROKER_URL", None) or current_app.conf.broker_url or None


def _send(words: list[str], queue: str | None) -> None:
    # One attempt: a page cannot wait for a broker to come back.
    retries = {"max_retries": 1, "interval_start": 0, "interval_step": 0}
    limits = {"socket_connect_timeout": CONNECT, "socket_timeout": CONNECT} | retries
    try:
        with current_app.connection_for_write(
            current_app.conf.broker_url or _broker(), connect_timeout=CONNECT, transport_options=limits
        ) as connection:
            current_app.send_task(
                TASK,
                (words,),
                queue=queue,
                expires=EXPIRES.total_seconds(),
                ignore_result=True,
                retry=False,
                connection=connection,
            )
    except Exception as error:
        # Which exception it is depends on the broker; none may turn the page into an error.
        raise HQBackupsError(
            f"the broker does not take the message ({type(error).__name__})",
            hint="Start the broker, or type the command on the store's host.",
        ) from error
