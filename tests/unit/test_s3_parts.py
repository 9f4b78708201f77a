from __future__ import annotations

import threading
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hq_backups.engine.errors import ReadBackFailed
from hq_backups.engine.repository.s3_compare import whole_crc32
from hq_backups.engine.repository.s3_parts import (
    EQUAL_PARTS,
    MAX_PART,
    MAX_PARTS,
    MAX_SIZE,
    MIN_PART,
    FileSection,
    Interrupted,
    part_length,
    part_size_for,
    sums_of,
)

HINTS = st.one_of(st.none(), st.integers(0, MAX_SIZE), st.integers(MAX_SIZE, MAX_SIZE * 4))


def parts_needed(base: int, size: int) -> int:
    number, covered = EQUAL_PARTS, base * EQUAL_PARTS
    if covered >= size:
        return -(-size // base)
    while covered < size:
        number += 1
        covered += part_length(number, base)
    return number


class TestPartSizes:
    @given(hint=HINTS, size=st.integers(1, MAX_SIZE))
    def test_any_size_fits_whatever_was_expected(self, hint: int | None, size: int) -> None:
        assert parts_needed(part_size_for(hint), size) <= MAX_PARTS

    def test_the_largest_object_fits_when_nothing_was_expected_of_it(self) -> None:
        for hint in (None, 0, 1, MIN_PART, 1 << 40, MAX_SIZE):
            assert parts_needed(part_size_for(hint), MAX_SIZE) <= MAX_PARTS

    @given(hint=st.integers(1, MAX_SIZE))
    def test_what_was_expected_needs_equal_parts_only(self, hint: int) -> None:
        assert parts_needed(part_size_for(hint), hint) <= EQUAL_PARTS

    @given(hint=HINTS, number=st.integers(1, MAX_PARTS))
    def test_no_part_is_smaller_or_larger_than_the_service_allows(
        self, hint: int | None, number: int
    ) -> None:
        assert MIN_PART <= part_length(number, part_size_for(hint)) <= MAX_PART


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "artifact"
    path.write_bytes(b"0123456789" * 10)
    return path


class TestFileSection:
    def test_gives_its_bytes_and_no_others(self, path: Path) -> None:
        with open(path, "rb", buffering=0) as file:
            part = FileSection(file, path, 5, 10, stop=threading.Event())
            assert part.read() == b"5678901234"
            assert part.read() == b""
            part.seek(8)
            assert part.read(5) == b"34"

    def test_sums_leave_it_at_its_begin(self, path: Path) -> None:
        with open(path, "rb", buffering=0) as file:
            part = FileSection(file, path, 5, 10, stop=threading.Event())
            assert part.sums(md5=True) == sums_of(b"5678901234")
            assert part.read(3) == b"567"

    def test_a_file_shorter_than_told_is_an_error_and_not_an_end(self, path: Path) -> None:
        with open(path, "rb", buffering=0) as file:
            part = FileSection(file, path, 95, 10, stop=threading.Event())
            assert part.read(50) == b"56789"
            with pytest.raises(Interrupted) as caught:
                part.read(50)
        assert isinstance(caught.value.cause, ReadBackFailed)

    def test_a_stop_ends_the_request_that_reads_it(self, path: Path) -> None:
        stop = threading.Event()
        with open(path, "rb", buffering=0) as file:
            part = FileSection(file, path, 0, 10, stop=stop)
            stop.set()
            with pytest.raises(Interrupted):
                part.read(1)

    def test_only_bytes_that_go_out_are_paced(self, path: Path) -> None:
        paced: list[int] = []
        with open(path, "rb", buffering=0) as file:
            part = FileSection(file, path, 0, 10, stop=threading.Event(), pace=paced.append)
            part.sums(md5=False)
            assert paced == []
            part.sending = True
            part.read(4)
        assert paced == [4]


@given(pieces=st.lists(st.binary(max_size=200), max_size=8))
def test_the_checksum_of_the_whole_follows_from_the_parts(pieces: list[bytes]) -> None:
    assert whole_crc32([sums_of(piece) for piece in pieces]) == zlib.crc32(b"".join(pieces))
