from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.testbed.s3 import S3Service

SIZE = 256 << 20
PROGRAM = """
import json, pathlib, resource, sys, time
from isal import isal_zlib
from hq_backups.engine.config import S3Config
from hq_backups.engine.repository.s3 import S3Repository
from hq_backups.engine.repository.s3_upload import FollowingUpload

what, path, size, hint = sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
job = json.loads(sys.stdin.read())
repo = S3Repository(S3Config(**job["s3"]), job["bucket"])
repo.probe()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if what == "upload":
    crc = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            crc = isal_zlib.crc32(piece, crc)
    upload = FollowingUpload(repo, "key", path, size_hint=hint, metadata={})
    upload.start()
    upload.advance(size)
    assert upload.finish(size, crc, if_none_match=False).size == size
else:
    buffer = bytearray(1 << 20)
    with repo.open("key", size=size) as reader:
        got, seen = len(reader.read(1)), -1
        while seen != reader._next:  # until it has fetched ahead as far as it will
            seen = reader._next
            time.sleep(0.5)
        while n := reader.readinto(buffer):
            got += n
    assert got == size
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def growth(s3: S3Service, bucket: str, what: str, path: Path, hint: int = SIZE) -> int:
    """Return by how many MiB a process of its own grew."""
    keys = {"access_key": s3.access_key, "secret_key": s3.secret_key, "endpoint": s3.endpoint}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, what, str(path), str(SIZE), str(hint)],
        input=json.dumps({"s3": keys, "bucket": bucket}),
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.slow
def test_memory_depends_neither_on_the_size_nor_on_the_parts(
    s3: S3Service, bucket: str, tmp_path: Path
) -> None:
    path = tmp_path / "artifact"
    with path.open("wb") as file:
        file.truncate(SIZE)
    assert growth(s3, bucket, "upload", path) < 32
    assert growth(s3, bucket, "upload", path, hint=1 << 40) < 32
    assert growth(s3, bucket, "download", path) < 80
