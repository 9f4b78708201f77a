"""Tell a service outside that all is well: it raises the alarm when this host says nothing any more.

A GET of ``backup_heartbeat_url`` when a backup or a check has ended and nothing is wrong on this host, of
``<url>/fail`` when something is: as healthchecks-style services take it. The address is a secret of its kind.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hq_backups.bounded import within

if TYPE_CHECKING:
    from hq_backups.conf import Resolved

SECONDS = 10.0


def beat(resolved: Resolved, *, ok: bool) -> str:
    """Send one; return what went wrong, or nothing. Raises nothing."""
    address = resolved["backup_heartbeat_url"]
    if not address:
        return ""
    url = str(address) if ok else f"{address}/fail"
    try:
        status = within(SECONDS, lambda: _get(url), what="the heartbeat")
    except TimeoutError:
        return f"the heartbeat was not answered within {SECONDS:g} s"
    except Exception as error:
        # What requests says holds the whole address.
        return f"the heartbeat could not be sent: {type(error).__name__}"
    return "" if status < 400 else f"the heartbeat was answered with HTTP status {status}"


def _get(url: str) -> int:
    # Few hosts have such an address, and every command would wait for this to load.
    import requests

    with requests.get(url, timeout=SECONDS, stream=True, headers={"User-Agent": "hq_backups"}) as answer:
        return answer.status_code
