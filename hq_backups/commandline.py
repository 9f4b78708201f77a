"""Our commands as an operator types them on this kind of host."""

from __future__ import annotations

import os
import shlex

from hq_backups.conf import Resolved
from hq_backups.wording import clean

STANDALONE = "hq_backups.standalone_settings"


def typed(resolved: Resolved, *words: str, host: str = "") -> str:
    """Return a command line: by commcare-cloud in HQ, ``hq-backups`` elsewhere; names in it are made harmless."""
    command = " ".join(shlex.quote(clean(word)) for word in words)
    if os.environ.get("DJANGO_SETTINGS_MODULE") == STANDALONE:
        return f"hq-backups {command}"
    env = shlex.quote(clean(resolved["deploy_env"] or "<env>"))
    # Where stores are spread over hosts by name, django-manage must go to that one.
    server = f" --server {shlex.quote(clean(host))}" if host and resolved["backup_hosts"] else ""
    return f"commcare-cloud {env} django-manage{server} {command}"
