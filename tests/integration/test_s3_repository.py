from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from hq_backups.engine.config import S3Config
from hq_backups.engine.errors import (
    AccessDenied,
    BadCredentials,
    ForeignObject,
    NoSuchBucket,
    NoSuchObject,
    RepositoryError,
    Unreachable,
)
from hq_backups.engine.repository import s3_listing
from hq_backups.engine.repository.s3 import S3Repository
from tests.testbed.s3 import S3Service, VersityGW, refused_endpoint
from tests.testbed.s3_use import IMPATIENT, keys, leftovers, repository


@pytest.fixture
def readonly_gateway(versitygw: VersityGW, short_tmp: Path) -> Iterator[VersityGW]:
    """Run a second gateway over the same data that lets nobody write."""

    class ReadOnly(VersityGW):
        def argv(self) -> list[str | Path]:
            program, *rest = super().argv()
            return [program, "--readonly", *rest]

    gateway = ReadOnly(short_tmp)
    gateway.data, gateway.versions = versitygw.data, versitygw.versions
    with gateway:
        yield gateway


class TestVersioning:
    def test_it_is_asked(self, s3: S3Service, bucket: str, versioned_bucket: str) -> None:
        assert repository(s3, versioned_bucket).versioned() == (True, None)
        assert repository(s3, bucket).versioned() == (False, "its versioning was never switched on")

    def test_a_bucket_whose_versioning_is_suspended_keeps_none(self, s3: S3Service, bucket: str) -> None:
        s3.client().put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Suspended"})
        assert repository(s3, bucket).versioned() == (False, "its versioning is suspended")

    def test_a_service_without_versions_is_one_that_keeps_none(self, short_tmp: Path) -> None:
        reason = VersityGW.unavailable()
        if reason:
            pytest.skip(reason)
        with VersityGW(short_tmp, versioning=False) as gateway:
            repo = repository(gateway, gateway.make_bucket())
            versioned, why = repo.versioned()
            repo.put_manifest("postgres.manifest.json", b"{}")
            assert not versioned
            assert why
            assert [m.raw for m in repo.list_manifests(["postgres"])] == [b"{}"]

    def test_a_missing_bucket_is_not_an_unversioned_one(self, s3: S3Service) -> None:
        with pytest.raises(NoSuchBucket):
            repository(s3, "no-such-bucket").versioned()


class TestProbe:
    def test_leaves_nothing(self, s3: S3Service, versioned_bucket: str) -> None:
        repository(s3, versioned_bucket).probe()
        assert keys(s3, versioned_bucket) == leftovers(s3, versioned_bucket) == []

    def test_says_that_there_is_no_such_bucket(self, s3: S3Service) -> None:
        with pytest.raises(NoSuchBucket, match="no-such-bucket does not exist at http://127"):
            repository(s3, "no-such-bucket").probe()

    def test_says_that_the_secret_is_wrong(self, s3: S3Service, bucket: str) -> None:
        wrong = S3Config(s3.access_key, "not-the-secret", s3.endpoint)
        with pytest.raises(BadCredentials) as caught:
            S3Repository(wrong, bucket).probe()
        assert "not-the-secret" not in f"{caught.value}{caught.value.hint}"

    def test_says_that_the_key_is_unknown(self, s3: S3Service, bucket: str) -> None:
        with pytest.raises(BadCredentials):
            S3Repository(S3Config("nobody", "whatever", s3.endpoint), bucket).probe()

    def test_says_that_it_may_not_write(
        self, readonly_gateway: VersityGW, versitygw: VersityGW, bucket: str
    ) -> None:
        repo = repository(readonly_gateway, bucket)
        repo.probe(write=False)
        with pytest.raises(AccessDenied) as caught:
            repo.probe()
        assert "CreateMultipartUpload" in caught.value.hint

    def test_says_that_nobody_listens(self, s3: S3Service, bucket: str) -> None:
        with pytest.raises(Unreachable, match="connection refused"):
            repository(s3, bucket, endpoint=refused_endpoint()).probe()

    def test_says_that_the_name_does_not_resolve(self, s3: S3Service, bucket: str) -> None:
        with pytest.raises(Unreachable, match="not known to DNS"):
            repository(s3, bucket, endpoint="http://s3.nowhere.invalid").probe()

    def test_says_that_it_is_not_tls(self, s3: S3Service, bucket: str) -> None:
        with pytest.raises(Unreachable, match="TLS"):
            repository(s3, bucket, endpoint=s3.endpoint.replace("http:", "https:")).probe()

    def test_a_wrong_region_that_the_service_names_is_corrected(self, s3: S3Service, bucket: str) -> None:
        config = S3Config(s3.access_key, s3.secret_key, s3.endpoint, region="eu-west-1")
        S3Repository(config, bucket, network=IMPATIENT).probe()


class TestFallback:
    def test_the_second_name_is_used_where_only_it_exists(self, s3: S3Service, bucket: str) -> None:
        repo = repository(s3, "not-made", fallback=bucket)
        assert repo.bucket == bucket
        assert repo.note is not None
        assert "not-made does not exist" in repo.note
        repo.probe()

    def test_the_first_name_wins_when_both_exist(
        self, s3: S3Service, bucket: str, versioned_bucket: str
    ) -> None:
        repo = repository(s3, bucket, fallback=versioned_bucket)
        assert (repo.bucket, repo.note) == (bucket, None)

    def test_the_first_name_is_the_missing_one_when_neither_exists(self, s3: S3Service) -> None:
        repo = repository(s3, "not-made", fallback="not-made-either")
        with pytest.raises(NoSuchBucket, match="not-made does"):
            repo.probe()

    def test_an_unreachable_service_says_so_under_the_first_name(self, s3: S3Service, bucket: str) -> None:
        repo = repository(s3, "not-made", fallback=bucket, endpoint=refused_endpoint())
        assert repo.bucket == "not-made"
        with pytest.raises(Unreachable):
            repo.probe()


class TestObjects:
    def test_what_is_not_there_is_none(self, s3: S3Service, bucket: str) -> None:
        assert repository(s3, bucket).head("nothing") is None

    def test_a_missing_bucket_is_not_a_missing_object(self, s3: S3Service) -> None:
        with pytest.raises(NoSuchBucket):
            repository(s3, "no-such-bucket").head("nothing")

    @pytest.mark.parametrize("service", ["versitygw", "moto_server"])
    def test_a_manifest_is_written_compared_and_read(
        self, service: str, request: pytest.FixtureRequest
    ) -> None:
        s3: S3Service = request.getfixturevalue(service)
        bucket = s3.make_bucket(versioned=True)
        try:
            repo = repository(s3, bucket)
            first = repo.put_manifest("k.manifest.json", b"first")
            second = repo.put_manifest("k.manifest.json", b"second")
            assert first.version_id != second.version_id
            assert first.checked in ("crc32", "etag")
            assert repo.get_small("k.manifest.json", first.version_id, 100) == b"first"
            assert repo.get_small("k.manifest.json", None, 100) == b"second"
        finally:
            s3.remove_bucket(bucket)

    @pytest.mark.parametrize("service", ["versitygw", "moto_server"])
    def test_what_stands_is_not_overwritten_when_that_is_forbidden(
        self, service: str, request: pytest.FixtureRequest
    ) -> None:
        s3: S3Service = request.getfixturevalue(service)
        bucket = s3.make_bucket()
        try:
            repo = repository(s3, bucket)
            repo.put_manifest("k", b"theirs", if_none_match=True)
            with pytest.raises(ForeignObject):
                repo.put_manifest("k", b"ours", if_none_match=True)
            assert repo.get_small("k", None, 100) == b"theirs"
        finally:
            s3.remove_bucket(bucket)

    def test_a_small_object_that_is_large_is_refused(self, s3: S3Service, bucket: str) -> None:
        repo = repository(s3, bucket)
        repo.put_manifest("k", b"x" * 101)
        with pytest.raises(RepositoryError, match="101 bytes"):
            repo.get_small("k", None, 100)
        with pytest.raises(NoSuchObject):
            repo.get_small("other", None, 100)

    def test_unfinished_uploads_are_found_and_aborted(self, s3: S3Service, bucket: str) -> None:
        repo = repository(s3, bucket)
        before = datetime.now(UTC) - timedelta(seconds=2)
        upload = s3.client().create_multipart_upload(Bucket=bucket, Key="k")["UploadId"]
        s3.client().create_multipart_upload(Bucket=bucket, Key="k-of-another")
        ((found, initiated),) = repo.unfinished_uploads("k")
        assert found == upload
        assert initiated >= before
        repo.abort_upload("k", upload)
        repo.abort_upload("k", upload)
        assert leftovers(s3, bucket) == ["k-of-another"]

    def test_an_abort_in_a_bucket_that_is_gone_is_done(self, s3: S3Service) -> None:
        repository(s3, "no-such-bucket").abort_upload("k", "id")


class TestListing:
    def test_gives_every_version_of_every_manifest(self, s3: S3Service, versioned_bucket: str) -> None:
        repo = repository(s3, versioned_bucket)
        repo.put_manifest("postgres_a.manifest.json", b"1")
        repo.put_manifest("postgres_a.manifest.json", b"2")
        repo.put_manifest("couchdb_b.manifest.json", b"3")
        repo.put_manifest("postgres_a", b"an object")
        found = list(repo.list_manifests(["postgres"]))
        assert [(m.key, m.raw) for m in found] == [
            ("postgres_a.manifest.json", b"2"),
            ("postgres_a.manifest.json", b"1"),
        ]
        assert len({m.version_id for m in found}) == 2
        assert {m.raw for m in repo.list_manifests(["postgres", "couchdb", "post"])} == {b"1", b"2", b"3"}
        assert [o.key for o in repo.list_objects(["postgres", "couchdb"])] == ["postgres_a"]

    def test_a_deleted_key_keeps_its_versions_listed(self, s3: S3Service, versioned_bucket: str) -> None:
        repo = repository(s3, versioned_bucket)
        made = repo.put_manifest("postgres.manifest.json", b"1")
        s3.client().delete_object(Bucket=versioned_bucket, Key="postgres.manifest.json")
        (found,) = repo.list_manifests(["postgres"])
        assert (found.version_id, found.raw) == (made.version_id, b"1")

    def test_without_versions_ids_are_none(self, s3: S3Service, bucket: str) -> None:
        repo = repository(s3, bucket)
        made = repo.put_manifest("postgres.manifest.json", b"1")
        repo.put_manifest("postgres", b"an object")
        (found,) = repo.list_manifests(["postgres"])
        (listed,) = repo.list_objects(["postgres"])
        assert found.version_id is made.version_id is listed.version_id is None

    def test_an_object_from_before_versioning_is_read_without_an_id(self, s3: S3Service, bucket: str) -> None:
        repo = repository(s3, bucket)
        repo.put_manifest("postgres.manifest.json", b"before")
        s3.client().put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
        (found,) = repo.list_manifests(["postgres"])
        assert found.version_id is None
        repo.put_manifest("postgres.manifest.json", b"after")
        newest, oldest = repo.list_manifests(["postgres"])
        assert (newest.raw, oldest.raw, oldest.version_id) == (b"after", b"before", "null")

    def test_what_is_no_manifest_is_given_to_be_judged(self, s3: S3Service, bucket: str) -> None:
        repo = repository(s3, bucket)
        repo.put_manifest("postgres_a.manifest.json", b"\xff not json")
        repo.put_manifest("postgres_b.manifest.json", json.dumps({"schema": 99}).encode())
        assert [m.raw for m in repo.list_manifests(["postgres"])] == [b"\xff not json", b'{"schema": 99}']

    def test_a_manifest_that_is_too_large_is_told_and_not_read(
        self, s3: S3Service, bucket: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(s3_listing, "MAX_BYTES", 10)
        repo = repository(s3, bucket)
        repo.put_manifest("postgres_a.manifest.json", b"x" * 11)
        repo.put_manifest("postgres_b.manifest.json", b"x" * 10)
        first, second = repo.list_manifests(["postgres"])
        assert first.raw is None
        assert first.error is not None
        assert first.error == "it has 11 bytes, a manifest has 10 at most"
        assert second.raw == b"x" * 10

    def test_large_manifests_are_read_one_at_a_time_and_in_order(
        self, s3: S3Service, bucket: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(s3_listing, "SMALL", 2)
        repo = repository(s3, bucket)
        contents = [b"x" * (n % 5 + 1) for n in range(30)]
        for n, raw in enumerate(contents):
            repo.put_manifest(f"postgres_{n:02}.manifest.json", raw)
        assert [m.raw for m in repo.list_manifests(["postgres"])] == contents

    def test_a_missing_bucket_is_an_error_and_not_an_empty_list(self, s3: S3Service) -> None:
        with pytest.raises(NoSuchBucket):
            list(repository(s3, "no-such-bucket").list_manifests(["postgres"]))
        with pytest.raises(Unreachable):
            list(repository(s3, "b-b-b", endpoint=refused_endpoint()).list_objects(["postgres"]))

    @pytest.mark.parametrize("versioned", [False, True])
    def test_goes_on_after_the_first_page(
        self, s3: S3Service, versioned: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(s3_listing, "PAGE", 2)
        bucket = s3.make_bucket(versioned=versioned)
        repo = repository(s3, bucket)
        for n in range(7):
            repo.put_manifest(f"postgres_{n % 4}", b"")
        repo.put_manifest("postgres_9.manifest.json", b"last")
        assert len(list(repo.list_objects(["postgres"]))) == (7 if versioned else 4)
        assert [m.raw for m in repo.list_manifests(["postgres"])] == [b"last"]
        s3.remove_bucket(bucket)
