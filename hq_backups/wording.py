"""Words for people: untrusted text made harmless, times made short."""

from __future__ import annotations

import re
import unicodedata

_ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]?|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-_])")
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def clean(text: object) -> str:
    """Return untrusted ``text`` as one line that a terminal can only show."""
    plain = _ESCAPE.sub("?", str(text))
    return "".join("?" if unicodedata.category(c) in _HIDDEN else c for c in plain)


def clean_lines(text: object, indent: str) -> str:
    """Return ``text`` cleaned, its further lines indented so that none can pass for one of ours."""
    return f"\n{indent}".join(clean(line) for line in str(text).strip().splitlines())


def seconds(value: float) -> str:
    """Return ``1:02:03``, or ``4.2 s`` when short."""
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
