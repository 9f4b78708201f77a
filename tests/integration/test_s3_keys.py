from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from isal import isal_zlib

from hq_backups.engine import names
from hq_backups.engine.errors import Exit, ForeignObject, NoSuchBucket
from hq_backups.engine.repository.s3 import S3Repository
from hq_backups.engine.repository.s3_keys import KeyPlan, plan_key
from tests.testbed.s3 import S3Service
from tests.testbed.s3_use import RUN, keys, repository, send

STARTED = datetime(2026, 11, 22, 3, 4, 5)
DAILY = "postgres_icds_daily_2026_11_22.tar.gz"
COUCH = "couchdb_daily_2026_11_22.tar.gz"
FIXED = "postgres_daily_pg0.tar.gz"

Plan = Callable[..., KeyPlan]


@pytest.fixture
def plain(s3: S3Service, bucket: str) -> S3Repository:
    return repository(s3, bucket)


@pytest.fixture
def versioned(s3: S3Service, versioned_bucket: str) -> S3Repository:
    return repository(s3, versioned_bucket)


def plan(repo: S3Repository, **changes: Any) -> KeyPlan:
    asked: dict[str, Any] = {
        "store": "postgres",
        "type_": "daily",
        "mode": "plain",
        "codec": "gzip",
        "env": "icds",
        "host": "pg0",
        "run": RUN,
        "name": DAILY,
        "started_local": STARTED,
        "want_versions": False,
        **changes,
    }
    return plan_key(repo, **asked)


def couch(repo: S3Repository, **changes: Any) -> KeyPlan:
    return plan(repo, **{"store": "couch", "mode": "tar", "name": COUCH, "host": "couch0", **changes})


def put_backup(repo: S3Repository, key: str, *, env: str = "icds", host: str = "pg0") -> None:
    repo.put_manifest(key, secrets.token_bytes(8))
    said = {"schema": 1, "env": env, "host": host, "run": "another"}
    repo.put_manifest(key + names.MANIFEST_KEY_SUFFIX, json.dumps(said).encode())


def codes(made: KeyPlan) -> list[str]:
    return [code for code, _ in made.warnings]


class TestFixedKeys:
    def test_are_used_where_versions_are_wanted_and_kept(self, versioned: S3Repository) -> None:
        assert plan(versioned, want_versions=True) == KeyPlan(FIXED, fixed=True, if_none_match=False)
        assert couch(versioned, want_versions=True).key == "couchdb_daily_couch0.tar.gz"

    def test_are_not_used_where_the_bucket_keeps_none(self, plain: S3Repository) -> None:
        made = plan(plain, want_versions=True)
        assert (made.key, made.fixed, made.if_none_match) == (DAILY, False, True)
        assert codes(made) == ["bucket-unversioned"]
        assert "never switched on" in made.warnings[0][1]

    def test_are_not_used_where_they_are_not_wanted(self, versioned: S3Repository) -> None:
        assert plan(versioned) == KeyPlan(DAILY, fixed=False, if_none_match=True)

    def test_are_written_over_our_own(self, versioned: S3Repository) -> None:
        put_backup(versioned, FIXED)
        assert plan(versioned, want_versions=True) == KeyPlan(FIXED, fixed=True, if_none_match=False)

    @pytest.mark.parametrize(("changes", "word"), [({"env": "pna"}, "pna"), ({"host": "pg-0"}, "pg-0")])
    def test_are_never_written_over_anybody_elses(
        self, versioned: S3Repository, changes: dict[str, str], word: str
    ) -> None:
        put_backup(versioned, FIXED, **changes)
        with pytest.raises(ForeignObject, match=f"belongs to .* {word}, this is") as caught:
            plan(versioned, want_versions=True)
        assert caught.value.exit_code is Exit.PREFLIGHT

    def test_of_a_newer_schema_still_say_whose_they_are(self, versioned: S3Repository) -> None:
        versioned.put_manifest(FIXED + ".manifest.json", b'{"schema": 9, "env": "pna", "new": [1]}')
        with pytest.raises(ForeignObject):
            plan(versioned, want_versions=True)

    def test_of_an_old_script_are_written_over_and_said(self, versioned: S3Repository) -> None:
        versioned.put_manifest(FIXED, b"what the old script left")
        made = plan(versioned, want_versions=True)
        assert (made.key, codes(made)) == (FIXED, ["bucket-unmanaged"])

    @pytest.mark.parametrize("raw", [b"\xff", b"[]", b'{"env": 7}'])
    def test_with_a_manifest_that_says_nothing_are_written_over_and_said(
        self, versioned: S3Repository, raw: bytes
    ) -> None:
        versioned.put_manifest(FIXED + ".manifest.json", raw)
        made = plan(versioned, want_versions=True)
        assert (made.key, codes(made)) == (FIXED, ["bucket-manifest"])


class TestDatedKeys:
    def test_are_the_local_name_where_none_stands_yet(self, plain: S3Repository) -> None:
        assert plan(plain).key == DAILY

    def test_of_a_later_run_of_the_day_carry_its_time(self, plain: S3Repository) -> None:
        put_backup(plain, DAILY)
        assert plan(plain).key == "postgres_icds_daily_2026_11_22_030405.tar.gz"

    def test_of_an_old_script_are_not_overwritten(self, plain: S3Repository) -> None:
        plain.put_manifest(DAILY, b"what the old script left")
        assert plan(plain).key == "postgres_icds_daily_2026_11_22_030405.tar.gz"

    def test_carry_the_host_beside_another_hosts(self, plain: S3Repository) -> None:
        put_backup(plain, DAILY, host="pg1")
        assert plan(plain).key == "postgres_icds_daily_2026_11_22_pg0.tar.gz"

    def test_of_couch_always_carry_the_host(self, plain: S3Repository) -> None:
        assert couch(plain).key == "couchdb_daily_2026_11_22_couch0.tar.gz"
        assert couch(plain, host="couch1").key == "couchdb_daily_2026_11_22_couch1.tar.gz"

    def test_of_another_environment_are_not_overwritten(self, plain: S3Repository) -> None:
        put_backup(plain, "couchdb_daily_2026_11_22_couch0.tar.gz", env="pna", host="couch0")
        assert couch(plain).key == "couchdb_daily_2026_11_22_couch0_030405.tar.gz"

    def test_are_not_taken_where_only_a_manifest_stands(self, plain: S3Repository) -> None:
        plain.put_manifest(DAILY + ".manifest.json", b"{}")
        assert plan(plain).key == "postgres_icds_daily_2026_11_22_030405.tar.gz"

    def test_that_are_all_taken_are_an_error(self, plain: S3Repository) -> None:
        with pytest.raises(ForeignObject) as caught:  # noqa: PT012
            for _ in range(10):
                made = plan(plain)
                assert made.key not in keys_of(plain)
                put_backup(plain, made.key)
        assert caught.value.exit_code is Exit.PREFLIGHT

    def test_can_be_read_back_as_names(self, plain: S3Repository) -> None:
        put_backup(plain, DAILY)
        parsed = names.parse_name(plan(plain).key)
        assert parsed is not None
        assert (parsed.env, parsed.time) == ("icds", "030405")


def keys_of(repo: S3Repository) -> list[str]:
    return [o.key for o in repo.list_objects([""])]


class TestAdoption:
    DATA = b"the whole artifact"

    @pytest.fixture(params=[False, True], ids=["dated", "fixed"])
    def killed(self, request: pytest.FixtureRequest, tmp_path: Path) -> tuple[S3Repository, dict[str, Any]]:
        """Leave an object whose run was killed before it wrote the manifest."""
        repo: S3Repository = request.getfixturevalue("versioned" if request.param else "plain")
        changes = {"want_versions": request.param}
        send(repo, plan(repo, **changes).key, tmp_path / "artifact", self.DATA)
        return repo, changes

    def test_of_this_runs_object_spares_a_second_upload(
        self, killed: tuple[S3Repository, dict[str, Any]]
    ) -> None:
        repo, changes = killed
        made = plan(repo, size=len(self.DATA), crc32=isal_zlib.crc32(self.DATA), **changes)
        assert made.adopt is not None
        assert made.adopt.key == made.key
        assert made.adopt.checked == "crc32"
        assert (made.adopt.version_id is None) == (not changes["want_versions"])
        assert made.warnings == ()

    @pytest.mark.parametrize(
        "differing",
        [
            {"run": "20261122T000003Z-pg0-postgres", "size": len(DATA)},
            {"size": len(DATA) + 1},
            {"size": len(DATA), "crc32": 1},
            {},
        ],
    )
    def test_of_anything_else_does_not_happen(
        self, killed: tuple[S3Repository, dict[str, Any]], differing: dict[str, Any]
    ) -> None:
        repo, changes = killed
        made = plan(repo, **changes, **differing)
        assert made.adopt is None
        assert made.fixed or made.key == "postgres_icds_daily_2026_11_22_030405.tar.gz"


def test_a_missing_bucket_is_said(s3: S3Service) -> None:
    with pytest.raises(NoSuchBucket):
        plan(repository(s3, "no-such-bucket"))


def test_the_second_name_of_a_bucket_is_said(s3: S3Service, bucket: str) -> None:
    made = plan(repository(s3, "not-made", fallback=bucket))
    assert codes(made) == ["bucket-fallback"]
    assert keys(s3, bucket) == []
