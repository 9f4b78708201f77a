"""BlobDB against what today's scripts do, ``tar -czf`` and an upload, and against tar alone."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from benchmarks import programs
from benchmarks.__main__ import MIB, alternate, table
from benchmarks.measure import forget_files, take_memory_back
from tests.testbed.s3 import VersityGW

BUCKET = "dimagi-bench-blobdb-backups"
DIRECTORIES = 64
POOL = 32 * MIB
SMALL_PER_MIB = 250
"""A million of them beside the 4000 MiB that are the default."""


def make_blobs(root: Path, mib: int, *, compressible: bool, seed: int = 7) -> int:
    """Write blobs like HQ's: forms as JSON, attachments that are compressed already, many small ones."""
    dice = random.Random(seed)
    total, number = 0, 0
    # gzip looks back 32 KiB: what comes again after megabytes is as good as new to it.
    pool = forms(dice, POOL) if compressible else b""
    while total < mib * MIB:
        number += 1
        kind = number % 10
        size = dice.randint(500, 6000) if kind < 8 else dice.randint(20_000, 400_000)
        begin = dice.randrange(POOL - size)
        content = pool[begin : begin + size] if compressible else dice.randbytes(size)
        put_blob(root, number, dice, content)
        total += size
    return sum(p.stat().st_size for p in root.rglob("*") if p.is_file())


def make_small_blobs(root: Path, count: int, seed: int = 7) -> int:
    """Write so many blobs of 0.5 to 6 KB that compress; return their bytes."""
    dice = random.Random(seed)
    pool = forms(dice, POOL)
    total = 0
    for number in range(count):
        size = dice.randint(500, 6000)
        begin = dice.randrange(POOL - size)
        put_blob(root, number, dice, pool[begin : begin + size])
        total += size
    return total


def put_blob(root: Path, number: int, dice: random.Random, content: bytes) -> None:
    """Write one blob, under a name that tells nothing, into one of the directories in turn."""
    directory = root / f"{number % DIRECTORIES:02x}"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{dice.getrandbits(128):032x}").write_bytes(content)


def forms(dice: random.Random, size: int) -> bytes:
    """Return so many bytes of forms as JSON."""
    lines, length = [], 0
    while length < size:
        visit = dice.getrandbits(20)
        lines.append(
            json.dumps(
                {
                    "doc_type": "XFormInstance", "xmlns": "http://openrosa.org/formdesigner/visit", "visit": visit,
                    "domain": f"district-{visit % 40}", "form_id": f"{dice.getrandbits(64):016x}",
                    "weight_kg": visit % 300 / 10, "muac": visit % 23, "danger_signs": visit % 17 == 0,
                    "location": f"{visit % 9973 / 100} {visit % 7919 / 100} 0 0",
                    "notes": "child is well, next visit in two weeks; " * (visit % 3),
                },
                indent=1,
            )
        )  # fmt: skip
        length += len(lines[-1])
    return "\n".join(lines).encode()[:size]


class Blobs:
    """One blob directory, one bucket, and the contenders."""

    store = "blobdb"
    bucket = BUCKET

    def __init__(self, home: Path, s3: VersityGW, data: Path, warm: bool) -> None:
        """Make the directories."""
        self.home, self.s3, self.data, self.warm = home, s3, data, warm
        self.work = home / "work"
        self.work.mkdir(exist_ok=True)
        self.kept = home / "kept"

    # Backups

    def scripts(self) -> None:
        """Do what CommCare's script does: tar and gzip, upload."""
        subprocess.run(["tar", "-Pczf", self.work / "scripts.tar.gz", self.data], check=True)
        programs.upload_file(self.s3, self.work / "scripts.tar.gz", self.bucket, "scripts.tar.gz")

    def ours(self) -> None:
        """Back up until verified in the bucket."""
        self.hq_backups("run_backup", self.store, "--type", "daily", "--no-prune")

    def tar_alone(self) -> None:
        """Do ``tar -cf - | cat > file``, and bring it to the disk."""
        with (self.work / "alone.tar").open("wb") as out:
            self.tar_into(out)
            os.fsync(out.fileno())

    def tar_and_igzip(self) -> None:
        """Do ``tar -cf - | igzip -1 > file``, and bring it to the disk."""
        with (self.work / "alone.tar.gz").open("wb") as out:
            self.tar_into(out, sys.executable, "-m", "isal.igzip", "-1")
            os.fsync(out.fileno())

    def ours_alone(self) -> None:
        """Back up until it was read back from disk."""
        self.hq_backups("run_backup", self.store, "--type", "daily", "--no-prune", "--no-upload")

    # Comparisons

    def compare_uploads(self, what: str, size: int, rounds: int) -> None:
        """Compare backups of something with the scripts', until they lie in the bucket."""
        self._compare(
            f"Backup of {what}, until it lies in the bucket",
            {"scripts": self.scripts, "hq_backups": self.ours},
            size,
            rounds,
        )

    def compare_small(self, size: int, rounds: int) -> None:
        """Compare backups of many small files with tar and a compressor as fast as ours, until they lie on the disk."""
        self._compare(
            "Backup of many small blobs, until it lies on the disk",
            {"tar -cf - | igzip -1": self.tar_and_igzip, "hq_backups": self.ours_alone},
            size,
            rounds,
        )

    def compare_writes(self, size: int, rounds: int) -> None:
        """Compare backups with tar alone, until they lie on the disk."""
        contenders = {"tar -cf - | cat": self.tar_alone, "hq_backups": self.ours_alone}
        self._backups("Backup of what does not compress, until it lies on the disk", contenders, size, rounds)

    def _compare(self, title: str, contenders: dict[str, Callable[[], None]], size: int, rounds: int) -> None:
        """Compare with the data in the page cache, as PostgreSQL's are here, and, unless all is so, from the disk."""
        only_warm = self.warm
        for warm in (True,) if only_warm else (True, False):
            self.warm = warm
            source = "in the page cache" if warm else "read from the disk"
            self._backups(f"{title} ({source})", contenders, size, rounds)
        self.warm = only_warm

    def _backups(self, title: str, contenders: dict[str, Callable[[], None]], size: int, rounds: int) -> None:
        found = alternate(self, contenders, rounds, self.work, self.read_once, forget=self.forget)
        self.drop_archives()
        table(title, found, size)

    def drop_archives(self) -> None:
        """Delete what backups have left, here and in the bucket: a few large files, which nobody pays for later."""
        shutil.rmtree(self.home / "trash")
        self.s3.remove_bucket(self.bucket)
        self.s3.make_bucket(self.bucket)

    def compare_restores(self, title: str, size: int, rounds: int) -> None:
        """Compare restores with tar's."""
        self.keep_archives()
        contenders = {"tar -xzf": self.scripts_restore, "hq_backups (checked)": self.ours_restore}
        found = alternate(self, contenders, rounds, self.work, self.put_archives, forget=self.forget)
        table(title, found, size)

    # Restores

    def keep_archives(self) -> None:
        """Keep one archive of each for the restores."""
        shutil.rmtree(self.kept, ignore_errors=True)
        self.kept.mkdir()
        subprocess.run(["tar", "-czf", self.kept / "scripts.tar.gz", "-C", self.data, "."], check=True)
        self.ours_alone()
        shutil.copytree(self.work / "backups", self.kept / "backups")
        self.clean()

    def put_archives(self) -> None:
        """Lay our archive where a restore looks for it."""
        shutil.copytree(self.kept / "backups", self.work / "backups")
        os.sync()

    def scripts_restore(self) -> None:
        """Do ``tar -xzf``, and bring it to the disk."""
        tree = self.work / "tree"
        tree.mkdir()
        subprocess.run(["tar", "-xzf", self.kept / "scripts.tar.gz", "-C", tree], check=True)
        os.sync()

    def ours_restore(self) -> None:
        """Restore, everything checked and on the disk."""
        words = ["restore_backup", self.store, "latest", *self.beside()]
        self.hq_backups(*words, "--noinput", "--confirm-env", "bench")

    def beside(self) -> Sequence[str]:
        """Return how a restore is told to leave alone what is there."""
        return ()

    def settings(self) -> dict[str, str]:
        """Return this store's settings as the environment holds them."""
        return {
            "HQ_BACKUPS_BACKUP_BLOBDB": "true",
            "HQ_BACKUPS_BLOBDB_S3": "true",
            "HQ_BACKUPS_BLOBDB_DIR_PATH": str(self.data),
            "HQ_BACKUPS_BLOBDB_BACKUP_DIR": str(self.work / "backups"),
            "HQ_BACKUPS_BLOBDB_BACKUP_OS_USER": "root" if os.geteuid() == 0 else "",
            "HQ_BACKUPS_BLOBDB_RESTORE_OWNER": str(os.geteuid()),
            "HQ_BACKUPS_BLOBDB_SNAPSHOT_BUCKET": BUCKET,
        }

    def hq_backups(self, *arguments: str) -> None:
        """Run a command."""
        settings = {"HQ_BACKUPS_BACKUP_POSTGRES": "false", **self.settings()}
        programs.hq_backups(self.s3, self.home, settings, *arguments)

    def read_once(self) -> None:
        """Have everything in the page cache, where it is to be warm: some machines page out what is not used."""
        if self.warm:
            self.tar_into(subprocess.DEVNULL)

    def tar_into(self, out: int | IO[bytes], *pipe: str) -> None:
        """Do ``tar -cf - | cat``, or with another program than ``cat``."""
        tar = subprocess.Popen(["tar", "-cf", "-", "-C", self.data, "."], stdout=subprocess.PIPE)
        subprocess.run(pipe or ["cat"], stdin=tar.stdout, stdout=out, check=True)
        if tar.wait():
            raise SystemExit("tar failed")

    def forget(self) -> None:
        """Empty the page cache of what is read, and bring the programs back into it, as a server has them."""
        take_memory_back()
        if not self.warm and forget_files():
            self.hq_backups("run_backup", self.store, "--dry-run")
            if any((self.work / "backups").glob("*.tar.gz")):
                self.hq_backups("restore_backup", self.store, "latest", *self.beside(), "--dry-run")
            for program in ("tar", "gzip"):
                subprocess.run([program, "--version"], stdout=subprocess.DEVNULL, check=True)

    def clean(self) -> None:
        """Move away what a contender left.

        Not deleted before the end: ext4 passes over the inodes of files that were just deleted, one by one, and
        whoever makes files next would pay for it.
        """
        trash = self.home / "trash"
        trash.mkdir(exist_ok=True)
        left = [*self.work.iterdir(), *self.data.parent.glob(f"{self.data.name}.before-*")]
        for path in left:
            path.rename(trash / f"{len(os.listdir(trash))}")
        os.sync()


def measure_blobs(home: Path, mib: int, rounds: int, warm: bool) -> None:
    """Measure all comparisons."""
    (home / "s3").mkdir()
    with VersityGW(home / "s3") as s3:
        s3.make_bucket(BUCKET, versioned=False)
        forms, attachments = home / "forms", home / "attachments"
        # A backup's speed is that of stores much larger than what it does in the second that it takes to start.
        size = make_blobs(forms, 2 * mib, compressible=True)
        Blobs(home, s3, forms, warm).compare_uploads("what compresses", size, rounds)
        small = home / "small"
        size = make_small_blobs(small, SMALL_PER_MIB * mib)
        Blobs(home, s3, small, warm).compare_small(size, rounds)
        size = make_blobs(attachments, mib, compressible=False)
        bench = Blobs(home, s3, attachments, warm)
        bench.compare_writes(size, rounds)
        # Both together, as much of each: what a blob directory of HQ's has.
        for path in sorted(forms.iterdir())[::2]:
            path.rename(attachments / f"forms-{path.name}")
        size = sum(p.stat().st_size for p in attachments.rglob("*") if p.is_file())
        bench.compare_uploads("both kinds", size, rounds)
        bench.compare_restores("Restore of both kinds", size, rounds)
