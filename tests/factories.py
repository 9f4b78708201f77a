"""Small made-up things that many tests need."""

from __future__ import annotations

import hashlib
import zlib
from pathlib import Path
from typing import Any

from hq_backups.engine.manifest import Manifest


def manifest(
    name: str = "postgres_prod_daily_2026_11_22.tar.gz", content: bytes = b"content", **changes: Any
) -> Manifest:
    """Return the manifest of an artifact with ``content``."""
    sha = hashlib.sha256(content).hexdigest()
    facts: dict[str, Any] = {
        "store": "postgres",
        "mode": "plain",
        "type": "daily",
        "env": "prod",
        "host": "pg0",
        "run": "20261122T000002Z-pg0-postgres",
        "started_at": "2026-11-22T00:00:02Z",
        "finished_at": "2026-11-22T00:10:02Z",
        "local_date": "2026-11-22",
        "name": name,
        "size": len(content),
        "sha256": sha,
        "crc32": f"{zlib.crc32(content):08x}",
        "plain_size": len(content),
        "plain_sha256": sha,
        "codec": "none",
        "source": {"version_num": 150018, "system_identifier": "1"},
    }
    return Manifest(**{**facts, **changes})


def scheduled_blobs(directory: Path) -> dict[str, Any]:
    """Return the settings of host ``here``, which backs up blobs below a directory and nothing else."""
    (directory / "blobs").mkdir()
    return {
        "backup_postgres": False,
        "backup_blobdb": True,
        "blobdb_dir_path": str(directory / "blobs"),
        "backup_host_name": "here",
        "timezone": "UTC",
    }
