"""Show every effective setting."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hq_backups.settings_table import SETTINGS

if TYPE_CHECKING:
    from hq_backups.conf.resolved import Resolved


def describe(resolved: Resolved) -> list[dict[str, Any]]:
    """Return each setting as plain data that may be shown: secrets say only that they are set."""
    return [
        {
            "name": name,
            "value": effective.display,
            "source": effective.source,
            "help": SETTINGS[name].help or SETTINGS[name].reason,
            "status": SETTINGS[name].status,
            "store": SETTINGS[name].store,
        }
        for name, effective in resolved.effective.items()
    ]
