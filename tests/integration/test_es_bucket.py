"""Manifests of snapshots in a real bucket, and clusters behind TLS.

The test servers have no S3 plugin: the repository itself is a directory here, whatever else is as with a bucket.
"""

from __future__ import annotations

import datetime
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from hq_backups.engine.elasticsearch.client import Address, Cluster
from hq_backups.engine.elasticsearch.repository import Wanted
from hq_backups.engine.errors import ServiceError
from hq_backups.engine.stores.elasticsearch import Elasticsearch
from tests.integration.es_helpers import Host, contents, fill, host_of
from tests.testbed.elasticsearch import ElasticsearchNode
from tests.testbed.process import LOOPBACK
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


class _Greeting(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        raw = b'{"cluster_name": "behind-tls", "version": {"number": "6.8.23"}}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, format: str, *args: Any) -> None:
        return


@pytest.fixture
def behind_tls(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Serve over TLS with a certificate of its own; return address and certificate."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    certificate = tmp_path / "ca.pem"
    certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private = tmp_path / "key.pem"
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, private)
    server = ThreadingHTTPServer((LOOPBACK, 0), _Greeting)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"https://localhost:{server.server_address[1]}", certificate
    server.shutdown()
    server.server_close()
    thread.join()


class TestTLS:
    def test_a_named_authority_is_trusted(self, behind_tls: tuple[str, Path]) -> None:
        url, certificate = behind_tls
        cluster = Cluster(Address((url,), ca_file=str(certificate)))
        assert cluster.about["cluster_name"] == "behind-tls"

    def test_an_unknown_one_is_not_and_the_setting_is_named(self, behind_tls: tuple[str, Path]) -> None:
        url, _ = behind_tls
        with pytest.raises(ServiceError, match="elasticsearch_ca_file"):
            _ = Cluster(Address((url,))).about

    def test_a_missing_file_is_said(self, behind_tls: tuple[str, Path]) -> None:
        url, _ = behind_tls
        with pytest.raises(ServiceError, match="no-such-file"):
            _ = Cluster(Address((url,), ca_file="/no-such-file.pem")).about

    def test_plain_http_asked_for_tls_is_said(self) -> None:
        server = ThreadingHTTPServer((LOOPBACK, 0), _Greeting)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            with pytest.raises(ServiceError, match="http://"):
                _ = Cluster(Address((f"https://{LOOPBACK}:{server.server_address[1]}",))).about
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
