"""XXH3 of 128 bits: how CouchDB 3.5 seals what it writes.

Since 3.5 every header and term carries this sum, before it MD5 (docs.couchdb.org, config/couchdb,
``write_xxhash_checksums``). The algorithm: https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md
"""

from __future__ import annotations

from itertools import starmap
from operator import mul
from struct import unpack, unpack_from

_M32 = (1 << 32) - 1
_M64 = (1 << 64) - 1

_P32 = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
_P64 = (
    0x9E3779B185EBCA87,
    0xC2B2AE3D27D4EB4F,
    0x165667B19E3779F9,
    0x85EBCA77C2B2AE63,
    0x27D4EB2F165667C5,
)
_MIX1 = 0x165667919E3779F9
_MIX2 = 0x9FB21C651E98DF25
_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f"
    "cb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
    "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364"
    "eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e"
    "2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)

_STRIPE = 64
_BLOCK = 16 * _STRIPE
_KEYS = b"".join(_SECRET[8 * n : 8 * n + _STRIPE] for n in range(16))
_LAST_KEY = int.from_bytes(_SECRET[121:185], "little")
_SCRAMBLE = unpack("<8Q", _SECRET[128:])
_START = (_P32[2], _P64[0], _P64[1], _P64[2], _P64[3], _P32[1], _P64[4], _P32[0])


def xxh3_128(data: bytes) -> bytes:
    """Return the sum of 16 bytes, as CouchDB writes it: the high half first."""
    low, high = _sum(data, len(data))
    return high.to_bytes(8, "big") + low.to_bytes(8, "big")


def _sum(data: bytes, size: int) -> tuple[int, int]:
    if size > 240:
        return _long(data, size)
    if size > 128:
        return _medium(data, size)
    if size > 16:
        return _short(data, size)
    if size > 8:
        return _up_to_16(data, size)
    if size >= 4:
        return _up_to_8(data, size)
    if size:
        return _up_to_3(data, size)
    return _avalanche64(_q(_SECRET, 64) ^ _q(_SECRET, 72)), _avalanche64(_q(_SECRET, 80) ^ _q(_SECRET, 88))


def _up_to_3(data: bytes, size: int) -> tuple[int, int]:
    low = data[0] << 16 | data[size >> 1] << 24 | data[-1] | size << 8
    high = int.from_bytes(low.to_bytes(4, "little"), "big")
    high = (high << 13 | high >> 19) & _M32
    return (
        _avalanche64(low ^ _i(_SECRET, 0) ^ _i(_SECRET, 4)),
        _avalanche64(high ^ _i(_SECRET, 8) ^ _i(_SECRET, 12)),
    )


def _up_to_8(data: bytes, size: int) -> tuple[int, int]:
    keyed = (_i(data, 0) | _i(data, size - 4) << 32) ^ _q(_SECRET, 16) ^ _q(_SECRET, 24)
    product = keyed * (_P64[0] + (size << 2))
    low, high = product & _M64, product >> 64
    high = (high + (low << 1)) & _M64
    low ^= high >> 3
    low = (low ^ low >> 35) * _MIX2 & _M64
    return low ^ low >> 28, _avalanche(high)


def _up_to_16(data: bytes, size: int) -> tuple[int, int]:
    first, last = _q(data, 0), _q(data, size - 8)
    product = (first ^ last ^ _q(_SECRET, 32) ^ _q(_SECRET, 40)) * _P64[0]
    low = (product + ((size - 1) << 54)) & _M64
    last ^= _q(_SECRET, 48) ^ _q(_SECRET, 56)
    high = ((product >> 64) + last + (last & _M32) * (_P32[1] - 1)) & _M64
    low ^= int.from_bytes(high.to_bytes(8, "little"), "big")
    product = low * _P64[1]
    return _avalanche(product & _M64), _avalanche((product >> 64) + high * _P64[1] & _M64)


def _short(data: bytes, size: int) -> tuple[int, int]:
    sums = (size * _P64[0] & _M64, 0)
    for n in reversed(range((size - 1) // 32 + 1)):
        sums = _mix32(*sums, data, 16 * n, size - 16 * (n + 1), 32 * n)
    return _finish(*sums, size)


def _medium(data: bytes, size: int) -> tuple[int, int]:
    sums = (size * _P64[0] & _M64, 0)
    for at in range(0, 128, 32):
        sums = _mix32(*sums, data, at, at + 16, at)
    sums = _avalanche(sums[0]), _avalanche(sums[1])
    for at in range(128, size - 31, 32):
        sums = _mix32(*sums, data, at, at + 16, at - 125)
    return _finish(*_mix32(*sums, data, size - 16, size - 32, 103), size)


def _long(data: bytes, size: int) -> tuple[int, int]:
    sums = list(_START)
    whole = (size - 1) // _BLOCK * _BLOCK
    for at in range(0, whole, _BLOCK):
        _absorb(sums, data[at : at + _BLOCK], int.from_bytes(_KEYS, "little"))
        for lane, key in enumerate(_SCRAMBLE):
            sums[lane] = (sums[lane] ^ sums[lane] >> 47 ^ key) * _P32[0] & _M64
    rest = (size - 1 - whole) // _STRIPE * _STRIPE
    _absorb(sums, data[whole : whole + rest], int.from_bytes(_KEYS[:rest], "little"))
    _absorb(sums, data[-_STRIPE:], _LAST_KEY)
    low = _merge(sums, 11, size * _P64[0] & _M64)
    return low, _merge(sums, 117, ~(size * _P64[1]) & _M64)


def _absorb(sums: list[int], stripes: bytes, key: int) -> None:
    # All stripes at once: Python's own loops would make a database's terms take hours.
    words = unpack(f"<{len(stripes) // 8}Q", stripes)
    keyed = (int.from_bytes(stripes, "little") ^ key).to_bytes(len(stripes), "little")
    halves = unpack(f"<{len(stripes) // 4}I", keyed)
    for lane in range(8):
        products = map(mul, halves[2 * lane :: 16], halves[2 * lane + 1 :: 16])
        sums[lane] = (sums[lane] + sum(words[lane ^ 1 :: 8]) + sum(products)) & _M64


def _merge(sums: list[int], at: int, start: int) -> int:
    keys = unpack_from("<8Q", _SECRET, at)
    keyed = [one ^ key for one, key in zip(sums, keys, strict=True)]
    return _avalanche((start + sum(starmap(_fold, zip(keyed[::2], keyed[1::2], strict=True)))) & _M64)


def _mix32(low: int, high: int, data: bytes, one: int, two: int, key: int) -> tuple[int, int]:
    first, second = unpack_from("<2Q", data, one), unpack_from("<2Q", data, two)
    keys = unpack_from("<4Q", _SECRET, key)
    low = (low + _fold(first[0] ^ keys[0], first[1] ^ keys[1])) & _M64
    high = (high + _fold(second[0] ^ keys[2], second[1] ^ keys[3])) & _M64
    return low ^ (second[0] + second[1]) & _M64, high ^ (first[0] + first[1]) & _M64


def _finish(low: int, high: int, size: int) -> tuple[int, int]:
    mixed = (low * _P64[0] + high * _P64[3] + size * _P64[1]) & _M64
    return _avalanche((low + high) & _M64), -_avalanche(mixed) & _M64


def _fold(one: int, other: int) -> int:
    product = one * other
    return product & _M64 ^ product >> 64


def _avalanche(value: int) -> int:
    value = (value ^ value >> 37) * _MIX1 & _M64
    return value ^ value >> 32


def _avalanche64(value: int) -> int:
    value = (value ^ value >> 33) * _P64[1] & _M64
    value = (value ^ value >> 29) * _P64[2] & _M64
    return value ^ value >> 32


def _i(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "little")


def _q(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 8], "little")
