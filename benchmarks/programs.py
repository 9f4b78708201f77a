"""Programs that contenders run: ours, and the upload of the scripts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.testbed.s3 import VersityGW


def hq_backups(s3: VersityGW, home: Path, settings: Mapping[str, str], *arguments: str) -> None:
    """Run a command of ours; ``settings`` are a store's, as the environment holds them."""
    environment = {
        **os.environ,
        "HQ_BACKUPS_DEPLOY_ENV": "bench",
        "HQ_BACKUPS_AMAZON_S3_ACCESS_KEY": s3.access_key,
        "HQ_BACKUPS_AMAZON_S3_SECRET_KEY": s3.secret_key,
        "HQ_BACKUPS_AWS_ENDPOINT": s3.endpoint,
        "HQ_BACKUPS_BACKUP_STATE_DIR": str(home / "state"),
        **settings,
    }
    done = subprocess.run(
        [sys.executable, "-m", "hq_backups.standalone", *arguments],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)


def upload_file(s3: VersityGW, path: Path, bucket: str, key: str) -> None:
    """Upload as the scripts do, in a process of its own: ``upload_file`` and nothing compared."""
    _script(
        s3,
        "import sys, boto3; from botocore.config import Config;"
        "boto3.client('s3', endpoint_url=sys.argv[1], region_name='us-east-1',"
        "config=Config(s3={'addressing_style': 'path'}, request_checksum_calculation='when_required'))"
        ".upload_file(sys.argv[2], sys.argv[3], sys.argv[4])",
        s3.endpoint, str(path), bucket, key,
    )  # fmt: skip


def download_file(s3: VersityGW, bucket: str, key: str, path: Path) -> None:
    """Download as the scripts do."""
    _script(
        s3,
        "import sys, boto3; from botocore.config import Config;"
        "boto3.client('s3', endpoint_url=sys.argv[1], region_name='us-east-1',"
        "config=Config(s3={'addressing_style': 'path'})).download_file(sys.argv[3], sys.argv[4], sys.argv[2])",
        s3.endpoint, str(path), bucket, key,
    )  # fmt: skip


def _script(s3: VersityGW, code: str, *arguments: str) -> None:
    keys = {"AWS_ACCESS_KEY_ID": s3.access_key, "AWS_SECRET_ACCESS_KEY": s3.secret_key}
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, env={**os.environ, **keys})
