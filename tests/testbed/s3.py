"""Run S3 services: a strict one over a directory, and a lenient one in memory."""

from __future__ import annotations

import secrets
import socket
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from tests.testbed.places import tool
from tests.testbed.process import LOOPBACK, ChildService, listening

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

REGION = "us-east-1"


class S3Service(ChildService):
    """What both services have in common."""

    access_key = "hq-backups-test"
    secret_key = "hq-backups-test-secret"

    @property
    def endpoint(self) -> str:
        """Return the base address."""
        return f"http://{LOOPBACK}:{self.port}"

    def client(self, *, endpoint: str | None = None, **config: Any) -> Any:
        """Return a boto3 client: path-style addresses, checksums only where required."""
        import boto3
        from botocore.config import Config

        options: dict[str, Any] = {
            "s3": {"addressing_style": "path"},
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
            "retries": {"total_max_attempts": 2, "mode": "standard"},
            **config,
        }
        return boto3.client(
            "s3",
            endpoint_url=endpoint or self.endpoint,
            region_name=REGION,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=Config(**options),
        )

    def make_bucket(self, name: str | None = None, *, versioned: bool = False) -> str:
        """Make a bucket, under a fresh name unless one is given, and return its name."""
        name = name or f"hqb-{secrets.token_hex(6)}"
        client = self.client()
        client.create_bucket(Bucket=name)
        if versioned:
            client.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})
        return name

    def remove_bucket(self, name: str) -> None:
        """Delete a bucket with all versions and unfinished uploads in it, if it is there."""
        client = self.client()
        if name not in [found["Name"] for found in client.list_buckets()["Buckets"]]:
            return
        for page in client.get_paginator("list_multipart_uploads").paginate(Bucket=name):
            for upload in page.get("Uploads", ()):
                client.abort_multipart_upload(Bucket=name, Key=upload["Key"], UploadId=upload["UploadId"])
        versioned = client.get_bucket_versioning(Bucket=name).get("Status")
        if versioned:
            for page in client.get_paginator("list_object_versions").paginate(Bucket=name):
                for item in [*page.get("Versions", ()), *page.get("DeleteMarkers", ())]:
                    client.delete_object(Bucket=name, Key=item["Key"], VersionId=item["VersionId"])
        else:
            for page in client.get_paginator("list_objects_v2").paginate(Bucket=name):
                for item in page.get("Contents", ()):
                    client.delete_object(Bucket=name, Key=item["Key"])
        client.delete_bucket(Bucket=name)

    def ready(self) -> bool:
        """Tell whether signed requests are answered."""
        return listening(self.port) and "Buckets" in self.client().list_buckets()


class VersityGW(S3Service):
    """A real S3 server over a directory of its own; checks signatures and checksums."""

    name = "versitygw"

    def __init__(self, workdir: Path, *, versioning: bool = True) -> None:
        """Describe a server whose data lie in the work directory."""
        super().__init__(workdir)
        self.data = workdir / "data"
        self.versions = workdir / "versions"
        self.versioning = versioning

    @staticmethod
    def unavailable() -> str:
        """Say why it cannot be started here; empty when it can."""
        return "" if tool("versitygw") else "versitygw is not on this machine (make testbed)"

    def argv(self) -> Sequence[str | Path]:
        """Return the command."""
        self.data.mkdir(parents=True, exist_ok=True)
        versioning: list[str | Path] = []
        if self.versioning:
            self.versions.mkdir(exist_ok=True)
            versioning = ["--versioning-dir", self.versions]
        program = tool("versitygw") or "versitygw"
        return [program, "--quiet", "--port", f"{LOOPBACK}:{self.port}", "posix", *versioning, self.data]

    def environment(self) -> Mapping[str, str]:
        """Return an environment with the keys, which are never arguments."""
        keys = {"ROOT_ACCESS_KEY": self.access_key, "ROOT_SECRET_KEY": self.secret_key, "VGW_REGION": REGION}
        return {**super().environment(), **keys}


class MotoServer(S3Service):
    """An in-memory AWS look-alike; does not check signatures."""

    name = "moto"

    @staticmethod
    def unavailable() -> str:
        """Say why it cannot be started here; empty when it can."""
        return "" if find_spec("moto") and find_spec("flask") else "moto's server is not installed"

    def argv(self) -> Sequence[str | Path]:
        """Return the command."""
        return [sys.executable, "-m", "moto.server", "--host", LOOPBACK, "--port", str(self.port)]


def refused_endpoint() -> str:
    """Return an address on which nothing listens."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return f"http://{LOOPBACK}:{probe.getsockname()[1]}"
