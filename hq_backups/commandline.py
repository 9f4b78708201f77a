"""Our commands as they are called on this kind of host: by an operator, and by a process of ours."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from django.conf import settings

from hq_backups.conf import Resolved
from hq_backups.wording import clean

STANDALONE = "hq_backups."
"""How the names of our own settings begin, which only a host without HQ has."""


def typed(resolved: Resolved, *words: str, host: str = "") -> str:
    """Return a command line: by commcare-cloud in HQ, ``hq-backups`` elsewhere; names in it are made harmless."""
    command = " ".join(shlex.quote(clean(word)) for word in words)
    if is_standalone():
        return f"hq-backups {command}"
    env = shlex.quote(clean(resolved["deploy_env"] or "<env>"))
    # Where stores are spread over hosts by name, django-manage must go to that one.
    server = f" --server {shlex.quote(clean(host))}" if host and resolved["backup_hosts"] else ""
    return f"commcare-cloud {env} django-manage{server} {command}"


def program() -> list[str]:
    """Return the words that our commands are called by here: manage.py makes paths that HQ's code needs."""
    if is_standalone():
        return [sys.executable, "-m", "hq_backups.standalone"]
    return [sys.executable, "manage.py"] if Path("manage.py").is_file() else [sys.executable, "-m", "django"]


def is_standalone() -> bool:
    """Tell whether this is a host without HQ."""
    return settings_module().startswith(STANDALONE)


def settings_module() -> str:
    """Return the name of the settings that this process runs with."""
    return str(getattr(settings, "SETTINGS_MODULE", None) or os.environ.get("DJANGO_SETTINGS_MODULE", ""))
