from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from isal import isal_zlib

from hq_backups.engine.errors import RepositoryError, Unreachable
from hq_backups.engine.repository import s3_upload
from hq_backups.engine.repository.s3 import S3Repository
from hq_backups.engine.repository.s3_client import Network
from hq_backups.engine.repository.s3_download import ObjectReader
from tests.testbed.process import wait_until
from tests.testbed.s3 import S3Service
from tests.testbed.s3_use import PART, keys, leftovers, noise, our_threads, repository, send, started
from tests.testbed.toxiproxy import Proxy, Toxiproxy

pytestmark = pytest.mark.faults

QUICK = Network(connect=1.0, read=1.0, attempts=1, patience=3.0, commit=5.0)
RANGE = 256 << 10


@pytest.fixture
def proxy(toxiproxy: Toxiproxy, s3: S3Service) -> Iterator[Proxy]:
    """Put the breaker of connections in front of the service."""
    proxy = toxiproxy.proxy(s3.endpoint)
    yield proxy
    proxy.remove()


@pytest.fixture
def repo(s3: S3Service, proxy: Proxy, bucket: str) -> S3Repository:
    return repository(s3, bucket, endpoint=proxy.endpoint, network=replace(QUICK, patience=30.0))


@pytest.fixture
def impatient(s3: S3Service, proxy: Proxy, bucket: str) -> S3Repository:
    return repository(s3, bucket, endpoint=proxy.endpoint, network=QUICK)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "artifact"


@contextmanager
def after(seconds: float, action: Callable[[], object]) -> Iterator[None]:
    """Do something a while after the block began, and be done with it at its end."""
    timer = threading.Timer(seconds, action)
    timer.start()
    try:
        yield
    finally:
        timer.join()


class TestUpload:
    def test_connections_that_are_reset_in_the_middle_cost_time_only(
        self, repo: S3Repository, proxy: Proxy, s3: S3Service, bucket: str, path: Path
    ) -> None:
        data = noise(3 * PART)
        # Every connection dies after less than a part; the toxic is taken away when it has bitten.
        toxic = proxy.add_toxic("limit_data", stream="upstream", bytes=PART // 2)
        upload = started(repo, "key", path, data)
        time.sleep(2)
        assert upload.failed is None
        proxy.remove_toxic(toxic)
        assert upload.finish(len(data), isal_zlib.crc32(data), if_none_match=True).checked == "crc32"
        upload.abort()
        with repo.open("key", size=len(data)) as reader:
            assert reader.read() == data

    def test_a_service_that_is_away_for_a_while_costs_time_only(
        self, repo: S3Repository, proxy: Proxy, path: Path
    ) -> None:
        data = noise(3 * PART)
        proxy.disable()
        upload = started(repo, "key", path, data)
        with after(2.0, proxy.enable):
            stored = upload.finish(len(data), isal_zlib.crc32(data), if_none_match=False)
        assert stored.size == len(data)
        upload.abort()

    def test_a_service_that_stays_away_is_a_failure_that_is_kept(
        self, impatient: S3Repository, proxy: Proxy, s3: S3Service, bucket: str, path: Path
    ) -> None:
        proxy.disable()
        began = time.monotonic()
        data = noise(3 * PART)
        upload = started(impatient, "key", path, data)
        wait_until(lambda: upload.failed, what="patience to end", timeout=15)
        upload.advance(len(data))
        with pytest.raises(Unreachable):
            upload.finish(len(data), isal_zlib.crc32(data), if_none_match=False)
        upload.abort()
        assert time.monotonic() - began < 20
        assert our_threads() == []
        assert keys(s3, bucket) == []

    @pytest.mark.parametrize("stream", ["upstream", "downstream"])
    def test_a_stall_ends(
        self, impatient: S3Repository, proxy: Proxy, s3: S3Service, bucket: str, path: Path, stream: str
    ) -> None:
        proxy.add_toxic("timeout", stream=stream, timeout=0)  # type: ignore[arg-type]
        began = time.monotonic()
        with pytest.raises(Unreachable):
            send(impatient, "key", path, noise(3 * PART))
        assert time.monotonic() - began < 15
        proxy.remove_toxics()
        assert keys(s3, bucket) == []

    def test_a_stall_in_the_middle_of_a_part_is_outlived(
        self, repo: S3Repository, proxy: Proxy, path: Path
    ) -> None:
        data = noise(2 * PART + 1)
        proxy.add_toxic("bandwidth", stream="upstream", rate=20_000)
        upload = started(repo, "key", path, data)
        wait_until(lambda: upload._multipart._upload_id, what="the upload to begin")
        toxic = proxy.add_toxic("timeout", stream="upstream", timeout=0)
        time.sleep(2)
        proxy.remove_toxic(toxic)
        assert upload.finish(len(data), isal_zlib.crc32(data), if_none_match=False).size == len(data)
        upload.abort()

    def test_an_abort_does_not_wait_for_a_network_that_hangs(
        self,
        s3: S3Service,
        proxy: Proxy,
        bucket: str,
        path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(s3_upload, "ABORT_WAIT", 1.0)
        slow = Network(connect=6.0, read=6.0, attempts=1, patience=30.0)
        upload = started(
            repository(s3, bucket, endpoint=proxy.endpoint, network=slow), "key", path, noise(3 * PART)
        )
        wait_until(lambda: upload._multipart._upload_id, what="the upload to begin")
        proxy.add_toxic("timeout", stream="upstream", timeout=0)
        began = time.monotonic()
        upload.abort()
        assert time.monotonic() - began < 9
        wait_until(lambda: not our_threads(), what="the senders to give up", timeout=20)
        assert isinstance(upload.failed, (RepositoryError, type(None)))

    @pytest.mark.parametrize("answered", [0, 60, 400])
    def test_the_answer_to_the_completion_may_be_lost(
        self, repo: S3Repository, proxy: Proxy, s3: S3Service, bucket: str, path: Path, answered: int
    ) -> None:
        data = noise(2 * PART)
        upload = started(repo, "key", path, data)
        wait_until(lambda: upload._arrived == PART, what="the first part")
        proxy.add_toxic("limit_data", stream="downstream", bytes=answered)
        with after(2.5, proxy.remove_toxics):
            stored = upload.finish(len(data), isal_zlib.crc32(data), if_none_match=True)
        assert (stored.size, stored.checked) == (len(data), "crc32")
        assert leftovers(s3, bucket) == []
        upload.abort()


class TestDownload:
    @pytest.fixture
    def stored(self, s3: S3Service, bucket: str, path: Path) -> tuple[bytes, str]:
        data = noise(3 << 20)
        return data, send(repository(s3, bucket), "key", path, data).etag

    def reader(self, repo: S3Repository, stored: tuple[bytes, str]) -> ObjectReader:
        return ObjectReader(repo, "key", None, size=len(stored[0]), etag=stored[1], range_size=RANGE)

    def test_bodies_that_are_cut_are_fetched_on_from_there(
        self, repo: S3Repository, proxy: Proxy, stored: tuple[bytes, str]
    ) -> None:
        proxy.add_toxic("limit_data", stream="downstream", bytes=RANGE // 2)
        with self.reader(repo, stored) as reader:
            assert reader.read() == stored[0]

    def test_connections_that_are_reset_are_made_again(
        self, repo: S3Repository, proxy: Proxy, stored: tuple[bytes, str]
    ) -> None:
        with self.reader(repo, stored) as reader:
            got = reader.read(RANGE)
            proxy.add_toxic("reset_peer", stream="downstream", timeout=0)
            with after(1.5, proxy.remove_toxics):
                got += b"".join(iter(lambda: reader.read(RANGE), b""))
        assert got == stored[0]

    def test_a_service_that_is_away_for_a_while_costs_time_only(
        self, repo: S3Repository, proxy: Proxy, stored: tuple[bytes, str]
    ) -> None:
        with self.reader(repo, stored) as reader:
            got = reader.read(100)
            proxy.disable()
            with after(1.5, proxy.enable):
                got += b"".join(iter(lambda: reader.read(RANGE), b""))
        assert got == stored[0]

    @pytest.mark.parametrize("how", ["stall", "down"])
    def test_what_does_not_come_back_is_an_error_and_never_an_end(
        self, impatient: S3Repository, proxy: Proxy, stored: tuple[bytes, str], how: str
    ) -> None:
        began = time.monotonic()
        with self.reader(impatient, stored) as reader:
            reader.read(100)
            if how == "stall":
                proxy.add_toxic("timeout", stream="downstream", timeout=0)
            else:
                proxy.disable()
            with pytest.raises(Unreachable):
                list(iter(lambda: reader.read(RANGE), b""))
            assert reader.tell() < len(stored[0])
        assert time.monotonic() - began < 15
        wait_until(lambda: not our_threads(), what="the threads to end", timeout=5)
