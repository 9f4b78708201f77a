"""The limit on open files: a snapshot holds every file of the store at once."""

from __future__ import annotations

import contextlib
import os
import pwd
import resource

from hq_backups.engine.errors import PreflightFailed

SPARE = 256
"""Descriptors for everything else: sockets, the artifact, its readers."""


def allow(files: int) -> None:
    """Raise the limit of this process to what ``files`` need; raises PreflightFailed above the hard one."""
    needed = files + SPARE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= needed:
        return
    if hard < needed:
        # Only root may raise the hard one.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, needed))
            return
        user = pwd.getpwuid(os.geteuid()).pw_name
        raise PreflightFailed(
            f"CouchDB has {files} files, a backup holds all of them open and needs {needed}, "
            f"and {user} may open {hard}",
            hint=f"Run from cron or a shell: put the line `{user} hard nofile {needed}` into "
            "/etc/security/limits.d/hq_backups.conf, and log in anew. Run by a systemd unit: put "
            f"`LimitNOFILE={needed}` into its [Service].",
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
