"""Values that must not be shown."""

from __future__ import annotations

from typing import Any

MASK = "********"


class Secret(str):
    """Text whose repr does not show it."""

    __slots__ = ()

    def __repr__(self) -> str:
        return repr(MASK)


def protect(value: Any) -> Any:
    """Return ``value`` with addresses that hold a password made into secrets."""
    if isinstance(value, str) and _has_password(value):
        return Secret(value)
    if isinstance(value, tuple):
        return tuple(protect(v) for v in value)
    return value


def display(value: Any, *, secret: bool = False) -> Any:
    """Return what may be shown of ``value``, as plain data."""
    if value is None:
        return None
    if secret:
        return f"set, {len(str(value))} characters"
    if isinstance(value, Secret):
        scheme, rest = value.split("://", 1)
        return f"{scheme}://{MASK}@{rest.rpartition('@')[2]}"
    if isinstance(value, (list, tuple)):
        return [display(v) for v in value]
    if isinstance(value, dict):
        return {str(k): display(v) for k, v in value.items()}
    return value if isinstance(value, (bool, int, float)) else str(value)


def _has_password(value: str) -> bool:
    # Also behind a slash: in a password that should have been escaped, all is the password.
    return "@" in value.partition("://")[2]
