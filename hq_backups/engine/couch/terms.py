"""Read Erlang's external term format, in which CouchDB writes everything.

The format: https://www.erlang.org/doc/apps/erts/erl_ext_dist.html
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from functools import partial

MOST_TERMS = 2_500_000
MOST_BYTES = 64 << 20
MOST_LEVELS = 200_000
_VERSION = 131
_COMPRESSED = 80
_MOST_DIGITS = 1 << 16
"""Bytes of one big integer; Erlang itself allows more, a document has no use for it."""


class Atom(str):
    """An Erlang atom."""

    __slots__ = ()


class _Open:
    """A compound term whose parts are still being read."""

    __slots__ = ("close", "left", "parts")

    def __init__(self, left: int, close: Callable[[list[object]], object]) -> None:
        self.left = left
        self.close = close
        self.parts: list[object] = []


_Read = Callable[[bytes, int], tuple[object, int]]
"""Reads what follows a tag; returns it, or the opening of a compound term, and where the next term begins.

Short numbers raise IndexError or struct.error.
"""
_U16, _U32, _I32, _F64 = (struct.Struct(form).unpack_from for form in (">H", ">I", ">i", ">d"))


def _term(data: bytes, at: int) -> tuple[object, int]:
    """Return the term that begins there and where it ends, without recursion: revision trees are thousands deep."""
    waiting: list[_Open] = []
    terms = MOST_TERMS
    while True:
        tag = data[at]
        read = _TAGS.get(tag)
        if read is None:
            msg = f"no term begins with {tag}"
            raise ValueError(msg)
        made, at = read(data, at + 1)
        if type(made) is _Open:
            # Every part is a byte at least: a length that lies is found before anything is made for it.
            if made.left > len(data) - at:
                raise IndexError
            terms -= made.left
            if terms < 0:
                msg = f"more than {MOST_TERMS} terms in one"
                raise ValueError(msg)
            if made.left:
                waiting.append(made)
                if len(waiting) > MOST_LEVELS:
                    msg = f"terms in terms, more than {MOST_LEVELS} deep"
                    raise ValueError(msg)
                continue
            made = made.close(made.parts)
        while waiting:
            inner = waiting[-1]
            inner.parts.append(made)
            inner.left -= 1
            if inner.left:
                break
            waiting.pop()
            made = inner.close(inner.parts)
        else:
            return made, at


def decode(data: bytes) -> object:
    """Return one whole term; raise ValueError when the bytes are none, or it is too big.

    Tuples become tuples, lists lists, binaries bytes, strings lists of numbers (what they are to Erlang),
    maps dicts, atoms :class:`Atom`; an improper list's tail is its last element.
    """
    if data[:1] != bytes([_VERSION]):
        msg = "no term: it does not begin with 131"
        raise ValueError(msg)
    at = 1
    if data[1:2] == bytes([_COMPRESSED]):
        data, at = _inflate(data), 0
    try:
        term, end = _term(data, at)
    except (IndexError, struct.error):
        msg = "the term is cut short"
        raise ValueError(msg) from None
    if end != len(data):
        msg = f"{len(data) - end} bytes follow the term"
        raise ValueError(msg)
    return term


def _inflate(data: bytes) -> bytes:
    size = int.from_bytes(data[2:6], "big")
    if len(data) < 6 or size > MOST_BYTES:
        msg = f"it unpacks to {size} bytes, more than {MOST_BYTES}"
        raise ValueError(msg)
    unpacker = zlib.decompressobj()
    try:
        made = unpacker.decompress(data[6:], size + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if len(made) != size or not unpacker.eof or unpacker.unused_data:
        msg = "it does not unpack to what it says"
        raise ValueError(msg)
    return made


def _bytes(data: bytes, at: int, length: int) -> tuple[bytes, int]:
    end = at + length
    if end > len(data):
        raise IndexError
    return data[at:end], end


def _small_integer(data: bytes, at: int) -> tuple[object, int]:
    return data[at], at + 1


def _integer(data: bytes, at: int) -> tuple[object, int]:
    return _I32(data, at)[0], at + 4


def _float(data: bytes, at: int) -> tuple[object, int]:
    return _F64(data, at)[0], at + 8


def _old_float(data: bytes, at: int) -> tuple[object, int]:
    text, at = _bytes(data, at, 31)
    return float(text.rstrip(b"\0").decode("ascii")), at


def _small_big(data: bytes, at: int) -> tuple[object, int]:
    return _big(data, at + 1, data[at])


def _large_big(data: bytes, at: int) -> tuple[object, int]:
    return _big(data, at + 4, _U32(data, at)[0])


def _big(data: bytes, at: int, length: int) -> tuple[object, int]:
    if length > _MOST_DIGITS:
        msg = f"a number of {length} bytes"
        raise ValueError(msg)
    sign = data[at]
    digits, at = _bytes(data, at + 1, length)
    value = int.from_bytes(digits, "little")
    return (-value if sign else value), at


def _binary(data: bytes, at: int) -> tuple[object, int]:
    return _bytes(data, at + 4, _U32(data, at)[0])


def _string(data: bytes, at: int) -> tuple[object, int]:
    text, at = _bytes(data, at + 2, _U16(data, at)[0])
    return list(text), at


def _short_atom(data: bytes, at: int, encoding: str) -> tuple[object, int]:
    text, at = _bytes(data, at + 1, data[at])
    return Atom(text.decode(encoding)), at


def _long_atom(data: bytes, at: int, encoding: str) -> tuple[object, int]:
    text, at = _bytes(data, at + 2, _U16(data, at)[0])
    return Atom(text.decode(encoding)), at


def _nil(_: bytes, at: int) -> tuple[object, int]:
    return [], at


def _small_tuple(data: bytes, at: int) -> tuple[object, int]:
    return _Open(data[at], tuple), at + 1


def _large_tuple(data: bytes, at: int) -> tuple[object, int]:
    return _Open(_U32(data, at)[0], tuple), at + 4


def _list(data: bytes, at: int) -> tuple[object, int]:
    return _Open(_U32(data, at)[0] + 1, _with_tail), at + 4


def _with_tail(parts: list[object]) -> object:
    tail = parts.pop()
    if not isinstance(tail, list):
        return [*parts, tail]
    if tail:  # Erlang writes one list as one; joining such tails would take their number squared
        msg = "a list's tail is a list"
        raise ValueError(msg)
    return parts


def _map(data: bytes, at: int) -> tuple[object, int]:
    return _Open(2 * _U32(data, at)[0], _paired), at + 4


def _paired(parts: list[object]) -> object:
    keys = parts[::2]
    if not all(
        isinstance(key, (str, bytes, int, float)) for key in keys
    ):  # a deep key's hash ends the process
        msg = "a map's key is no scalar"
        raise ValueError(msg)
    return dict(zip(keys, parts[1::2], strict=True))


_TAGS: dict[int, _Read] = {
    70: _float,
    97: _small_integer,
    98: _integer,
    99: _old_float,
    100: partial(_long_atom, encoding="latin-1"),
    104: _small_tuple,
    105: _large_tuple,
    106: _nil,
    107: _string,
    108: _list,
    109: _binary,
    110: _small_big,
    111: _large_big,
    115: partial(_short_atom, encoding="latin-1"),
    116: _map,
    118: partial(_long_atom, encoding="utf-8"),
    119: partial(_short_atom, encoding="utf-8"),
}
