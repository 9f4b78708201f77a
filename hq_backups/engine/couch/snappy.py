"""Unpack raw snappy, in which CouchDB writes terms unless told otherwise.

The format: https://github.com/google/snappy/blob/main/format_description.txt
"""

from __future__ import annotations


def decompress(data: bytes, limit: int) -> bytes:
    """Return what was packed; raise ValueError when it is no snappy, or more than ``limit`` bytes."""
    size, at = _size(data)
    if size > limit:
        msg = f"it unpacks to {size} bytes, more than {limit}"
        raise ValueError(msg)
    made = bytearray()
    end = len(data)
    while at < end:
        tag = data[at]
        if tag & 3 == 0:
            length, at = _literal(data, at, tag >> 2)
            if at + length > end:
                msg = "a literal reaches past the end"
                raise ValueError(msg)
            made += data[at : at + length]
            at += length
        else:
            width = (2, 3, 5)[(tag & 3) - 1]
            if at + width > end:
                msg = "a copy reaches past the end"
                raise ValueError(msg)
            if width == 2:
                length, offset = (tag >> 2 & 7) + 4, (tag >> 5) << 8 | data[at + 1]
            else:
                length, offset = (tag >> 2) + 1, int.from_bytes(data[at + 1 : at + width], "little")
            at += width
            _copy(made, offset, length)
        if len(made) > size:
            msg = "it unpacks to more than it says"
            raise ValueError(msg)
    if len(made) != size:
        msg = f"it unpacks to {len(made)} bytes, not {size}"
        raise ValueError(msg)
    return bytes(made)


def _size(data: bytes) -> tuple[int, int]:
    """Read the size that stands first, seven bits a byte."""
    size = 0
    for at, byte in enumerate(data[:5]):
        size |= (byte & 0x7F) << 7 * at
        if byte < 0x80:
            return size, at + 1
    msg = "its size is not readable"
    raise ValueError(msg)


def _literal(data: bytes, at: int, short: int) -> tuple[int, int]:
    """Return a literal's length and where it begins; the long ones' lengths stand in bytes of their own."""
    if short < 60:
        return short + 1, at + 1
    width = short - 59
    return int.from_bytes(data[at + 1 : at + 1 + width], "little") + 1, at + 1 + width


def _copy(made: bytearray, offset: int, length: int) -> None:
    """Repeat what was made ``offset`` bytes ago; where it overlaps itself, it goes on repeating."""
    if not 0 < offset <= len(made):
        msg = "a copy begins before the beginning"
        raise ValueError(msg)
    start = len(made) - offset
    if offset >= length:
        made += made[start : start + length]
    else:
        made += (made[start:] * (length // offset + 1))[:length]
