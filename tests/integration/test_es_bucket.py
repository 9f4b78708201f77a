"""Manifests of snapshots in a real bucket.

The test servers have no S3 plugin: the repository itself is a directory here, whatever else is as with a bucket.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from hq_backups.engine.elasticsearch.repository import Wanted
from hq_backups.engine.stores.elasticsearch import Elasticsearch
from tests.integration.es_helpers import Host, contents, fill, host_of
from tests.testbed.elasticsearch import ElasticsearchNode
from tests.testbed.s3 import MotoServer, S3Service

PREFIX = "hq_backups/manifests/"


def settings_of(s3: S3Service, bucket: str) -> dict[str, Any]:
    return {
        "es_local_repo": False,
        "backup_es_s3": True,
        "es_snapshot_bucket": bucket,
        "aws_endpoint": s3.endpoint,
        "AMAZON_S3_ACCESS_KEY": s3.access_key,
        "AMAZON_S3_SECRET_KEY": s3.secret_key,
    }


@pytest.fixture
def host(
    es6: ElasticsearchNode, s3: S3Service, versioned_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Host]:
    with host_of(es6) as made:

        def wanted(store: Elasticsearch) -> Wanted:
            return Wanted(store.repository, "fs", {"location": str(made.settings["es_repository_location"])})

        monkeypatch.setattr(Elasticsearch, "wanted", property(wanted))
        fill(es6, documents=4)
        made.settings |= settings_of(s3, versioned_bucket)
        yield made


def keys(s3: S3Service, bucket: str) -> list[str]:
    listed = s3.client().list_objects_v2(Bucket=bucket, Prefix=PREFIX).get("Contents", [])
    return [item["Key"] for item in listed]


@pytest.mark.django_db(transaction=True)
@pytest.mark.elasticsearch6
class TestManifests:
    def test_a_rebuilt_host_finds_them_in_the_bucket(
        self, host: Host, s3: S3Service, versioned_bucket: str
    ) -> None:
        host.good("run_backup", "elasticsearch", "--type", "daily")
        (entry,) = host.entries()
        assert keys(s3, versioned_bucket) == [f"{PREFIX}{entry['name']}.manifest.json"]
        before = contents(host.node)
        for path in host.records.glob(".*.json"):
            path.unlink()
        (again,) = host.entries()
        assert again == entry
        assert host.restore("latest", "--source", "s3").code == 0
        assert contents(host.node) == before

    def test_a_bucket_that_is_down_is_told_and_the_manifest_sent_later(
        self, host: Host, s3: S3Service, versioned_bucket: str
    ) -> None:
        ended = host.run("run_backup", "elasticsearch", aws_endpoint="http://127.0.0.1:1")
        assert ended.code == 7, ended.text
        assert keys(s3, versioned_bucket) == []
        ended = host.good("upload_backups", "elasticsearch")
        assert "1 manifests sent" in ended.out
        assert len(keys(s3, versioned_bucket)) == 1

    def test_what_is_deleted_leaves_the_bucket_too(
        self, host: Host, s3: S3Service, versioned_bucket: str
    ) -> None:
        for _ in range(2):
            host.good("run_backup", "elasticsearch")
        old = min(e["name"] for e in host.entries())
        record = host.records / f".{old}.json"
        aged = record.read_text().replace('"local_date": "20', '"local_date": "19')
        record.write_text(aged.replace('"started_at": "20', '"started_at": "19'))
        host.good("prune_backups", "elasticsearch", "--manual-older-than", "5")
        left = keys(s3, versioned_bucket)
        assert (len(left), f"{PREFIX}{old}.manifest.json" in left) == (1, False)

    def test_no_upload_is_refused_where_there_is_nothing_local(self, host: Host) -> None:
        ended = host.run("run_backup", "elasticsearch", "--no-upload")
        assert (ended.code, "straight to the bucket" in ended.err) == (2, True)

    def test_versions_that_never_go_are_said_with_the_rule_that_lets_them(
        self, host: Host, moto_server: MotoServer
    ) -> None:
        bucket = moto_server.make_bucket(versioned=True)
        try:
            changes = settings_of(moto_server, bucket)
            host.good("run_backup", "elasticsearch", "--type", "daily", **changes)
            check = host.good("check_s3_backups", "elasticsearch", **changes)
            assert f"[WARNING] bucket {bucket} keeps every version for good" in check.out
            assert "NoncurrentVersionExpiration" in check.out
            rule = {
                "ID": "old", "Status": "Enabled", "Filter": {"Prefix": ""},
                "NoncurrentVersionExpiration": {"NoncurrentDays": 7},
            }  # fmt: skip
            moto_server.client().put_bucket_lifecycle_configuration(
                Bucket=bucket, LifecycleConfiguration={"Rules": [rule]}
            )
            check = host.good("check_s3_backups", "elasticsearch", **changes)
            assert "[WARNING]" not in check.out
        finally:
            moto_server.remove_bucket(bucket)
