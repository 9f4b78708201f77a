"""Compressors by name: gzip written by ISA-L (the default), zstd (an extra), none.

Each gives a compressor with ``compress(data)`` and ``flush()`` and a decompressor with the interface of
``bz2.BZ2Decompressor`` (``decompress(data, max_length)``, ``eof``, ``needs_input``, ``unused_data``).
"""

from __future__ import annotations

import bz2
import struct
from collections.abc import Callable
from typing import Any, Protocol

from isal import igzip_lib, isal_zlib

from hq_backups.engine.errors import ConfigurationError

GZIP_CONTAINER = 31
MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\x28\xb5\x2f\xfd": "zstd"}


class Compressor(Protocol):
    """What writes one codec's stream."""

    def compress(self, data: Any, /) -> bytes:
        """Take plain bytes, return what is ready."""

    def flush(self) -> bytes:
        """Return the rest, with the end marks."""


class Decompressor(Protocol):
    """What reads one codec's stream, in bounded pieces."""

    @property
    def eof(self) -> bool:
        """Tell whether the stream's own end was seen."""

    @property
    def needs_input(self) -> bool:
        """Tell whether more must be fed before anything comes."""

    @property
    def unused_data(self) -> bytes:
        """Return what was fed beyond the end."""

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        """Take stored bytes, return at most ``max_length`` plain ones."""


class _Stored:
    """The codec that changes nothing."""

    def __init__(self) -> None:
        self.eof = False
        self.needs_input = True
        self.unused_data = b""

    def compress(self, data: Any, /) -> bytes:
        return bytes(data)

    def flush(self) -> bytes:
        return b""

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        return data


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError:
        raise ConfigurationError(
            "backup_compression is zstd, but the zstandard package is not installed",
            hint="pip install 'hq-backups[zstd]', or set backup_compression: gzip",
        ) from None
    return zstandard


class _ZstdDecompressor:
    """Bounds the output of zstandard, whose own decompressobj cannot."""

    def __init__(self) -> None:
        self._inner = _zstandard().ZstdDecompressor().decompressobj()
        self._ready = b""
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return bool(self._inner.eof) and not self._ready

    @property
    def unused_data(self) -> bytes:
        return bytes(self._inner.unused_data)

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        if data:
            self._ready += self._inner.decompress(data)
        end = len(self._ready) if max_length < 0 else max_length
        out, self._ready = self._ready[:end], self._ready[end:]
        self.needs_input = not self._ready
        return out


def compressor(codec: str, level: int) -> Compressor:
    """Return a new compressor; raises ConfigurationError for a codec or level that is not there."""
    if codec == "gzip":
        if not 0 <= level <= 3:
            raise ConfigurationError(
                f"backup_compression_level {level} does not exist for gzip", hint="ISA-L knows levels 0 to 3."
            )
        return isal_zlib.compressobj(level=level, wbits=GZIP_CONTAINER)
    if codec == "zstd":
        made: Compressor = _zstandard().ZstdCompressor(level=level, write_checksum=True).compressobj()
        return made
    if codec == "none":
        return _Stored()
    raise ConfigurationError(f"backup_compression {codec} is unknown", hint="Choose gzip, zstd or none.")


_DECOMPRESSORS: dict[str, Callable[[], Decompressor]] = {
    "gzip": lambda: igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP),
    "bzip2": bz2.BZ2Decompressor,
    "zstd": _ZstdDecompressor,
    "none": _Stored,
}


def decompressor(codec: str) -> Decompressor:
    """Return a new decompressor for one member of a stream."""
    try:
        return _DECOMPRESSORS[codec]()
    except KeyError:
        raise ConfigurationError(f"codec {codec} is unknown") from None


def sniff(head: bytes) -> str:
    """Return the codec that a file's first bytes show; ``none`` when no magic number is there."""
    return next((codec for magic, codec in MAGIC.items() if head.startswith(magic)), "none")


crc32 = isal_zlib.crc32

TRAILER = 8
"""Bytes at the end of a gzip stream: CRC32 and size of what it unpacks to (RFC 1952, 2.3.1)."""


def trailer_agrees(codec: str, tail: bytes, plain_size: int, plain_crc32: int) -> bool:
    """Tell whether a stream's last bytes say what went into it; true for codecs without such bytes."""
    if codec != "gzip":
        return True
    return tail == struct.pack("<II", plain_crc32, plain_size & 0xFFFFFFFF)
