"""Expand the three expressions that a public.yml may hold in our names; Jinja itself is never run."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

ALLOWED = ("encrypted_root", "deploy_env", "env_monitoring_id")
_EXPRESSION = re.compile(r"\{\{-?\s*(" + "|".join(ALLOWED) + r")\s*-?\}\}")
_LEFT = re.compile(r"\{\{|\{%")


class NotExpanded(ValueError):
    """Raised for an expression that is none of the three, or that leads in a circle."""


def has_expression(raw: Any) -> bool:
    """Return whether a template expression stands anywhere in ``raw``."""
    if isinstance(raw, str):
        return bool(_LEFT.search(raw))
    if isinstance(raw, dict):
        return any(has_expression(v) for pair in raw.items() for v in pair)
    return isinstance(raw, (list, tuple)) and any(map(has_expression, raw))


def expand(raw: Any, look: Callable[[str], Any]) -> Any:
    """Return ``raw`` with the three expressions filled in, at any depth."""
    if isinstance(raw, str):
        return _expand(raw, look)
    if isinstance(raw, dict):
        return {expand(k, look): expand(v, look) for k, v in raw.items()}
    if isinstance(raw, (list, tuple)):
        return [expand(v, look) for v in raw]
    return raw


def _expand(text: str, look: Callable[[str], Any]) -> str:
    def fill(match: re.Match[str]) -> str:
        value = look(match.group(1))
        if value is None:
            raise NotExpanded(f"speaks of {match.group(1)}, which is not set")
        return str(value)

    if _LEFT.search(_EXPRESSION.sub("", text)):
        raise NotExpanded(
            "holds a template expression; only {{ " + " }}, {{ ".join(ALLOWED) + " }} are expanded"
        )
    return _EXPRESSION.sub(fill, text)
