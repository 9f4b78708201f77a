from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from isal import isal_zlib

from hq_backups.engine.errors import ForeignObject, NoSuchBucket, ReadBackFailed, RepositoryError
from hq_backups.engine.repository.s3_object import RUN_METADATA
from tests.testbed.process import wait_until
from tests.testbed.s3 import S3Service
from tests.testbed.s3_use import (
    PART,
    RUN,
    following,
    keys,
    leftovers,
    noise,
    our_threads,
    repository,
    send,
    started,
)


@pytest.fixture(params=["versitygw", "moto_server"])
def service(request: pytest.FixtureRequest) -> S3Service:
    """Run the test on a strict and on a lenient service."""
    service: S3Service = request.getfixturevalue(request.param)
    return service


@pytest.fixture(params=[False, True], ids=["plain", "versioned"])
def place(request: pytest.FixtureRequest, service: S3Service) -> Iterator[str]:
    """Make a bucket on that service, with and without versions."""
    name = service.make_bucket(versioned=request.param)
    yield name
    service.remove_bucket(name)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "artifact"


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    wait_until(lambda: not our_threads(), what="the upload's threads to end", timeout=5)


def parts(s3: S3Service, bucket: str, key: str) -> list[int]:
    client = s3.client()
    uploads = client.list_multipart_uploads(Bucket=bucket).get("Uploads", ())
    if not uploads:
        return []
    listed = client.list_parts(Bucket=bucket, Key=key, UploadId=uploads[0]["UploadId"])
    return [part["Size"] for part in listed.get("Parts", ())]


class TestFinish:
    @pytest.mark.parametrize("size", [1, PART, PART + 1, 2 * PART, 2 * PART + 12345])
    def test_what_stands_is_what_was_sent(
        self, service: S3Service, place: str, path: Path, size: int
    ) -> None:
        data = noise(size)
        repo = repository(service, place)
        ids: list[str] = []
        stored = send(repo, "key", path, data, on_started=ids.append)
        assert len(ids) == (size > PART)
        with repo.open("key", stored.version_id, size=size, etag=stored.etag) as reader:
            assert reader.read() == data
        assert (stored.bucket, stored.key, stored.size) == (place, "key", size)
        assert stored.metadata[RUN_METADATA] == RUN
        assert stored.checked in ("crc32", "etag")
        assert (stored.version_id is not None) == repo.versioned()[0]
        assert leftovers(service, place) == []

    def test_the_strict_service_knows_its_checksum(
        self, versitygw: S3Service, bucket: str, path: Path
    ) -> None:
        repo = repository(versitygw, bucket)
        assert send(repo, "small", path, b"x").checked == "crc32"
        assert send(repo, "parts", path, noise(PART + 1)).checked == "crc32"

    def test_each_version_is_named_by_its_own_id(
        self, versitygw: S3Service, versioned_bucket: str, path: Path
    ) -> None:
        repo = repository(versitygw, versioned_bucket)
        first = send(repo, "key", path, b"first")
        second = send(repo, "key", path, noise(PART + 1))
        for stored, size in ((first, 5), (second, PART + 1)):
            found = repo.head("key", stored.version_id)
            assert found is not None
            assert found.size == size

    def test_what_stands_is_not_overwritten_when_that_is_forbidden(
        self, service: S3Service, place: str, path: Path
    ) -> None:
        repo = repository(service, place)
        repo.put_manifest("small", b"theirs")
        repo.put_manifest("large", b"theirs")
        for key, data in (("small", b"ours"), ("large", noise(PART + 1))):
            with pytest.raises(ForeignObject):
                send(repo, key, path, data, if_none_match=True)
            assert repo.get_small(key, None, 100) == b"theirs"
        assert leftovers(service, place) == []

    def test_what_is_read_must_be_what_was_written(
        self, s3: S3Service, versioned_bucket: str, path: Path
    ) -> None:
        for data in (b"small", noise(PART + 1)):
            upload = started(repository(s3, versioned_bucket), "key", path, data)
            with pytest.raises(ReadBackFailed, match="CRC32"):
                upload.finish(len(data), isal_zlib.crc32(data) ^ 1, if_none_match=False)
            upload.abort()
        assert keys(s3, versioned_bucket) == leftovers(s3, versioned_bucket) == []

    @pytest.mark.parametrize("size", [100, PART + 100])
    def test_a_file_shorter_than_told_is_a_failure(
        self, s3: S3Service, bucket: str, path: Path, size: int
    ) -> None:
        data = noise(size)
        path.write_bytes(data)
        upload = following(repository(s3, bucket), "key", path)
        upload.start()
        with pytest.raises(ReadBackFailed, match="it ends after"):
            upload.finish(size + 50, isal_zlib.crc32(data), if_none_match=False)
        upload.abort()
        assert keys(s3, bucket) == leftovers(s3, bucket) == []

    def test_a_file_that_is_gone_is_a_failure_that_is_kept(
        self, s3: S3Service, bucket: str, path: Path
    ) -> None:
        upload = following(repository(s3, bucket), "key", path)
        upload.start()
        upload.advance(10)
        assert isinstance(upload.failed, ReadBackFailed)
        with pytest.raises(ReadBackFailed):
            upload.finish(10, 0, if_none_match=False)
        upload.abort()


class TestFollowing:
    def test_parts_go_while_the_file_grows_but_never_the_last(
        self, s3: S3Service, bucket: str, path: Path
    ) -> None:
        data = noise(3 * PART)
        path.touch()
        upload = following(repository(s3, bucket), "key", path)
        upload.start()
        with path.open("ab", 0) as file:
            for size in (PART, 2 * PART, 3 * PART):
                file.write(data[size - PART : size])
                upload.advance(size)
                expected = [PART] * (size // PART - 1)
                wait_until(lambda e=expected: parts(s3, bucket, "key") == e, what="the parts")  # type: ignore[misc]
        time.sleep(0.3)  # what must not happen has no event
        assert parts(s3, bucket, "key") == [PART, PART]
        assert keys(s3, bucket) == []
        stored = upload.finish(len(data), isal_zlib.crc32(data), if_none_match=True)
        assert stored.size == len(data)

    def test_a_file_of_one_part_is_not_sent_before_the_end(
        self, s3: S3Service, bucket: str, path: Path
    ) -> None:
        upload = started(repository(s3, bucket), "key", path, noise(PART))
        time.sleep(0.3)
        assert leftovers(s3, bucket) == []
        upload.abort()

    def test_an_abort_leaves_nothing(self, s3: S3Service, bucket: str, path: Path) -> None:
        ids: list[str] = []
        upload = started(repository(s3, bucket), "key", path, noise(3 * PART), on_started=ids.append)
        wait_until(lambda: len(parts(s3, bucket, "key")) == 2, what="two parts")
        upload.abort()
        upload.abort()
        assert len(ids) == 1
        assert keys(s3, bucket) == leftovers(s3, bucket) == our_threads() == []
        with pytest.raises(RepositoryError, match="aborted"):
            upload.finish(3 * PART, 0, if_none_match=False)

    def test_an_abort_while_a_sender_is_being_started_leaves_nothing(
        self, s3: S3Service, bucket: str, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path.write_bytes(b"")
        upload = following(repository(s3, bucket), "k", path)

        def cancelled(self: threading.Thread) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(threading.Thread, "start", cancelled)
        with pytest.raises(KeyboardInterrupt):
            upload.start()
        assert upload.abort()

    def test_a_finished_upload_is_not_undone_by_an_abort(
        self, s3: S3Service, bucket: str, path: Path
    ) -> None:
        send(repository(s3, bucket), "key", path, noise(PART + 1))
        assert keys(s3, bucket) == ["key"]

    def test_progress_counts_what_arrived(self, s3: S3Service, bucket: str, path: Path) -> None:
        seen: list[int] = []
        send(repository(s3, bucket), "key", path, noise(2 * PART + 1), on_progress=seen.append)
        assert max(seen) == 2 * PART + 1
        assert len(seen) == 3

    def test_advance_waits_for_nobody(self, s3: S3Service, bucket: str, path: Path) -> None:
        release = threading.Event()
        repo = repository(s3, bucket)
        upload = started(repo, "key", path, noise(3 * PART), on_progress=lambda _: void(release.wait(10)))
        wait_until(lambda: parts(s3, bucket, "key"), what="a part")
        began = time.monotonic()
        upload.advance(3 * PART)
        assert time.monotonic() - began < 0.5
        release.set()
        upload.abort()

    def test_a_listener_that_fails_is_a_failure_that_is_kept(
        self, s3: S3Service, bucket: str, path: Path
    ) -> None:
        def broken(_: int) -> None:
            raise BrokenPipeError

        upload = started(repository(s3, bucket), "key", path, noise(2 * PART), on_progress=broken)
        wait_until(lambda: upload.failed, what="the failure")
        upload.advance(3 * PART)
        upload.abort()
        assert leftovers(s3, bucket) == []

    def test_a_bucket_that_vanishes_is_kept_until_the_end(self, s3: S3Service, path: Path) -> None:
        bucket = s3.make_bucket()
        data = noise(3 * PART)
        path.write_bytes(data)
        upload = following(repository(s3, bucket), "key", path)
        upload.start()
        s3.remove_bucket(bucket)
        upload.advance(len(data))
        wait_until(lambda: upload.failed, what="the failure")
        upload.advance(len(data))
        with pytest.raises(NoSuchBucket):
            upload.finish(len(data), isal_zlib.crc32(data), if_none_match=False)
        upload.abort()


def void(_: object) -> None:
    """Pass a value over."""


def seconds(action: Callable[[], object]) -> float:
    began = time.monotonic()
    action()
    return time.monotonic() - began


@pytest.mark.parametrize("size", [2 << 20, PART + (1 << 20)])
def test_the_limit_is_kept(s3: S3Service, bucket: str, path: Path, size: int) -> None:
    rate = 2 << 20
    repo = repository(s3, bucket)
    took = seconds(lambda: send(repo, "key", path, noise(size), limit=rate))
    assert size / rate * 0.9 < took < size / rate + 3


def test_parts_that_grow_are_joined_in_order(
    s3: S3Service, bucket: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hq_backups.engine.repository import s3_parts

    monkeypatch.setattr(s3_parts, "EQUAL_PARTS", 2)
    monkeypatch.setattr(s3_parts, "GROWTH", 2)
    data = noise(2 * PART + 2 * PART + 7)
    repo = repository(s3, bucket)
    stored = send(repo, "key", path, data)
    with repo.open("key", size=len(data), etag=stored.etag) as reader:
        assert reader.read() == data


def test_the_file_may_be_renamed_meanwhile(s3: S3Service, bucket: str, path: Path) -> None:
    data = noise(2 * PART + 1)
    upload = started(repository(s3, bucket), "key", path, data)
    os.rename(path, path.with_name("final"))
    assert upload.finish(len(data), isal_zlib.crc32(data), if_none_match=False).size == len(data)
    upload.abort()
