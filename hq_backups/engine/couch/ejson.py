"""Documents as CouchDB keeps them, made into what JSON gives.

Objects are ``{[{Key, Value}]}``, arrays lists, strings binaries, the rest numbers and the atoms true, false,
null (docs of jiffy, https://github.com/davisp/jiffy#data-format).
"""

from __future__ import annotations

from typing import Any

from hq_backups.engine.couch.terms import Atom

_WORDS = {"true": True, "false": False, "null": None}


def to_json(term: object) -> Any:
    """Return a term as dicts, lists and scalars; raise ValueError when it is no JSON."""
    out: list[Any] = [None]
    work: list[tuple[object, Any, Any]] = [(term, out, 0)]  # no recursion: a document may be deep
    while work:
        value, into, key = work.pop()
        made, parts = _opened(value)
        into[key] = made
        work += [(part, made, at) for at, part in parts]
    return out[0]


def _opened(value: object) -> tuple[Any, list[tuple[Any, object]]]:
    """Return a value, empty yet when it is a container, and its parts with their places in it."""
    if isinstance(value, Atom):
        if value not in _WORDS:
            msg = f"atom {value} is no JSON"
            raise ValueError(msg)
        return _WORDS[value], []
    if isinstance(value, bytes):
        return value.decode("utf-8"), []
    if isinstance(value, (int, float)):
        return value, []
    if isinstance(value, list):
        return [None] * len(value), list(enumerate(value))
    if isinstance(value, tuple) and len(value) == 1 and isinstance(value[0], list):
        parts = [_pair(pair) for pair in value[0]]
        return dict.fromkeys(name for name, _ in parts), [*parts]
    msg = f"{type(value).__name__} is no JSON"
    raise ValueError(msg)


def _pair(pair: object) -> tuple[str, object]:
    if isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], (bytes, Atom)):
        name = pair[0]
        return (str(name) if isinstance(name, Atom) else name.decode("utf-8")), pair[1]
    msg = "an object's member is no pair"
    raise ValueError(msg)
