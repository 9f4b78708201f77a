"""What no healthy service does: a proxy in this process lies between us and a real one."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from hq_backups.engine.errors import (
    AccessDenied,
    ClockSkew,
    NoSuchBucket,
    ObjectMismatch,
    RepositoryError,
    Unreachable,
    WrongRegion,
)
from hq_backups.engine.repository import s3_upload
from hq_backups.engine.repository.s3 import S3Repository
from hq_backups.engine.repository.s3_download import ObjectReader
from tests.testbed.process import wait_until
from tests.testbed.s3 import MotoServer, S3Service
from tests.testbed.s3_liar import Answer, Ask, Liar, Lie, s3_error
from tests.testbed.s3_use import (
    IMPATIENT,
    PART,
    keys,
    leftovers,
    noise,
    our_threads,
    repository,
    send,
    started,
)

pytestmark = pytest.mark.faults

DATA = noise(PART + 1)
SMALL = b"a small artifact"
PATIENT = replace(IMPATIENT, patience=60.0)


@pytest.fixture
def lying(s3: S3Service) -> Iterator[Callable[..., Liar]]:
    """Return a factory of liars in front of the strict service, or of another one."""
    with ExitStack() as stack:

        def make(lie: Lie = lambda _: None, service: S3Service = s3, hidden: tuple[str, ...] = ()) -> Liar:
            return stack.enter_context(Liar(service.endpoint, lie, hidden=hidden))

        yield make


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "artifact"


def through(s3: S3Service, bucket: str, liar: Liar) -> S3Repository:
    return repository(s3, bucket, endpoint=liar.endpoint)


def once(what: str, answer: Callable[[Ask], Answer | None]) -> Lie:
    """Lie to the first request of a kind."""
    told: list[str] = []

    def lie(ask: Ask) -> Answer | None:
        if ask.what != what or told:
            return None
        told.append(what)
        return answer(ask)

    return lie


def always(what: str, answer: Callable[[Ask], Answer | None]) -> Lie:
    return lambda ask: answer(ask) if ask.what == what else None


def cut(_: Ask) -> Answer | None:
    raise ConnectionError


def done_but_not_told(ask: Ask) -> Answer | None:
    ask.forward()
    raise ConnectionError


class TestCompletion:
    def test_200_with_an_error_in_it_is_tried_again(
        self, s3: S3Service, bucket: str, lying: Callable[..., Liar], path: Path
    ) -> None:
        liar = lying(once("complete", lambda _: s3_error("InternalError", 200)))
        assert send(through(s3, bucket, liar), "key", path, DATA).checked == "crc32"
        assert liar.count("complete") == 2

    def test_200_with_an_error_in_it_is_in_the_end_a_failure(
        self, s3: S3Service, bucket: str, lying: Callable[..., Liar], path: Path
    ) -> None:
        liar = lying(always("complete", lambda _: s3_error("InternalError", 200)))
        with pytest.raises(RepositoryError, match="InternalError"):
            send(through(s3, bucket, liar), "key", path, DATA)
        assert keys(s3, bucket) == leftovers(s3, bucket) == []

    def test_200_without_an_object_is_a_failure(
        self, s3: S3Service, bucket: str, lying: Callable[..., Liar], path: Path
    ) -> None:
        said = b'<CompleteMultipartUploadResult><ETag>"x-3"</ETag></CompleteMultipartUploadResult>'
        liar = lying(always("complete", lambda _: Answer(200, said)))
        with pytest.raises(ObjectMismatch, match="not there"):
            send(through(s3, bucket, liar), "key", path, DATA)
        assert keys(s3, bucket) == []

    @pytest.mark.parametrize("if_none_match", [False, True])
    def test_an_answer_that_is_lost_is_found_out(
        self, s3: S3Service, bucket: str, lying: Callable[..., Liar], path: Path, if_none_match: bool
    ) -> None:
        for what, data in (("complete", DATA), ("put", SMALL)):
            liar = lying(once(what, done_but_not_told))
            stored = send(through(s3, bucket, liar), what, path, data, if_none_match=if_none_match)
            assert (stored.size, liar.count(what)) == (len(data), 1)

    def test_an_upload_that_is_gone_when_it_is_completed_is_a_failure(
        self, s3: S3Service, bucket: str, lying: Callable[..., Liar], path: Path
    ) -> None:
        liar = lying(always("complete", lambda _: s3_error("NoSuchUpload", 404)))
        with pytest.raises(RepositoryError, match="NoSuchUpload"):
            send(through(s3, bucket, liar), "key", path, DATA)
        assert liar.count("complete") == 1

    def test_a_condition_that_the_service_does_not_know_is_left_out(
        self, s3: S3Service, bucket: str, lying: Callable[..., Liar], path: Path
    ) -> None:
        def lie(ask: Ask) -> Answer | None:
            unknown = ask.what in ("put", "complete") and "If-None-Match" in ask.headers
            return s3_error("NotImplemented", 501, "If-None-Match is not implemented") if unknown else None

        repo = through(s3, bucket, lying(lie))
        assert send(repo, "large", path, DATA, if_none_match=True).size == len(DATA)
        assert send(repo, "small", path, SMALL, if_none_match=True).size == len(SMALL)


def test_an_upload_that_is_created_after_its_abort_is_taken_away_again(
    s3: S3Service,
    bucket: str,
    lying: Callable[..., Liar],
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(s3_upload, "ABORT_WAIT", 0.1)
    aborted, ids = threading.Event(), list[str]()

    def lie(ask: Ask) -> Answer | None:
        aborted.wait(10)
        return None

    liar = lying(always("create", lie))
    upload = started(through(s3, bucket, liar), "key", path, DATA, on_started=ids.append)
    wait_until(lambda: liar.count("create"), what="the upload to be asked for")
    upload.abort()
    assert ids == []
    aborted.set()
    wait_until(lambda: not our_threads(), what="the senders to end", timeout=5)
    assert len(ids) == 1
    assert leftovers(s3, bucket) == []
    upload.abort()


class TestComparison:
    @pytest.mark.parametrize("data", [SMALL, DATA], ids=["small", "parts"])
    @pytest.mark.parametrize("versioned", [False, True])
    def test_an_object_with_a_wrong_checksum_is_not_kept(
        self, s3: S3Service, lying: Callable[..., Liar], path: Path, data: bytes, versioned: bool
    ) -> None:
        def lie(ask: Ask) -> Answer:
            answer = ask.forward()
            wrong = {
                k: "AAAAAA==" if k.lower() == "x-amz-checksum-crc32" else v for k, v in answer.headers.items()
            }
            return replace(answer, headers=wrong)

        bucket = s3.make_bucket(versioned=versioned)
        repo = through(s3, bucket, lying(always("head", lie)))

        with pytest.raises(ObjectMismatch, match="CRC32"):
            send(repo, "key", path, data)
        assert keys(s3, bucket) == leftovers(s3, bucket) == []
        s3.remove_bucket(bucket)

    def test_what_is_taken_away_is_the_wrong_version_only(
        self, s3: S3Service, versioned_bucket: str, lying: Callable[..., Liar], path: Path
    ) -> None:
        send(repository(s3, versioned_bucket), "key", path, b"last week's")

        def lie(ask: Ask) -> Answer:
            answer = ask.forward()
            answer.headers["X-Amz-Checksum-Crc32"] = "AAAAAA=="
            return answer

        with pytest.raises(ObjectMismatch):
            send(through(s3, versioned_bucket, lying(always("head", lie))), "key", path, SMALL)
        assert repository(s3, versioned_bucket).get_small("key", None, 100) == b"last week's"

    def test_an_object_of_another_size_is_not_believed(
        self, s3: S3Service, bucket: str, lying: Callable[..., Liar], path: Path
    ) -> None:
        def lie(ask: Ask) -> Answer:
            answer = ask.forward()
            return replace(answer, length=(answer.length or 1) - 1)

        with pytest.raises(ObjectMismatch, match="bytes, sent were"):
            send(through(s3, bucket, lying(always("head", lie))), "key", path, DATA)
        assert keys(s3, bucket) == []

    def test_an_object_that_is_replaced_at_once_is_not_taken_for_ours(
        self, s3: S3Service, bucket: str, lying: Callable[..., Liar], path: Path
    ) -> None:
        def lie(ask: Ask) -> Answer | None:
            answer = ask.forward()
            repository(s3, bucket).put_manifest("key", b"x" * len(SMALL))
            return answer

        with pytest.raises(ObjectMismatch):
            send(through(s3, bucket, lying(once("put", lie))), "key", path, SMALL)
        assert repository(s3, bucket).get_small("key", None, 100) == b"x" * len(SMALL)

    @pytest.mark.parametrize(("what", "data"), [("put", SMALL), ("complete", DATA)])
    def test_another_form_of_etag_in_the_answer_to_a_write_is_no_mismatch(
        self, s3: S3Service, bucket: str, lying: Callable[..., Liar], path: Path, what: str, data: bytes
    ) -> None:
        def lie(ask: Ask) -> Answer:
            answer = ask.forward()
            answer.headers.pop("Etag", None)
            answer.headers["ETag"] = '"opaque"'
            answer.body = re.sub(rb"<ETag>.*</ETag>", b"<ETag>opaque</ETag>", answer.body)
            return answer

        liar = lying(always(what, lie))
        assert send(through(s3, bucket, liar), "key", path, data).checked == "crc32"

    @pytest.mark.parametrize("data", [SMALL, DATA], ids=["small", "parts"])
    def test_a_head_that_lost_its_checksum_is_asked_again(
        self, s3: S3Service, bucket: str, lying: Callable[..., Liar], path: Path, data: bytes
    ) -> None:
        def lie(ask: Ask) -> Answer:
            answer = ask.forward()
            told = {k: v for k, v in answer.headers.items() if "checksum" not in k.lower()}
            return replace(answer, headers=told)

        stored = send(through(s3, bucket, lying(once("head", lie))), "key", path, data)
        assert (stored.checked, stored.crc32 is None) == ("crc32", False)


class TestParts:
    def test_a_part_that_was_said_to_have_arrived_and_did_not_is_found_out(
        self, s3: S3Service, bucket: str, lying: Callable[..., Liar], path: Path
    ) -> None:
        def lie(ask: Ask) -> Answer | None:
            if ask.what != "part" or "partNumber=2" not in ask.query:
                return None
            crc = ask.headers["x-amz-checksum-crc32"]
            return Answer(200, b"", {"ETag": '"' + "0" * 32 + '"', "x-amz-checksum-crc32": crc})

        with pytest.raises(RepositoryError):
            send(through(s3, bucket, lying(lie)), "key", path, DATA)
        assert keys(s3, bucket) == leftovers(s3, bucket) == []

    def test_a_part_that_arrived_wrong_is_sent_again(
        self, s3: S3Service, bucket: str, lying: Callable[..., Liar], path: Path
    ) -> None:
        liar = lying(once("part", lambda _: s3_error("BadDigest", 400)))
        assert send(through(s3, bucket, liar), "key", path, DATA).size == len(DATA)
        assert liar.count("part") == 3

    def test_a_part_that_always_arrives_wrong_is_a_failure(
        self, s3: S3Service, bucket: str, lying: Callable[..., Liar], path: Path
    ) -> None:
        wrong = Answer(200, b"", {"ETag": '"x"', "x-amz-checksum-crc32": "AAAAAA=="})
        liar = lying(always("part", lambda _: wrong))
        repo = repository(s3, bucket, endpoint=liar.endpoint, network=PATIENT)
        with pytest.raises(ObjectMismatch, match="other content"):
            send(repo, "key", path, DATA)
        assert liar.count("part") <= 10
        assert leftovers(s3, bucket) == []

    @pytest.mark.parametrize("answer", [cut, lambda _: s3_error("SlowDown", 503)])
    def test_a_service_that_is_busy_is_asked_again(
        self,
        s3: S3Service,
        bucket: str,
        lying: Callable[..., Liar],
        path: Path,
        answer: Callable[[Ask], Answer | None],
    ) -> None:
        for what in ("create", "part", "complete", "put"):
            repo = through(s3, bucket, lying(once(what, answer)))
            data = SMALL if what == "put" else DATA
            assert send(repo, what, path, data, if_none_match=True).size == len(data)

    @pytest.mark.parametrize(
        ("code", "status", "expected"),
        [
            ("AccessDenied", 403, AccessDenied),
            ("NoSuchBucket", 404, NoSuchBucket),
            ("PermanentRedirect", 301, WrongRegion),
            ("RequestTimeTooSkewed", 403, ClockSkew),
        ],
    )
    def test_what_is_hopeless_is_explained_at_once(
        self,
        s3: S3Service,
        bucket: str,
        lying: Callable[..., Liar],
        path: Path,
        code: str,
        status: int,
        expected: type[Exception],
    ) -> None:
        liar = lying(always("part", lambda _: s3_error(code, status)))
        with pytest.raises(expected):
            send(through(s3, bucket, liar), "key", path, DATA)
        # botocore itself follows a redirect once.
        assert liar.count("part") <= (4 if status == 301 else 2)
        assert leftovers(s3, bucket) == []


class TestOlderServices:
    """Services that do not know checksums; the lenient one stands in for them."""

    @pytest.fixture
    def place(self, moto_server: MotoServer) -> Iterator[str]:
        bucket = moto_server.make_bucket()
        yield bucket
        moto_server.remove_bucket(bucket)

    @pytest.mark.parametrize("data", [SMALL, DATA], ids=["small", "parts"])
    def test_etags_prove_what_checksums_cannot(
        self, moto_server: MotoServer, place: str, lying: Callable[..., Liar], path: Path, data: bytes
    ) -> None:
        liar = lying(service=moto_server, hidden=("x-amz-checksum", "x-amz-sdk-checksum"))
        assert send(through(moto_server, place, liar), "key", path, data).checked == "etag"
        assert all("Content-MD5" in ask.headers for ask in liar.seen if ask.what in ("part", "put"))
        assert not any("x-amz-checksum-crc32" in ask.headers for ask in liar.seen if ask.what == "part")

    def test_services_that_refuse_checksums_get_none(
        self, moto_server: MotoServer, place: str, lying: Callable[..., Liar], path: Path
    ) -> None:
        def lie(ask: Ask) -> Answer | None:
            if any(name.lower().startswith("x-amz-checksum") for name in ask.headers):
                return s3_error("NotImplemented", 501, "a header is not implemented: x-amz-checksum-…")
            return None

        liar = lying(lie, service=moto_server, hidden=("x-amz-checksum",))
        repo = through(moto_server, place, liar)
        assert send(repo, "large", path, DATA, if_none_match=True).checked == "etag"
        assert send(repo, "small", path, SMALL, if_none_match=True).checked == "etag"
        repo.put_manifest("m", b"{}")

    def test_without_checksums_and_md5_etags_only_the_size_is_compared(
        self, moto_server: MotoServer, place: str, lying: Callable[..., Liar], path: Path
    ) -> None:
        def lie(ask: Ask) -> Answer | None:
            if ask.what != "head":
                return None
            answer = ask.forward()
            headers = {k: v for k, v in answer.headers.items() if k.lower() != "etag"}
            return replace(answer, headers={**headers, "ETag": '"opaque"'})

        def silent(ask: Ask) -> Answer | None:
            if ask.what == "put":
                answer = ask.forward()
                return replace(answer, headers={"ETag": '"opaque"'})
            return lie(ask)

        liar = lying(silent, service=moto_server, hidden=("x-amz-checksum",))
        assert send(through(moto_server, place, liar), "key", path, SMALL).checked == "size"


class TestReading:
    @pytest.fixture
    def stored(self, s3: S3Service, bucket: str) -> str:
        return repository(s3, bucket).put_manifest("key", DATA).etag

    def read(self, s3: S3Service, bucket: str, liar: Liar, etag: str) -> bytes:
        repo = through(s3, bucket, liar)
        with ObjectReader(repo, "key", None, size=len(DATA), etag=etag, range_size=1 << 20) as reader:
            return b"".join(iter(lambda: reader.read(1 << 18), b""))

    def test_a_body_that_is_cut_every_time_is_put_together(
        self, s3: S3Service, bucket: str, lying: Callable[..., Liar], stored: str
    ) -> None:
        liar = lying(always("get", lambda ask: replace(ask.forward(), cut=400_000)))
        assert self.read(s3, bucket, liar, stored) == DATA

    def test_a_body_that_never_comes_is_an_error_and_never_an_end(
        self, s3: S3Service, bucket: str, lying: Callable[..., Liar], stored: str
    ) -> None:
        liar = lying(always("get", lambda ask: replace(ask.forward(), cut=0)))
        with pytest.raises(RepositoryError):
            self.read(s3, bucket, liar, stored)

    def test_a_body_that_is_shorter_than_its_range_is_fetched_on(
        self, s3: S3Service, bucket: str, lying: Callable[..., Liar], stored: str
    ) -> None:
        def lie(ask: Ask) -> Answer:
            answer = ask.forward()
            return replace(answer, body=answer.body[:300_000])

        assert self.read(s3, bucket, lying(always("get", lie)), stored) == DATA

    def test_a_service_that_ignores_ranges_is_found_out(
        self, s3: S3Service, bucket: str, lying: Callable[..., Liar], stored: str
    ) -> None:
        liar = lying(always("get", lambda _: Answer(200, DATA, {"ETag": stored})))
        with pytest.raises(RepositoryError, match="ranges"):
            self.read(s3, bucket, liar, stored)

    def test_a_service_that_gives_another_range_is_found_out(
        self, s3: S3Service, bucket: str, lying: Callable[..., Liar], stored: str
    ) -> None:
        def lie(ask: Ask) -> Answer:
            answer = ask.forward()
            total = len(DATA)
            return replace(
                answer, headers={**answer.headers, "Content-Range": f"bytes 7-{total - 1}/{total}"}
            )

        with pytest.raises(RepositoryError, match="asked for bytes from"):
            self.read(s3, bucket, lying(always("get", lie)), stored)

    def test_a_service_that_goes_away_is_unreachable(
        self, s3: S3Service, bucket: str, lying: Callable[..., Liar], stored: str
    ) -> None:
        with pytest.raises(Unreachable):
            self.read(s3, bucket, lying(always("get", cut)), stored)

    def test_a_small_object_that_breaks_off_is_never_returned(
        self, s3: S3Service, bucket: str, lying: Callable[..., Liar]
    ) -> None:
        repository(s3, bucket).put_manifest("m", b"0123456789")
        liar = lying(once("get", lambda ask: replace(ask.forward(), cut=4)))
        assert through(s3, bucket, liar).get_small("m", None, 100) == b"0123456789"
        liar = lying(always("get", lambda ask: replace(ask.forward(), cut=4)))
        with pytest.raises(RepositoryError, match="broke off"):
            through(s3, bucket, liar).get_small("m", None, 100)


class TestNothing:
    """Half of the headers pass for all of them: the answer seems to be a success with an empty body."""

    @pytest.fixture
    def emptied(self, s3: S3Service, bucket: str, lying: Callable[..., Liar]) -> S3Repository:
        repository(s3, bucket).put_manifest("postgres.manifest.json", b"{}")
        return through(s3, bucket, lying(lambda _: Answer(200)))

    def test_is_no_empty_list(self, emptied: S3Repository) -> None:
        with pytest.raises(Unreachable):
            list(emptied.list_manifests(["postgres"]))
        with pytest.raises(Unreachable):
            emptied.unfinished_uploads("postgres")

    def test_is_no_bucket_without_versions(self, emptied: S3Repository) -> None:
        with pytest.raises(Unreachable):
            emptied.versioned()

    def test_is_no_object(self, emptied: S3Repository) -> None:
        with pytest.raises(Unreachable):
            emptied.head("postgres.manifest.json")
        with pytest.raises(Unreachable):
            emptied.open("postgres.manifest.json", size=2)

    def test_is_no_upload(self, emptied: S3Repository, path: Path) -> None:
        for data in (SMALL, DATA):
            with pytest.raises(Unreachable):
                send(emptied, "key", path, data)

    def test_is_no_part(self, s3: S3Service, bucket: str, lying: Callable[..., Liar], path: Path) -> None:
        liar = lying(once("part", lambda _: Answer(200)))
        assert send(through(s3, bucket, liar), "key", path, DATA).checked == "crc32"


class TestListing:
    def test_one_manifest_that_may_not_be_read_does_not_hide_the_others(
        self, s3: S3Service, bucket: str, lying: Callable[..., Liar]
    ) -> None:
        repo = repository(s3, bucket)
        for name in "abc":
            repo.put_manifest(f"postgres_{name}.manifest.json", name.encode())

        def lie(ask: Ask) -> Answer | None:
            return s3_error("AccessDenied", 403) if "postgres_b" in ask.path else None

        found = list(through(s3, bucket, lying(lie)).list_manifests(["postgres"]))
        assert [m.raw for m in found] == [b"a", None, b"c"]
        assert found[1].error is not None
        assert "denied" in found[1].error

    def test_a_service_that_dies_in_the_middle_is_an_error_and_not_a_short_list(
        self, s3: S3Service, bucket: str, lying: Callable[..., Liar]
    ) -> None:
        repository(s3, bucket).put_manifest("postgres_a.manifest.json", b"a")

        def lie(ask: Ask) -> Answer | None:
            return cut(ask) if "postgres_a.manifest" in ask.path else None

        with pytest.raises(Unreachable):
            list(through(s3, bucket, lying(lie)).list_manifests(["postgres"]))

    @pytest.mark.parametrize(("code", "status"), [("AccessDenied", 403), ("NotImplemented", 501)])
    def test_versions_that_cannot_be_asked_for_are_not_there(
        self, s3: S3Service, bucket: str, lying: Callable[..., Liar], code: str, status: int
    ) -> None:
        repository(s3, bucket).put_manifest("postgres_a.manifest.json", b"a")

        def lie(ask: Ask) -> Answer | None:
            return s3_error(code, status) if "version" in ask.query else None

        repo = through(s3, bucket, lying(lie))
        assert repo.versioned() == (False, f"whether it keeps versions cannot be asked ({code})")
        assert [m.raw for m in repo.list_manifests(["postgres"])] == [b"a"]

    def test_versions_of_a_versioned_bucket_that_may_not_be_listed_are_an_error(
        self, s3: S3Service, versioned_bucket: str, lying: Callable[..., Liar]
    ) -> None:
        def lie(ask: Ask) -> Answer | None:
            return s3_error("AccessDenied", 403) if "versions" in ask.query else None

        with pytest.raises(AccessDenied):
            list(through(s3, versioned_bucket, lying(lie)).list_objects(["postgres"]))
