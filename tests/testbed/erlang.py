"""Write Erlang's external term format and snappy, so that tests can make CouchDB's files."""

from __future__ import annotations

import struct
from typing import Any

from hq_backups.engine.couch.terms import Atom


def encode(term: object) -> bytes:
    """Return a term as Erlang's term_to_binary would, but for strings, which become lists."""
    return b"\x83" + _encoded(term)


def _encoded(term: object) -> bytes:
    if isinstance(term, Atom):
        name = term.encode("utf-8")
        return b"\x76" + len(name).to_bytes(2, "big") + name
    if isinstance(term, bytes):
        return b"\x6d" + len(term).to_bytes(4, "big") + term
    if isinstance(term, float):
        return b"\x46" + struct.pack(">d", term)
    if isinstance(term, int):
        return _number(term)
    if isinstance(term, tuple):
        head = bytes([104, len(term)]) if len(term) < 256 else b"\x69" + len(term).to_bytes(4, "big")
        return head + b"".join(map(_encoded, term))
    if isinstance(term, list):
        if not term:
            return b"\x6a"
        return b"\x6c" + len(term).to_bytes(4, "big") + b"".join(map(_encoded, term)) + b"\x6a"
    if isinstance(term, dict):
        pairs = b"".join(_encoded(key) + _encoded(value) for key, value in term.items())
        return b"\x74" + len(term).to_bytes(4, "big") + pairs
    msg = f"no term for {type(term).__name__}"
    raise TypeError(msg)


def _number(value: int) -> bytes:
    if 0 <= value < 256:
        return bytes([97, value])
    if -(1 << 31) <= value < 1 << 31:
        return b"\x62" + value.to_bytes(4, "big", signed=True)
    digits = abs(value).to_bytes((abs(value).bit_length() + 7) // 8, "little")
    sign = bytes([value < 0])
    if len(digits) < 256:
        return bytes([110, len(digits)]) + sign + digits
    return b"\x6f" + len(digits).to_bytes(4, "big") + sign + digits


def from_json(value: Any) -> object:
    """Return what CouchDB keeps for a JSON value."""
    if value is None or isinstance(value, bool):
        return Atom({None: "null", True: "true", False: "false"}[value])
    if isinstance(value, str):
        return value.encode("utf-8")
    if isinstance(value, dict):
        return ([(name.encode("utf-8"), from_json(part)) for name, part in value.items()],)
    if isinstance(value, list):
        return [from_json(part) for part in value]
    return value


def compress(data: bytes) -> bytes:
    """Return snappy that holds the bytes as they are, which is snappy too."""
    size, head = len(data), bytearray()
    while size >= 0x80:
        head.append(size & 0x7F | 0x80)
        size >>= 7
    head.append(size)
    for at in range(0, len(data), 1 << 16):
        piece = data[at : at + (1 << 16)]
        head += b"\xf4" + (len(piece) - 1).to_bytes(2, "little") + piece
    return bytes(head)


def packed(term: object) -> bytes:
    """Return a term as CouchDB packs it."""
    return b"\x01" + compress(encode(term))
