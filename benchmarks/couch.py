"""CouchDB against what today's scripts do, ``tar -czf`` and an upload, and against tar alone.

The files are database files with documents like HQ's forms in them, many copies of a few; no node runs. A restore is
measured into a directory, for how long a node takes to start and to open its databases is the node's affair.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path

from benchmarks.__main__ import MIB
from benchmarks.blobs import Blobs, forms
from tests.testbed.couch_data import make_data_dir
from tests.testbed.s3 import VersityGW

BUCKET = "dimagi-bench-couch-backups"
DOCUMENTS, DOCUMENT = 1500, 4000
BLOCK = 4096
"""Headers stand where such a block begins, whose first byte is then 1 (couch_file.erl)."""


def make_databases(root: Path, mib: int, *, compressible: bool, seed: int = 7) -> int:
    """Write a data directory; return the bytes of its files."""
    dice = random.Random(seed)
    documents = [{"_id": f"form-{n:08x}", "form": forms(dice, DOCUMENT).decode()} for n in range(DOCUMENTS)]
    make_data_dir(root, {"db-0": documents})
    first = {path.relative_to(root): path.read_bytes() for path in root.glob("shards/*/db-0.*")}
    size = sum(map(len, first.values()))
    names = [f"db-{n}" for n in range(max(1, mib * MIB // size))]
    make_data_dir(root, {name: [] for name in names})
    for path, content in first.items():
        filling = content if compressible else content[:MIB] + dice.randbytes(len(content) - MIB)
        for name in names:
            made = root / path.with_name(path.name.replace("db-0", name))
            made.write_bytes(filling if compressible else grown(made.read_bytes(), filling))
    return sum(path.stat().st_size for path in root.rglob("*.couch"))


def grown(content: bytes, filling: bytes) -> bytes:
    """Return a database's file that wrote so much more, and then the same header once more: its offsets hold."""
    last = max(at for at in range(0, len(content), BLOCK) if content[at] == 1)
    grown_to = content + filling
    return grown_to + bytes(-len(grown_to) % BLOCK) + content[last:]


class Couch(Blobs):
    """One data directory, one bucket, and the contenders."""

    store = "couch"
    bucket = BUCKET

    def beside(self) -> Sequence[str]:
        """Have it unpacked only: no node runs here."""
        return ("--target-dir", str(self.work / "tree"))

    def settings(self) -> dict[str, str]:
        """Return this store's settings as the environment holds them."""
        return {
            "HQ_BACKUPS_BACKUP_COUCH": "true",
            "HQ_BACKUPS_COUCH_S3": "true",
            "HQ_BACKUPS_COUCH_DATA_DIR": str(self.data),
            "HQ_BACKUPS_COUCH_BACKUP_DIR": str(self.work / "backups"),
            "HQ_BACKUPS_COUCHDB_BACKUP_OS_USER": "root" if os.geteuid() == 0 else "",
            "HQ_BACKUPS_COUCHDB_URL": "http://127.0.0.1:9",
            "HQ_BACKUPS_COUCHDB_SNAPSHOT_BUCKET": BUCKET,
        }


def measure_couch(home: Path, mib: int, rounds: int, warm: bool) -> None:
    """Measure all comparisons."""
    (home / "s3").mkdir()
    with VersityGW(home / "s3") as s3:
        s3.make_bucket(BUCKET, versioned=False)
        packs = home / "packs"
        size = make_databases(packs, 2 * mib, compressible=True)
        bench = Couch(home, s3, packs, warm)
        bench.compare_uploads("what compresses", size, rounds)
        bench.compare_restores("Restore into a directory", size, rounds)
        random_ = home / "random"
        size = make_databases(random_, 2 * mib, compressible=False)
        Couch(home, s3, random_, warm).compare_writes(size, rounds)
