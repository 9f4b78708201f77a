from __future__ import annotations

from pathlib import Path

import pytest

from hq_backups.engine.errors import NoSuchBucket, NoSuchObject, ObjectMismatch
from hq_backups.engine.repository.s3 import S3Repository
from hq_backups.engine.repository.s3_download import ObjectReader
from tests.testbed.process import wait_until
from tests.testbed.s3 import S3Service
from tests.testbed.s3_use import noise, our_threads, repository, send

RANGE = 1000


@pytest.fixture
def repo(s3: S3Service, versioned_bucket: str) -> S3Repository:
    return repository(s3, versioned_bucket)


def put(repo: S3Repository, data: bytes, key: str = "key") -> tuple[str | None, str]:
    stored = repo.put_manifest(key, data)
    return stored.version_id, stored.etag


def reader(
    repo: S3Repository, version: str | None, size: int, etag: str, range_size: int = RANGE
) -> ObjectReader:
    return ObjectReader(repo, "key", version, size=size, etag=etag, range_size=range_size)


@pytest.mark.parametrize("size", [0, 1, RANGE - 1, RANGE, RANGE + 1, 10 * RANGE, 10 * RANGE + 7])
def test_every_byte_comes_once_and_in_order(repo: S3Repository, size: int) -> None:
    data = noise(size)
    version, etag = put(repo, data)
    with reader(repo, version, size, etag) as stream:
        assert b"".join(iter(lambda: stream.read(333), b"")) == data
        assert stream.tell() == size
        assert stream.read(1) == b""


def test_each_version_is_read_as_it_was(repo: S3Repository) -> None:
    first, second = put(repo, b"first"), put(repo, b"the second")
    for (version, etag), content in ((first, b"first"), (second, b"the second")):
        with repo.open("key", version, size=len(content), etag=etag) as stream:
            assert stream.read() == content


def test_the_etag_is_asked_for_when_it_is_not_given(repo: S3Repository) -> None:
    put(repo, b"content")
    with repo.open("key", size=7) as stream:
        assert stream.read() == b"content"


def test_what_is_not_there_is_said_at_once(repo: S3Repository, s3: S3Service) -> None:
    version, etag = put(repo, b"content")
    with pytest.raises(NoSuchObject):
        repo.open("nothing", size=7)
    with pytest.raises(NoSuchBucket):
        repository(s3, "no-such-bucket").open("nothing", size=7)
    s3.client().delete_object(Bucket=repo.bucket, Key="key", VersionId=version)
    with repo.open("key", version, size=7, etag=etag) as stream, pytest.raises(NoSuchObject):
        stream.read()


@pytest.mark.parametrize("change", [-1, +1, -RANGE, +RANGE, +5 * RANGE])
def test_an_object_of_another_size_is_not_what_the_manifest_says(repo: S3Repository, change: int) -> None:
    size = 3 * RANGE
    version, etag = put(repo, noise(size))
    with reader(repo, version, size + change, etag) as stream, pytest.raises(ObjectMismatch):
        stream.read()


def test_an_object_that_is_overwritten_meanwhile_is_never_mixed(s3: S3Service, bucket: str) -> None:
    repo = repository(s3, bucket)
    size = 20 * RANGE
    _, etag = put(repo, noise(size, 1))
    with reader(repo, None, size, etag) as stream:
        stream.read(RANGE)
        put(repo, noise(size, 2))
        with pytest.raises(ObjectMismatch, match="overwritten while it was read"):
            list(iter(lambda: stream.read(RANGE), b""))


def test_no_more_is_fetched_than_was_asked_for_and_a_little(repo: S3Repository) -> None:
    from hq_backups.engine.repository.s3_download import AHEAD

    size = 50 * RANGE
    version, etag = put(repo, noise(size))
    with reader(repo, version, size, etag) as stream:
        stream.read(10)
        wait_until(lambda: len(stream._fetched) == AHEAD - 1, what="the ranges ahead")
        assert stream._next == AHEAD


def test_closing_ends_the_threads_and_the_reading(repo: S3Repository) -> None:
    version, etag = put(repo, noise(50 * RANGE))
    stream = reader(repo, version, 50 * RANGE, etag)
    stream.read(10)
    stream.close()
    stream.close()
    wait_until(lambda: not our_threads(), what="the threads to end", timeout=5)
    with pytest.raises(ValueError, match="closed"):
        stream.read(1)


@pytest.mark.slow
def test_a_large_object_is_read_in_large_ranges(s3: S3Service, bucket: str, tmp_path: Path) -> None:
    data = noise(20 << 20)
    repo = repository(s3, bucket)
    stored = send(repo, "key", tmp_path / "artifact", data)
    with repo.open("key", size=len(data), etag=stored.etag) as stream:
        assert b"".join(iter(lambda: stream.read(1 << 20), b"")) == data
