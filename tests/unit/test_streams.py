"""What is written is what is read back, and what is damaged is never taken for good."""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import os
import subprocess
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hq_backups.engine import codecs, streams
from hq_backups.engine.errors import ConfigurationError, CorruptBackup, DiskFull, ReadBackFailed
from hq_backups.engine.streams import CHUNK, ArtifactWriter, Digest, GrowingFile, PlainReader, ReadBack
from tests.testbed.s3_use import our_threads

CODECS = ("gzip", "zstd", "none")


def write(path: Path, data: bytes, codec: str = "gzip", *, damage: bool = False) -> Digest:
    """Write an artifact and follow it, as a backup does."""
    follower: list[ReadBack] = []
    writer = ArtifactWriter(path, codec, 1, lambda size: [f.advance(size) for f in follower])
    read_back = ReadBack(path)
    follower.append(read_back)
    try:
        for start in range(0, len(data), CHUNK):
            piece = data[start : start + CHUNK]
            buffer = writer.buffer()
            buffer[: len(piece)] = piece
            writer.put(buffer, len(piece))
        writer.finish()
        if damage:
            with path.open("r+b") as file:
                file.seek(-6, os.SEEK_END)
                byte = file.read(1)
                file.seek(-6, os.SEEK_END)
                file.write(bytes([byte[0] ^ 1]))
        return read_back.finish(writer)
    finally:
        read_back.close()
        writer.close()


class TestTheDisk:
    """What is written is brought to the disk meanwhile; SYNC_EVERY is made small."""

    @pytest.fixture(autouse=True)
    def often(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(streams, "SYNC_EVERY", 2 * CHUNK)

    def test_it_is_told_to_write_before_the_end(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        synced: list[int] = []
        monkeypatch.setattr(os, "fdatasync", lambda fd: synced.append(os.fstat(fd).st_size))
        write(tmp_path / "artifact", bytes(9 * CHUNK), "none")

        assert len(synced) == 4
        assert synced[0] >= 2 * CHUNK

    def test_nobody_waits_for_it_but_the_end(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        read_back_all, written = threading.Event(), 9 * CHUNK
        monkeypatch.setattr(
            os, "fdatasync", lambda fd: read_back_all.wait(30) or pytest.fail("it stood still")
        )
        real = GrowingFile.readinto

        def readinto(self: GrowingFile, buffer: bytearray) -> int:
            count = real(self, buffer)
            if self._position == written:
                read_back_all.set()
            return count

        monkeypatch.setattr(GrowingFile, "readinto", readinto)
        assert write(tmp_path / "artifact", bytes(written), "none").size == written

    @pytest.mark.parametrize("at", [1, 4])
    def test_what_it_does_not_take_is_no_backup(
        self, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[int] = []

        def fails(fd: int) -> None:
            calls.append(fd)
            if len(calls) == at:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(os, "fdatasync", fails)
        with pytest.raises(OSError, match="Input/output"):
            write(tmp_path / "artifact", bytes(9 * CHUNK), "none")
        assert len(calls) == at
        assert our_threads() == []


@pytest.mark.parametrize(
    ("call", "number", "words"),
    [
        pytest.param("writev", errno.ENOSPC, "no space left", id="full-at-the-last-bytes"),
        pytest.param("fsync", errno.EIO, "Input/output", id="the-last-sync"),
        pytest.param("fdatasync", errno.EIO, "Input/output", id="a-sync-that-ends-after-the-last-bytes"),
    ],
)
@pytest.mark.parametrize("codec", CODECS)
def test_a_disk_that_fails_at_the_end_is_told_and_nobody_waits(
    call: str, number: int, words: str, codec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(streams, "SYNC_EVERY", 1)
    monkeypatch.setattr(os, call, fails)
    with pytest.raises(Exception, match=words):
        write(tmp_path / "artifact", b"little", codec)
    assert our_threads() == []


@pytest.mark.parametrize("step", ["_take", "_pack"])
def test_a_fault_of_our_own_in_a_thread_is_told_and_nobody_waits(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: object) -> None:
        raise MemoryError("none left")

    monkeypatch.setattr(ArtifactWriter, step, breaks)
    with pytest.raises(MemoryError, match="none left"):
        write(tmp_path / "artifact", bytes(9 * CHUNK), "none")
    assert our_threads() == []


def read(path: Path, codec: str = "gzip", **options: int | None) -> tuple[bytes, Digest]:
    with path.open("rb") as file:
        reader = PlainReader(file, codec, path.name, **options)  # type: ignore[arg-type]
        try:
            parts = []
            while chunk := reader.chunk():
                parts.append(chunk)
            return b"".join(parts), reader.digest()
        finally:
            reader.close()


@pytest.mark.parametrize("codec", CODECS)
def test_what_is_written_is_read_back_with_the_same_digests(tmp_path: Path, codec: str) -> None:
    data = os.urandom(700_000) + bytes(3 * CHUNK) + b"end"
    digest = write(tmp_path / "artifact", data, codec)
    plain, again = read(tmp_path / "artifact", codec)
    assert plain == data
    assert again == digest
    assert digest.size == (tmp_path / "artifact").stat().st_size
    assert oct((tmp_path / "artifact").stat().st_mode)[-3:] == "600"


@pytest.mark.parametrize("codec", CODECS)
def test_what_a_restore_reads_is_hashed_as_it_is_stored(tmp_path: Path, codec: str) -> None:
    data = os.urandom(300_000) + bytes(2 * CHUNK) + b"end"
    digest = write(tmp_path / "artifact", data, codec)
    plain, again = read(tmp_path / "artifact", codec, hash_plain=False)
    assert plain == data
    assert again == replace(digest, plain_sha256="")


@pytest.mark.parametrize("codec", ["gzip", "zstd", "bzip2"])
def test_every_codec_has_a_sum_of_its_own(tmp_path: Path, codec: str) -> None:
    # A restore trusts in it: what is stored is as it was written, so it must unpack to what was packed.
    data = os.urandom(100_000)
    if codec == "bzip2":
        packed = bytearray(bz2.compress(data))
        packed[10] ^= 1  # the first block's sum stands behind its mark (bzip2(1) has no other)
    else:
        packer = codecs.compressor(codec, 1)
        packed = bytearray(packer.compress(data) + packer.flush())
        packed[-6 if codec == "gzip" else -1] ^= 1
    (tmp_path / "artifact").write_bytes(packed)
    with pytest.raises(CorruptBackup):
        read(tmp_path / "artifact", codec, hash_plain=False)


def test_an_empty_store_gives_a_valid_artifact(tmp_path: Path) -> None:
    digest = write(tmp_path / "artifact", b"")
    assert gzip.decompress((tmp_path / "artifact").read_bytes()) == b""
    assert digest.plain_size == 0


def test_gzip_reads_what_isal_writes(tmp_path: Path) -> None:
    data = os.urandom(100) * 50_000
    write(tmp_path / "artifact", data)
    assert gzip.decompress((tmp_path / "artifact").read_bytes()) == data


@pytest.mark.parametrize("codec", ["gzip", "none"])
def test_a_byte_that_the_disk_changed_fails_the_read_back(tmp_path: Path, codec: str) -> None:
    # Smaller than a read: the follower waits for the end, so the damage is there before it reads.
    with pytest.raises(ReadBackFailed):
        write(tmp_path / "artifact", os.urandom(5000), codec, damage=True)


def test_a_compressor_that_loses_bytes_fails_the_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Lossy:
        def __init__(self) -> None:
            self.inner = codecs.compressor("gzip", 1)
            self.flush = self.inner.flush

        def compress(self, data: memoryview) -> bytes:
            return self.inner.compress(data[:-1])

    lossy = Lossy()
    monkeypatch.setattr(codecs, "compressor", lambda codec, level: lossy)
    with pytest.raises(ReadBackFailed, match="compressed stream"):
        write(tmp_path / "lossy", b"x" * 5000)


def test_a_follower_does_not_take_the_end_of_a_growing_file_for_the_end(tmp_path: Path) -> None:
    path = tmp_path / "growing"
    path.write_bytes(b"abc")
    reader = GrowingFile(path)
    reader.advance(3)
    got: list[bytes] = []
    thread = threading.Thread(target=lambda: got.append(reader.read(10)))
    thread.start()
    thread.join(0.2)
    assert thread.is_alive(), "it returned before the writer said that the file is complete"
    with path.open("ab") as file:
        file.write(b"defghijklm")
    reader.advance(13)
    thread.join(5)
    assert got == [b"abcdefghij"]
    reader.advance(13, final=True)
    assert reader.read(10) == b"klm"
    assert reader.read(10) == b""


def test_a_file_that_shrank_is_not_read_back(tmp_path: Path) -> None:
    path = tmp_path / "growing"
    path.write_bytes(b"abc")
    reader = GrowingFile(path)
    reader.advance(10, final=True)
    assert reader.read(3) == b"abc"
    with pytest.raises(ReadBackFailed, match="ends at byte 3"):
        reader.read(3)


@pytest.mark.parametrize("cut", [1, 4, 8, 9, 5000])
def test_a_truncated_artifact_is_corrupt_wherever_it_is_cut(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "artifact"
    write(path, os.urandom(40_000))
    os.truncate(path, path.stat().st_size - cut)
    with pytest.raises(CorruptBackup, match="ends before"):
        read(path)


@given(offset=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_a_flipped_bit_is_corrupt_or_has_another_digest(
    tmp_path_factory: pytest.TempPathFactory, offset: int, bit: int
) -> None:
    path = tmp_path_factory.mktemp("flip") / "artifact"
    digest = write(path, b"some words " * 2000)
    raw = bytearray(path.read_bytes())
    raw[offset % len(raw)] ^= 1 << bit
    path.write_bytes(raw)
    try:
        _, seen = read(path)
    except CorruptBackup:
        return
    assert seen.sha256 != digest.sha256


def test_an_archive_may_not_unpack_to_more_than_its_manifest_says(tmp_path: Path) -> None:
    write(tmp_path / "bomb", bytes(64 * CHUNK))
    assert (tmp_path / "bomb").stat().st_size < CHUNK
    with pytest.raises(CorruptBackup, match="more than"):
        read(tmp_path / "bomb", max_plain=2 * CHUNK)


def test_members_one_after_another_are_one_stream(tmp_path: Path) -> None:
    (tmp_path / "two").write_bytes(gzip.compress(b"first") + gzip.compress(b"second"))
    assert read(tmp_path / "two")[0] == b"firstsecond"


def test_garbage_after_the_stream_is_corrupt(tmp_path: Path) -> None:
    (tmp_path / "tail").write_bytes(gzip.compress(b"first") + b"garbage")
    with pytest.raises(CorruptBackup):
        read(tmp_path / "tail")


@given(data=st.binary(max_size=4000), sizes=st.lists(st.integers(0, 700), max_size=40))
def test_bounded_reads_give_the_same_bytes_as_one(data: bytes, sizes: list[int]) -> None:
    reader = PlainReader(io.BytesIO(gzip.compress(data)), "gzip", "x")
    parts = [reader.read(n) for n in sizes]
    assert reader.tell() == sum(map(len, parts))
    rest = reader.read(10_000)
    assert b"".join(parts) + rest == data
    reader.close()


def test_a_stream_only_goes_forward() -> None:
    reader = PlainReader(io.BytesIO(gzip.compress(b"0123456789")), "gzip", "x")
    reader.seek(4)
    assert reader.read(2) == b"45"
    with pytest.raises(ValueError, match="forward"):
        reader.seek(1)
    reader.close()


@pytest.mark.root
def test_a_full_disk_is_said_with_its_place(small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("2m")
    with pytest.raises(DiskFull) as caught:
        write(disk / "artifact", os.urandom(3 << 20))
    assert str(disk) in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(("codec", "level"), [("gzip", 9), ("lzma", 1)])
def test_an_unknown_codec_or_level_is_a_configuration_error(codec: str, level: int) -> None:
    with pytest.raises(ConfigurationError):
        codecs.compressor(codec, level)


@given(st.binary(max_size=3000), st.lists(st.integers(0, 1500), max_size=4))
@example(b"\x00", [1, 0])
def test_what_was_peeked_at_is_read_all_the_same(data: bytes, peeks: list[int]) -> None:
    reader = PlainReader(io.BytesIO(gzip.compress(data)), "gzip", "x")
    try:
        for size in peeks:
            assert reader.peek(size) == data[:size]
        first = reader.read(min(7, len(data)))
        assert reader.peek(5) == data[len(first) : len(first) + 5]
        rest = b""
        while piece := reader.chunk():
            rest += piece
        assert first + rest == data
        assert reader.digest().plain_size == len(data)
    finally:
        reader.close()


PIECES = st.lists(
    st.tuples(st.sampled_from(["random", "text", "zeros"]), st.sampled_from([0, 1, 4095, 65536, 300_000])),
    max_size=7,
)


def mixed(parts: list[tuple[str, int]]) -> bytes:
    kinds = {"random": os.urandom, "text": lambda n: (b'{"form": %d}' % n * n)[:n], "zeros": bytes}
    return b"".join(kinds[kind](size) for kind, size in parts)


@settings(deadline=None)
@given(PIECES, st.integers(0, 3))
@example([("text", 300_000), ("random", 300_000), ("text", 300_000)], 1)
def test_any_gunzip_reads_what_is_stored_and_what_is_compressed(
    parts: list[tuple[str, int]], level: int
) -> None:
    data = mixed(parts)
    packer = codecs.compressor("gzip", level)
    packed = (
        b"".join(packer.compress(data[n : n + CHUNK]) for n in range(0, len(data), CHUNK)) + packer.flush()
    )
    assert gzip.decompress(packed) == data
    unpacker = codecs.decompressor("gzip")
    assert unpacker.decompress(packed, len(data) + 1) == data
    assert codecs.trailer_agrees("gzip", packed[-8:], len(data), codecs.crc32(data))


def test_gnu_gzip_reads_it_as_one_member(tmp_path: Path) -> None:
    data = mixed([("random", 300_000), ("text", 300_000), ("random", 300_000)])
    write(tmp_path / "artifact.gz", data)
    done = subprocess.run(["gzip", "-dc", tmp_path / "artifact.gz"], check=True, capture_output=True)
    assert done.stdout == data
    assert (tmp_path / "artifact.gz").read_bytes().count(b"\x1f\x8b\x08\0\0\0\0\0\0\xff") == 1


def test_what_does_not_shrink_grows_by_next_to_nothing(tmp_path: Path) -> None:
    data = os.urandom(3 * CHUNK)
    assert write(tmp_path / "artifact", data).size < len(data) + 500
