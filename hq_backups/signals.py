"""Django signals for hosts that want more than mails.

=================  ============================================================================================
signal             arguments
=================  ============================================================================================
backup_succeeded   ``store``, ``type``, ``run``, ``host``, ``name`` and ``size`` of the artifact, ``seconds``
backup_failed      ``store``, ``verb`` (backup, upload, verify), ``run``, ``host``, ``exit_code``, ``error``,
                   ``hint``
problem_started    ``problem``: a :class:`hq_backups.problems.Problem` that was not there before
problem_ended      ``problem``: one that was
=================  ============================================================================================

They are sent by the process that saw it, also with the database dead, whether or not anybody is mailed. A receiver
that raises stops nothing (``send_robust``, which logs it).
"""

from __future__ import annotations

from typing import Any

from django.dispatch import Signal

backup_succeeded = Signal()
backup_failed = Signal()
problem_started = Signal()
problem_ended = Signal()


def send(signal: Signal, **arguments: Any) -> None:
    """Tell every receiver, whatever one of them does."""
    signal.send_robust("hq_backups", **arguments)
