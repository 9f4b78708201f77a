"""Whether what stands in the bucket is what was sent. 200 is not believed.

Checksums of parts and wholes: https://docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity.html
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from isal import isal_zlib

from hq_backups.engine.errors import ObjectMismatch
from hq_backups.engine.repository.s3_object import StoredObject
from hq_backups.engine.repository.s3_parts import Sums

_MD5_ETAG = re.compile(r"[0-9a-f]{32}\Z")
_PARTS_ETAG = re.compile(r"[0-9a-f]{32}-(?P<parts>\d+)\Z")


def encode_crc32(crc32: int) -> str:
    """Return a CRC32 as S3 writes it."""
    return base64.b64encode(crc32.to_bytes(4, "big")).decode()


def encode_md5(md5: bytes) -> str:
    """Return an MD5 as the Content-MD5 header writes it."""
    return base64.b64encode(md5).decode()


def bare_etag(etag: str) -> str:
    """Return an ETag without its quotes."""
    return etag.strip('"').lower()


@dataclass(frozen=True)
class Sent:
    """What was sent as one object: in one piece, or in several parts."""

    pieces: tuple[Sums, ...]
    multipart: bool

    @property
    def size(self) -> int:
        """Return the bytes of all pieces."""
        return sum(piece.length for piece in self.pieces)

    @property
    def crc32(self) -> int:
        """Return the CRC32 of the whole."""
        return whole_crc32(self.pieces)

    def fits_crc32(self, told: str) -> bool:
        """Tell whether a service's checksum is ours: of the whole, or of the parts' checksums."""
        value = told.split("-", 1)[0]
        if value == encode_crc32(self.crc32):
            return True
        joined = b"".join(piece.crc32.to_bytes(4, "big") for piece in self.pieces)
        return self.multipart and value == encode_crc32(isal_zlib.crc32(joined))

    @property
    def etag(self) -> str | None:
        """Return the ETag that the object has where ETags are MD5s; None when no MD5 was taken."""
        digests = [piece.md5 for piece in self.pieces if piece.md5 is not None]
        if len(digests) != len(self.pieces):
            return None
        if not self.multipart:
            return digests[0].hex()
        whole = hashlib.md5(b"".join(digests), usedforsecurity=False).hexdigest()
        return f"{whole}-{len(digests)}"


def whole_crc32(pieces: Sequence[Sums]) -> int:
    """Return the CRC32 of the pieces one after another."""
    crc = 0
    for piece in pieces:
        crc = isal_zlib.crc32_combine(crc, piece.crc32, piece.length)
    return crc


def part_differs(sums: Sums, etag: str, crc32: str | None, encrypted: bool) -> bool:
    """Tell whether the answer to one part shows that something else arrived."""
    if crc32 is not None:
        return crc32 != encode_crc32(sums.crc32)
    return (
        sums.md5 is not None
        and not encrypted
        and _MD5_ETAG.match(bare_etag(etag)) is not None
        and bare_etag(etag) != sums.md5.hex()
    )


def compare(stored: StoredObject, sent: Sent, crc32_told: str | None = None) -> str:
    """Return what proves that ``stored`` is what was sent: crc32, etag or size; raises ObjectMismatch.

    ``crc32_told`` is what the answer to the upload said, for services whose HEAD says nothing.
    """

    def mismatch(message: str) -> ObjectMismatch:
        return ObjectMismatch(
            message,
            key=stored.key,
            bucket=stored.bucket,
            hint="It was not kept. Send it again: upload_backups",
        )

    if stored.size != sent.size:
        raise mismatch(f"it has {stored.size} bytes, sent were {sent.size}")
    told = stored.crc32 or crc32_told
    if told is not None:
        if not sent.fits_crc32(told):
            raise mismatch(f"its CRC32 is {told}, sent was {encode_crc32(sent.crc32)}")
        return "crc32"
    etag = bare_etag(stored.etag)
    if sent.etag is None or stored.encrypted:
        return "size"
    if etag == sent.etag:
        return "etag"
    parts = _PARTS_ETAG.match(etag)
    same_form = parts and int(parts["parts"]) == len(sent.pieces) if sent.multipart else _MD5_ETAG.match(etag)
    if same_form:
        raise mismatch(f"its ETag is {etag}, sent was {sent.etag}")
    return "size"
