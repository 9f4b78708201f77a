"""Read Erlang's external term format, in which CouchDB writes everything.

The format: https://www.erlang.org/doc/apps/erts/erl_ext_dist.html
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

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


@dataclass
class _Open:
    """A compound term whose parts are still being read."""

    left: int
    close: Callable[[list[object]], object]
    parts: list[object] = field(default_factory=list)


class _Reader:
    """Reads one term from bytes, without recursion: revision trees are thousands of levels deep."""

    def __init__(self, data: bytes, at: int) -> None:
        self.data = data
        self.at = at
        self.left = MOST_TERMS

    def take(self, length: int) -> bytes:
        """Return the next bytes."""
        taken = self.data[self.at : self.at + length]
        if len(taken) != length:
            msg = "the term is cut short"
            raise ValueError(msg)
        self.at += length
        return taken

    def number(self, width: int) -> int:
        """Return the next bytes as a number."""
        return int.from_bytes(self.take(width), "big")

    def term(self) -> object:
        """Return the next term."""
        waiting: list[_Open] = []
        while True:
            made = self.next()
            while True:
                if isinstance(made, _Open) and made.left:
                    waiting.append(made)
                    if len(waiting) > MOST_LEVELS:
                        msg = f"terms in terms, more than {MOST_LEVELS} deep"
                        raise ValueError(msg)
                    break
                if isinstance(made, _Open):
                    made = made.close(made.parts)
                if not waiting:
                    return made
                inner = waiting[-1]
                inner.parts.append(made)
                inner.left -= 1
                if inner.left:
                    break
                made = waiting.pop()

    def next(self) -> object:
        """Return the next scalar, or the opening of a compound term."""
        tag = self.take(1)[0]
        read = _TAGS.get(tag)
        if read is None:
            msg = f"no term begins with {tag}"
            raise ValueError(msg)
        made = read(self)
        if isinstance(made, _Open):
            # Every part is a byte at least: a length that lies is found before anything is made for it.
            if made.left > len(self.data) - self.at:
                msg = "the term is cut short"
                raise ValueError(msg)
            self.left -= made.left
            if self.left < 0:
                msg = f"more than {MOST_TERMS} terms in one"
                raise ValueError(msg)
        return made


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
    reader = _Reader(data, at)
    term = reader.term()
    if reader.at != len(data):
        msg = f"{len(data) - reader.at} bytes follow the term"
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


def _small_tuple(reader: _Reader) -> object:
    return _Open(reader.number(1), tuple)


def _large_tuple(reader: _Reader) -> object:
    return _Open(reader.number(4), tuple)


def _list(reader: _Reader) -> object:
    return _Open(reader.number(4) + 1, _with_tail)


def _with_tail(parts: list[object]) -> object:
    tail = parts.pop()
    if not isinstance(tail, list):
        return [*parts, tail]
    if tail:  # Erlang writes one list as one; joining such tails would take their number squared
        msg = "a list's tail is a list"
        raise ValueError(msg)
    return parts


def _map(reader: _Reader) -> object:
    return _Open(2 * reader.number(4), _paired)


def _paired(parts: list[object]) -> object:
    keys = parts[::2]
    if not all(
        isinstance(key, (str, bytes, int, float)) for key in keys
    ):  # a deep key's hash ends the process
        msg = "a map's key is no scalar"
        raise ValueError(msg)
    return dict(zip(keys, parts[1::2], strict=True))


def _big(reader: _Reader, width: int) -> object:
    length = reader.number(width)
    if length > _MOST_DIGITS:
        msg = f"a number of {length} bytes"
        raise ValueError(msg)
    sign = reader.number(1)
    value = int.from_bytes(reader.take(length), "little")
    return -value if sign else value


def _old_float(reader: _Reader) -> object:
    return float(reader.take(31).rstrip(b"\0").decode("ascii"))


def _atom(reader: _Reader, width: int, encoding: str) -> object:
    return Atom(reader.take(reader.number(width)).decode(encoding))


_TAGS: dict[int, Callable[[_Reader], object]] = {
    70: lambda r: struct.unpack(">d", r.take(8))[0],
    97: lambda r: r.number(1),
    98: lambda r: int.from_bytes(r.take(4), "big", signed=True),
    99: _old_float,
    100: lambda r: _atom(r, 2, "latin-1"),
    104: _small_tuple,
    105: _large_tuple,
    106: lambda _: [],
    107: lambda r: list(r.take(r.number(2))),
    108: _list,
    109: lambda r: r.take(r.number(4)),
    110: lambda r: _big(r, 1),
    111: lambda r: _big(r, 4),
    115: lambda r: _atom(r, 1, "latin-1"),
    116: _map,
    118: lambda r: _atom(r, 2, "utf-8"),
    119: lambda r: _atom(r, 1, "utf-8"),
}
