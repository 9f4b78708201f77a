"""Compressors by name: gzip written by ISA-L (the default), zstd (an extra), none.

Each gives a compressor with ``compress(data)`` and ``flush()`` and a decompressor with the interface of
``bz2.BZ2Decompressor`` (``decompress(data, max_length)``, ``eof``, ``needs_input``, ``unused_data``).
"""

from __future__ import annotations

import bz2
import struct
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from isal import igzip_lib, isal_zlib

from hq_backups.engine.errors import ConfigurationError

MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\x28\xb5\x2f\xfd": "zstd"}

crc32 = isal_zlib.crc32


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


class _Gzip:
    """Writes one gzip member; what does not shrink goes into it as it is, in deflate's stored blocks.

    Whether a piece shrinks is told by a sample of it. RFC 1951, 3.2.4: a stored block begins at a byte's boundary,
    where a flush of the compressor ends; a full flush also makes it forget what came before, so that nothing
    refers to bytes that it has not seen.
    """

    whole = 1 << 20
    """Bytes that are judged at once: most of the time all of them compress."""
    shrinks_well = 0.7
    """What a sample of so many must become for all of them to be compressed."""
    piece = 256 << 10
    """Bytes that are judged each for itself, where not all of them do."""
    shrinks = 0.97
    """What a sample must become to be worth compressing."""
    _HEADER = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"
    _STORED = 0xFFFF
    _SAMPLES, _SAMPLE = 4, 1 << 10

    def __init__(self, level: int) -> None:
        self._level = level
        self._deflate = isal_zlib.compressobj(level=level, wbits=-15)
        self._crc = self._size = 0
        self._begun = False
        self._flushed = True

    def compress(self, data: Any, /) -> bytes:
        """Take plain bytes, return what is ready."""
        return b"".join(self.pieces(data))

    def pieces(self, data: Any, /) -> list[bytes | memoryview]:
        """Take plain bytes, return what is ready in pieces; some of them are ``data`` itself."""
        view = memoryview(data)
        parts: list[bytes | memoryview] = [] if self._begun else [self._HEADER]
        self._begun = True
        self._crc, self._size = crc32(view, self._crc), self._size + len(view)
        for start in range(0, len(view), self.whole):
            whole = view[start : start + self.whole]
            if self._becomes(whole, 2 * self._SAMPLES) < self.shrinks_well:
                parts.append(self._deflate.compress(whole))
                self._flushed = False
            else:
                self._piecewise(whole, parts)
        return parts

    def _piecewise(self, whole: memoryview, parts: list[bytes | memoryview]) -> None:
        for start in range(0, len(whole), self.piece):
            piece = whole[start : start + self.piece]
            if self._becomes(piece, self._SAMPLES) < self.shrinks:
                parts.append(self._deflate.compress(piece))
                self._flushed = False
                continue
            if not self._flushed:
                parts.append(self._deflate.flush(isal_zlib.Z_FULL_FLUSH))
                self._flushed = True
            for begin in range(0, len(piece), self._STORED):
                block = piece[begin : begin + self._STORED]
                parts += struct.pack("<BHH", 0, len(block), len(block) ^ 0xFFFF), block

    def flush(self) -> bytes:
        """Return the rest, and the trailer."""
        begin = b"" if self._begun else self._HEADER
        return begin + self._deflate.flush() + struct.pack("<II", self._crc, self._size & 0xFFFFFFFF)

    def _becomes(self, data: memoryview, samples: int) -> float:
        """Return what part of their size some samples compress to; 0 for what is too small to be sampled."""
        size = len(data)
        if size < samples * self._SAMPLE * 2:
            return 0.0
        step = size // samples
        sample = b"".join(data[n * step : n * step + self._SAMPLE] for n in range(samples))
        return len(igzip_lib.compress(sample, level=self._level, flag=igzip_lib.COMP_DEFLATE)) / len(sample)


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
        return _Gzip(level)
    if codec == "zstd":
        made: Compressor = _zstandard().ZstdCompressor(level=level, write_checksum=True).compressobj()
        return made
    if codec == "none":
        return _Stored()
    raise ConfigurationError(f"backup_compression {codec} is unknown", hint="Choose gzip, zstd or none.")


def pieces(compressor: Compressor, data: memoryview) -> Sequence[bytes | memoryview]:
    """Compress, and copy nothing that need not be copied."""
    return compressor.pieces(data) if isinstance(compressor, _Gzip) else (compressor.compress(data),)


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


TRAILER = 8
"""Bytes at the end of a gzip stream: CRC32 and size of what it unpacks to (RFC 1952, 2.3.1)."""


def trailer_agrees(codec: str, tail: bytes, plain_size: int, plain_crc32: int) -> bool:
    """Tell whether a stream's last bytes say what went into it; true for codecs without such bytes."""
    if codec != "gzip":
        return True
    return tail == struct.pack("<II", plain_crc32, plain_size & 0xFFFFFFFF)
