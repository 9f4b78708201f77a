"""What stands in a bucket and is not ours, and a bucket that keeps no versions."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hq_backups.engine.manifest import load_manifest
from tests.faults.victim import ENV, HOST, Victim
from tests.testbed.s3 import S3Service

pytestmark = [pytest.mark.faults, pytest.mark.postgres15]
FIXED = f"postgres_daily_{HOST}.tar"


def manifest_in(victim: Victim, key: str) -> dict[str, Any]:
    assert victim.s3 is not None
    body = victim.s3.client().get_object(Bucket=victim.bucket, Key=f"{key}.manifest.json")["Body"].read()
    load_manifest(body, key)
    return dict(json.loads(body))


def test_a_bucket_without_versions_gets_dated_keys_and_a_warning(
    victim: Victim, s3: S3Service, bucket: str
) -> None:
    victim.use_bucket(s3, bucket)
    first = victim.run(victim.backup()).expect(0)
    assert "bucket-unversioned" in first.warnings
    assert "does not keep versions" in first.warnings
    (entry,) = victim.good("s3")
    second = victim.run(victim.backup()).expect(0)
    # The local one of that day was replaced; in the bucket both stand.
    runs = {o.events[0]["run"] for o in (first, second)}
    assert {e["run"] for e in victim.good("s3")} == runs
    keys = [k for k in victim.objects() if not k.endswith(".json")]
    assert FIXED not in keys
    assert len(keys) == 2
    assert {manifest_in(victim, k)["run"] for k in keys} == runs
    assert entry["name"] in keys
    victim.assert_survived(runs, source="s3")


@pytest.mark.parametrize("whose", ["env", "host"])
def test_another_environment_s_or_host_s_key_is_never_written(
    victim: Victim, s3: S3Service, versioned_bucket: str, whose: str
) -> None:
    victim.use_bucket(s3, versioned_bucket)
    theirs = {"env": {"env": "india"}, "host": {"host": HOST}}[whose]
    victim.run(victim.backup(changes=theirs)).expect(0)
    if whose == "host":
        # Two hosts of one name differ by nothing but the manifest.
        body = manifest_in(victim, FIXED) | {"host": "pg1"}
        s3.client().put_object(
            Bucket=versioned_bucket, Key=f"{FIXED}.manifest.json", Body=json.dumps(body).encode()
        )
    victim.forget()
    objects, names = victim.objects(), victim.names()
    outcome = victim.run(victim.backup()).expect(5)
    assert "ForeignObject" in outcome.errors
    assert ("environment india" if whose == "env" else "host pg1") in outcome.errors
    assert victim.objects() == objects
    assert victim.uploads() == []
    assert victim.names() == names
    assert outcome.kind("artifact") == []


def test_an_old_script_s_object_is_written_over_where_its_version_stays(
    victim: Victim, s3: S3Service, versioned_bucket: str
) -> None:
    victim.use_bucket(s3, versioned_bucket)
    old = b"a tar of the old script"
    s3.client().put_object(Bucket=versioned_bucket, Key=FIXED, Body=old)
    outcome = victim.run(victim.backup()).expect(0)
    assert "it stays as an older version" in outcome.warnings
    assert victim.objects()[FIXED] == 2
    versions = s3.client().list_object_versions(Bucket=versioned_bucket, Prefix=FIXED)["Versions"]
    (before,) = [v for v in versions if v["Key"] == FIXED and not v["IsLatest"]]
    body = (
        s3.client()
        .get_object(Bucket=versioned_bucket, Key=FIXED, VersionId=before["VersionId"])["Body"]
        .read()
    )
    assert body == old
    victim.assert_survived({outcome.events[0]["run"]}, source="s3")
    # And again, over our own: nothing to warn of.
    assert "older version" not in victim.run(victim.backup()).expect(0).warnings


def test_an_old_script_s_object_stays_in_a_bucket_without_versions(
    victim: Victim, s3: S3Service, bucket: str
) -> None:
    victim.use_bucket(s3, bucket)
    name = victim.run(victim.backup(upload=False)).expect(0).kind("artifact")[0]["manifest"]["name"]
    for key in (FIXED, name):
        s3.client().put_object(Bucket=bucket, Key=key, Body=b"an old one")
    victim.run(victim.backup()).expect(0)
    for key in (FIXED, name):
        assert s3.client().get_object(Bucket=bucket, Key=key)["Body"].read() == b"an old one"
    assert len(victim.good("s3")) == 1


def test_older_versions_stay_restorable(victim: Victim, s3: S3Service, versioned_bucket: str) -> None:
    victim.use_bucket(s3, versioned_bucket)
    runs = [victim.run(victim.backup()).expect(0).events[0]["run"] for _ in range(2)]
    listed = {e["run"]: e["locations"][0] for e in victim.good("s3")}
    assert set(listed) == set(runs)
    assert listed[runs[0]]["version_id"] != listed[runs[1]]["version_id"]
    assert listed[runs[0]]["key"] == listed[runs[1]]["key"] == FIXED
    victim.run(victim.verify(runs[0], source="s3")).expect(0)


def test_another_environment_s_backup_is_not_restored_unless_named(victim: Victim, s3: S3Service) -> None:
    theirs = victim.run(victim.backup(changes={"env": "india"})).expect(0)
    name = theirs.kind("artifact")[0]["manifest"]["name"]
    beside = victim.home / "beside"
    for wanted in (name, "latest"):
        refused = victim.run(victim.restore(wanted, target_dir=beside))
        assert refused.status in (3, 5), refused.errors
        assert not beside.exists()
    assert f"this is {ENV}" in victim.run(victim.restore(name, target_dir=beside)).expect(5).errors
    victim.run(victim.restore(name, target_dir=beside, from_env="india")).expect(0)
    assert (beside / "PG_VERSION").read_text() == "15\n"
