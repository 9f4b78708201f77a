"""Turn what a source says into what a setting means; a misfit is a ValueError that ends "must be ...".

The kinds of :class:`hq_backups.settings_table.Setting` are the functions in ``KINDS``.
"""

from __future__ import annotations

import difflib
import json
import re
import shlex
import zoneinfo
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from environ import Env

from hq_backups.engine.config import STORES
from hq_backups.setting import Setting

UNSET_WORDS = frozenset({"", "None", "null", "Null", "NULL", "~"})
_TRUE = frozenset({"true", "yes", "on", "y", "1"})
_FALSE = frozenset({"false", "no", "off", "n", "0"})
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(i?)b?(?:/s|ps)?", re.IGNORECASE)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_REMOTE = re.compile(
    r"(?:[A-Za-z0-9_][A-Za-z0-9._-]*@)?(?:[A-Za-z0-9][A-Za-z0-9._-]*|\[[0-9A-Fa-f:]+\])(?::/[^/].*)?"
)
_STORE_NAMES = {**{s: s for s in STORES}, "couchdb": "couch", "postgresql": "postgres", "es": "elasticsearch"}


def is_unset(raw: Any) -> bool:
    """Return whether ``raw`` is one of the ways to say nothing."""
    return raw is None or (isinstance(raw, str) and raw.strip() in UNSET_WORDS)


def cast(setting: Setting, raw: Any) -> Any:
    """Return the value that ``raw`` stands for; raises ValueError that says what it must be."""
    return KINDS[setting.kind](raw, setting)


def _any(raw: Any, setting: Setting) -> Any:
    return raw


def _text(raw: Any, setting: Setting) -> str:
    if isinstance(raw, bool) or not isinstance(raw, (str, int, float)):
        raise ValueError("must be text; put it in quotes" if isinstance(raw, bool) else "must be text")
    text = str(raw).strip()
    if any(ord(c) < 32 or ord(c) == 127 for c in text):
        raise ValueError("must be text on one line, without control characters")
    return text


def _text_or_off(raw: Any, setting: Setting) -> str | None:
    return None if _is_false(raw) else _text(raw, setting)


def _name(raw: Any, setting: Setting) -> str:
    text = _text(raw, setting)
    if not _NAME.fullmatch(text):
        raise ValueError("must be a name of letters, digits, '.', '_' and '-'")
    return text


def _remote(raw: Any, setting: Setting) -> str | None:
    if _is_false(raw):
        return None
    text = _text(raw, setting)
    if not _REMOTE.fullmatch(text) or ".." in text.split("/"):
        raise ValueError("must be a host, user@host or host:/directory")
    return text


def _bool(raw: Any, setting: Setting) -> bool:
    if isinstance(raw, bool):
        return raw
    word = str(raw).strip().lower()
    if not isinstance(raw, (str, int)) or word not in _TRUE | _FALSE:
        raise ValueError("must be True or False")
    return word in _TRUE


def _int(raw: Any, setting: Setting) -> int:
    text = "" if isinstance(raw, bool) or not isinstance(raw, (str, int)) else str(raw).strip()
    if not re.fullmatch(r"[+-]?[0-9]{1,15}", text):
        raise ValueError("must be a whole number")
    number = int(text)
    if setting.low is not None and number < setting.low:
        raise ValueError(f"must be at least {setting.low}")
    if setting.high is not None and number > setting.high:
        raise ValueError(f"must be at most {setting.high}")
    return number


def _dir(raw: Any, setting: Setting) -> str:
    text = _text(raw, setting)
    if not text.startswith("/") or not text.strip("/"):
        raise ValueError("must be an absolute path of a directory")
    if ".." in text.split("/"):
        raise ValueError("must be a path without '..'")
    return "/" + "/".join(part for part in text.split("/") if part not in ("", "."))


def _choice(raw: Any, setting: Setting) -> str:
    word = str(raw).strip().lower()
    if "none" in setting.choices and _is_false(raw):
        word = "none"
    if word not in setting.choices:
        raise ValueError(f"must be {_either(setting.choices)}")
    return word


def _mode(raw: Any, setting: Setting) -> str | bool:
    if _is_false(raw):
        return False
    word = str(raw).strip().lower()
    if word not in setting.choices:
        raise ValueError(f"must be {_either((*setting.choices, 'False'))}")
    return word


def _version(raw: Any, setting: Setting) -> str:
    text = _text(raw, setting)
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)*", text):
        raise ValueError("must be a version such as 14")
    return text


def _list(raw: Any, setting: Setting) -> tuple[str, ...]:
    items = raw
    if isinstance(raw, str):
        items = _json(raw) if raw.strip().startswith("[") else Env.parse_value(raw, list)
    if not isinstance(items, (list, tuple)):
        raise ValueError("must be a list")
    return tuple(text for text in (_text(item, setting) for item in items) if text)


def _emails(raw: Any, setting: Setting) -> tuple[str, ...]:
    addresses = _list(raw, setting)
    if not addresses or not all(re.fullmatch(r"[^@\s,<>]+@[^@\s,<>]+", a) for a in addresses):
        raise ValueError("must be mail addresses with commas between them")
    return addresses


def _words(raw: Any, setting: Setting) -> tuple[str, ...]:
    if isinstance(raw, str) and not raw.strip().startswith("["):
        try:
            raw = shlex.split(raw)
        except ValueError:
            raise ValueError("must be a command whose quotes are closed") from None
    elif isinstance(raw, str):
        raw = _json(raw)
    if not isinstance(raw, (list, tuple)) or not raw:
        raise ValueError("must be a command: a list of words")
    return tuple(_text(word, setting) for word in raw)


def _size(raw: Any, setting: Setting) -> int:
    match = None if isinstance(raw, bool) else _SIZE.fullmatch(str(raw).strip())
    if match is None:
        raise ValueError("must be a number of bytes, such as 50MB")
    number, unit, binary = match.groups()
    size = int(float(number) * (1024 if binary else 1000) ** " kmgt".index(unit.lower() or " "))
    if size < 1:
        raise ValueError("must be more than nothing; leave it unset for no limit")
    return size


def _url(raw: Any, setting: Setting) -> str:
    text = _text(raw, setting)
    if "://" not in text:
        text = "https://" + text
    parts = urlsplit(text)
    try:
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        usable = False
    if not usable or " " in text:
        raise ValueError("must be an address such as https://s3.example.com:9000")
    return text.rstrip("/")


def _urls(raw: Any, setting: Setting) -> tuple[str, ...]:
    addresses = tuple(_url(item, setting) for item in _list(raw, setting))
    if not addresses:
        raise ValueError("must be an address or a list of them")
    return addresses


def _bucket(raw: Any, setting: Setting) -> str:
    return _text(raw, setting)


def _timezone(raw: Any, setting: Setting) -> str:
    text = _text(raw, setting)
    try:
        zoneinfo.ZoneInfo(text)
    except (ValueError, OSError, zoneinfo.ZoneInfoNotFoundError):
        raise ValueError("must be a time zone's name, such as Africa/Nairobi") from None
    return text


def _hosts(raw: Any, setting: Setting) -> Mapping[str, tuple[str, ...]]:
    if isinstance(raw, str):
        if raw.strip().startswith("{"):
            raw = _json(raw)
        elif re.fullmatch(r"[^=,]+=[a-z]+(,[^=,]+=[a-z]+)*", raw.strip()):
            pairs = raw.count("=")
            raw = Env.parse_value(raw, dict)
            if len(raw) != pairs:
                raise ValueError("must name each host once; use JSON for several stores of one host")
    if not isinstance(raw, Mapping):
        raise ValueError("must be a map such as {pg0: [postgres]}")
    return {_text(host, setting): tuple(map(_store, _list(stores, setting))) for host, stores in raw.items()}


def _store(name: str) -> str:
    if name.lower() not in _STORE_NAMES:
        near = difflib.get_close_matches(name.lower(), _STORE_NAMES, 1)
        meant = f"; is {near[0]} meant?" if near else ""
        raise ValueError(f"must name stores ({', '.join(STORES)}){meant}")
    return _STORE_NAMES[name.lower()]


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise ValueError("must be JSON where it begins with a bracket") from None


def _is_false(raw: Any) -> bool:
    return raw is False or (isinstance(raw, (str, int)) and str(raw).strip().lower() in _FALSE)


def _either(words: tuple[str, ...]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


KINDS: Mapping[str, Callable[[Any, Setting], Any]] = {
    "any": _any,
    "text": _text,
    "text_or_off": _text_or_off,
    "name": _name,
    "remote": _remote,
    "bool": _bool,
    "int": _int,
    "dir": _dir,
    "choice": _choice,
    "mode": _mode,
    "version": _version,
    "list": _list,
    "emails": _emails,
    "words": _words,
    "size": _size,
    "url": _url,
    "urls": _urls,
    "bucket": _bucket,
    "timezone": _timezone,
    "hosts": _hosts,
}
