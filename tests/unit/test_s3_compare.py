from __future__ import annotations

import hashlib
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from hq_backups.engine.errors import ObjectMismatch
from hq_backups.engine.repository.s3_compare import Sent, compare, encode_crc32, part_differs
from hq_backups.engine.repository.s3_object import StoredObject, has_key_service, version
from hq_backups.engine.repository.s3_parts import Sums, sums_of

ONE, TWO = sums_of(b"one"), sums_of(b"second")
PARTS = Sent((ONE, TWO), multipart=True)
WHOLE = Sent((ONE,), multipart=False)
JOINED_MD5 = hashlib.md5((ONE.md5 or b"") + (TWO.md5 or b"")).hexdigest()  # noqa: S324
WRONG = encode_crc32(12345)


def stored(sent: Sent, etag: str = '"opaque"', **changes: object) -> StoredObject:
    made = StoredObject("bucket", "key", None, sent.size, etag, datetime(2026, 11, 22, tzinfo=UTC))
    return replace(made, **changes)  # type: ignore[arg-type]


class TestCompare:
    def test_a_checksum_of_the_whole_proves_it(self) -> None:
        assert compare(stored(PARTS, crc32=encode_crc32(PARTS.crc32)), PARTS) == "crc32"

    def test_so_does_a_checksum_of_the_parts_checksums(self) -> None:
        joined = sums_of(ONE.crc32.to_bytes(4, "big") + TWO.crc32.to_bytes(4, "big")).crc32
        assert compare(stored(PARTS, crc32=encode_crc32(joined) + "-2"), PARTS) == "crc32"

    def test_a_wrong_checksum_is_never_outvoted_by_the_etag(self) -> None:
        with pytest.raises(ObjectMismatch, match="CRC32"):
            compare(stored(PARTS, f'"{JOINED_MD5}-2"', crc32=WRONG), PARTS)

    def test_what_the_write_was_told_counts_when_head_says_nothing(self) -> None:
        assert compare(stored(PARTS), PARTS, encode_crc32(PARTS.crc32)) == "crc32"
        with pytest.raises(ObjectMismatch):
            compare(stored(PARTS), PARTS, WRONG)

    def test_another_size_is_another_object(self) -> None:
        with pytest.raises(ObjectMismatch, match="8 bytes, sent were 9"):
            compare(stored(PARTS, size=8, crc32=encode_crc32(PARTS.crc32)), PARTS)

    def test_without_checksums_the_etag_proves_it(self) -> None:
        assert compare(stored(PARTS, f'"{JOINED_MD5}-2"'), PARTS) == "etag"
        assert compare(stored(WHOLE, f'"{(ONE.md5 or b"").hex()}"'), WHOLE) == "etag"

    @pytest.mark.parametrize("etag", [f'"{"0" * 32}-2"', f'"{"0" * 32}-2"'.upper()])
    def test_a_wrong_etag_of_the_same_form_is_a_mismatch(self, etag: str) -> None:
        with pytest.raises(ObjectMismatch, match="ETag"):
            compare(stored(PARTS, etag), PARTS)

    def test_a_wrong_md5_of_one_piece_is_a_mismatch(self) -> None:
        with pytest.raises(ObjectMismatch, match="ETag"):
            compare(stored(WHOLE, '"' + "0" * 32 + '"'), WHOLE)

    @pytest.mark.parametrize("etag", ['"opaque"', '""', f'"{JOINED_MD5}-7"', '"' + "0" * 32 + '"'])
    def test_an_etag_of_another_form_proves_no_more_than_the_size(self, etag: str) -> None:
        assert compare(stored(PARTS, etag), PARTS) == "size"

    def test_under_a_key_service_the_etag_is_no_md5(self) -> None:
        assert compare(stored(WHOLE, '"' + "0" * 32 + '"', encrypted=True), WHOLE) == "size"

    def test_without_md5_the_etag_says_nothing(self) -> None:
        sent = Sent((Sums(3, ONE.crc32),), multipart=False)
        assert compare(stored(sent, '"' + "0" * 32 + '"'), sent) == "size"


class TestParts:
    def test_a_part_with_another_checksum_arrived_wrong(self) -> None:
        assert part_differs(ONE, '"x"', WRONG, False)
        assert not part_differs(ONE, '"x"', encode_crc32(ONE.crc32), False)

    def test_a_part_with_another_md5_arrived_wrong(self) -> None:
        assert part_differs(ONE, '"' + "0" * 32 + '"', None, False)
        assert not part_differs(ONE, '"' + "0" * 32 + '"', None, True)
        assert not part_differs(ONE, '"opaque"', None, False)
        assert not part_differs(ONE, f'"{(ONE.md5 or b"").hex()}"', None, False)


@pytest.mark.parametrize(("told", "id_"), [("null", None), (None, None), ("", None), ("3sL4", "3sL4")])
def test_a_null_version_is_none(told: str | None, id_: str | None) -> None:
    assert version(told) == id_


@pytest.mark.parametrize(
    ("answer", "encrypted"),
    [
        ({}, False),
        ({"ServerSideEncryption": "AES256"}, False),
        ({"ServerSideEncryption": "aws:kms"}, True),
        ({"SSECustomerAlgorithm": "AES256"}, True),
    ],
)
def test_a_key_service_is_recognised(answer: dict[str, str], encrypted: bool) -> None:
    assert has_key_service(answer) is encrypted
