"""Compare with what today's scripts do and with what checks nothing, in one run: ``make bench``.

``python -m benchmarks plain`` compares PostgreSQL's base backups only, ``dump`` dumps with what an operator types by
hand, ``blobs`` the blobs' backups and restores with tar, ``couch`` CouchDB's.

Ratios carry over to other machines, seconds do not. Every contender works on the same server, the same data and
the same S3 server on this machine, alternating; figures are medians.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from benchmarks import programs
from benchmarks.dump import Dumps
from benchmarks.measure import Measured, forget_files, measure, median
from tests.testbed.postgres import PostgresServer
from tests.testbed.process import as_user, give, short_directory
from tests.testbed.s3 import VersityGW

BUCKET = "dimagi-bench-postgres-backups"
MIB = 1 << 20
SERVER_MIB, FILES_MIB = 1600, 4000
"""Large enough that the second which every command takes to start says nothing of its speed."""

DATA = """
CREATE TABLE form_submission AS
SELECT n AS id, 'district-' || n % 40 AS domain, md5(n::text) AS form_id,
  timestamptz '2026-01-01' + n * interval '7 seconds' AS received_on,
  jsonb_build_object('visit', n, 'name', md5((n * 7)::text), 'weight_kg', n % 300 / 10.0, 'muac', n % 23,
    'gps', format('%s %s 0 0', n % 9973 / 100.0, n % 7919 / 100.0), 'danger_signs', n % 17 = 0,
    'notes', repeat(substr(md5((n % 1000)::text), 1, 12) || ' ', 12)) AS body
FROM generate_series(1, {rows}) n;
CREATE INDEX ON form_submission (form_id);
CREATE INDEX ON form_submission (domain, received_on);
CREATE TABLE attachment_meta AS SELECT n AS id, sha256(n::text::bytea) AS digest, n % 9 AS kind
FROM generate_series(1, {rows} / 4) n;
"""
BYTES_PER_ROW = 655


class Bench:
    """One server, one bucket, and the contenders."""

    def __init__(self, home: Path, server: PostgresServer, s3: VersityGW, mode: str = "plain") -> None:
        """Make the directories."""
        self.home, self.server, self.s3, self.mode = home, server, s3, mode
        self.work = home / "work"
        self.work.mkdir(mode=0o755)
        give(self.work, server.os_user)

    def shell(self, *argv: str | Path, stdout: Path | None = None) -> None:
        """Run a program of a script as the server's user."""
        out = stdout.open("wb") if stdout else subprocess.DEVNULL
        subprocess.run(
            [str(a) for a in argv], check=True, stdout=out, cwd="/", **as_user(self.server.os_user)
        )

    def basebackup(self, *arguments: str | Path) -> list[str]:
        """Return the command of a base backup."""
        program = self.server.client_bin_dir / "pg_basebackup"
        where = [
            "-h",
            str(self.server.socket_dir),
            "-p",
            str(self.server.port),
            "-U",
            "postgres",
            "-c",
            "fast",
        ]
        return [str(program), *where, *map(str, arguments)]

    # Backups

    def scripts(self) -> None:
        """Do what CommCare's script does in mode plain: copy the cluster, tar and gzip it, upload."""
        self.shell(*self.basebackup("-D", self.work / "copy", "-Fp", "-X", "stream"))
        self.shell("tar", "-czf", self.work / "copy.tar.gz", self.work / "copy")
        shutil.rmtree(self.work / "copy")
        programs.upload_file(self.s3, self.work / "copy.tar.gz", BUCKET, "scripts.tar.gz")

    def unchecked(self) -> None:
        """Do the fastest that checks nothing: ``pg_basebackup | zstd -1 -T2``, upload."""
        path = self.work / "unchecked.tar.zst"
        dump = subprocess.Popen(
            self.basebackup("-D", "-", "-Ft", "-X", "fetch"),
            stdout=subprocess.PIPE, cwd="/", **as_user(self.server.os_user),
        )  # fmt: skip
        subprocess.run(["zstd", "-q", "-f", "-1", "-T2", "-o", str(path)], stdin=dump.stdout, check=True)
        if dump.wait():
            raise SystemExit("pg_basebackup failed")
        programs.upload_file(self.s3, path, BUCKET, "unchecked.tar.zst")

    def ours(self) -> None:
        """Back up until verified in the bucket."""
        self.hq_backups("run_backup", "postgres", "--type", "daily", "--no-prune")

    # Restores

    def scripts_restore(self) -> None:
        """Do what a restore script would: download, untar."""
        path, tree = self.work / "download.tar.gz", self.work / "tree"
        programs.download_file(self.s3, BUCKET, "scripts.tar.gz", path)
        tree.mkdir()
        subprocess.run(["tar", "-xzf", path, "-C", tree], check=True)

    def ours_restore(self) -> None:
        """Restore from the bucket to a server that answers, everything checked."""
        self.hq_backups(
            "restore_backup", "postgres", "latest", "--source", "s3", "--noinput", "--confirm-env", "bench"
        )

    def hq_backups(self, *arguments: str) -> None:
        """Run a command."""
        server = self.server
        settings = {
            "HQ_BACKUPS_BACKUP_POSTGRES": self.mode,
            "HQ_BACKUPS_POSTGRESQL_BACKUP_DIR": str(self.work / "backups"),
            "HQ_BACKUPS_POSTGRESQL_DATA_DIR": str(server.data_dir),
            "HQ_BACKUPS_POSTGRESQL_BIN_DIR": str(server.bin_dir),
            "HQ_BACKUPS_POSTGRESQL_VERSION": str(server.version),
            "HQ_BACKUPS_POSTGRESQL_HOST": str(server.socket_dir),
            "HQ_BACKUPS_POSTGRESQL_PORT": str(server.port),
            "HQ_BACKUPS_POSTGRES_S3": "true" if self.mode == "plain" else "false",
            "HQ_BACKUPS_POSTGRES_SNAPSHOT_BUCKET": BUCKET,
        }
        programs.hq_backups(self.s3, self.home, settings, *arguments)

    def clean(self) -> None:
        """Remove what a contender left."""
        for path in self.work.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in self.server.data_dir.parent.glob("data.before-*"):
            shutil.rmtree(path)
        os.sync()


class Cleaning(Protocol):
    """A bench that can be used again."""

    def clean(self) -> None:
        """Remove what a contender left."""


def alternate(
    bench: Cleaning,
    contenders: dict[str, Callable[[], None]],
    rounds: int,
    watched: Path,
    prepare: Callable[[], None] = lambda: None,
    forget: Callable[[], None] = lambda: None,
) -> dict[str, Measured]:
    """Run the contenders in turns."""
    runs: dict[str, list[Measured]] = {name: [] for name in contenders}
    for turn in range(rounds):
        for name, work in contenders.items():
            bench.clean()
            prepare()
            forget()
            runs[name].append(measure(work, watched))
            print(f"  round {turn + 1}  {name:32s} {runs[name][-1].seconds:6.1f} s", flush=True)
    bench.clean()
    return {name: median(each) for name, each in runs.items()}


def table(
    title: str, results: dict[str, Measured], size: int, stored: Mapping[str, int] | None = None
) -> None:
    """Print one table, ratios against its first row; ``stored`` is how many bytes each has made of ``size``."""
    first = next(iter(results.values()))
    last = "" if stored is None else f"{'stored MB':>11s}"
    print(f"\n{title}\n{'':34s}{'s':>7s}{'MB/s':>7s}{'ratio':>7s}{'RSS MiB':>9s}{'disk MiB':>10s}{last}")
    for name, m in results.items():
        last = "" if stored is None else f"{stored[name] / 1e6:11.0f}"
        print(
            f"{name:34s}{m.seconds:7.1f}{size / m.seconds / 1e6:7.0f}{first.seconds / m.seconds:7.2f}"
            f"{m.peak_rss / MIB:9.0f}{m.peak_disk / MIB:10.0f}{last}"
        )


def measure_plain(bench: Bench, size: int, rounds: int) -> None:
    """Measure base backups, to the bucket and back."""
    backups = alternate(
        bench,
        {
            "scripts": bench.scripts,
            "pg_basebackup | zstd, unchecked": bench.unchecked,
            "hq_backups": bench.ours,
        },
        rounds,
        bench.work,
    )
    client = bench.s3.client()
    objects = {o["Key"]: o["Size"] for o in client.list_objects_v2(Bucket=BUCKET)["Contents"]}
    stored = {
        "scripts": objects["scripts.tar.gz"],
        "pg_basebackup | zstd, unchecked": objects["unchecked.tar.zst"],
        "hq_backups": max(size for key, size in objects.items() if key.startswith("postgres_")),
    }
    table("Backup, until it lies in the bucket", backups, size, stored)
    restores = alternate(
        bench,
        {
            "scripts (download, untar)": bench.scripts_restore,
            "hq_backups (serving, checked)": bench.ours_restore,
        },
        rounds,
        bench.home / "pg",
    )
    table("Restore from the bucket", restores, size)


def measure_dump(bench: Bench, size: int, rounds: int) -> None:
    """Measure dumps, to the disk and back."""
    dumps = Dumps(bench)
    backups = alternate(
        bench, {"pg_dumpall | zstd -1": dumps.by_hand, "hq_backups": dumps.ours}, rounds, bench.work
    )
    table("Dump, until it lies on the disk", backups, size)
    dumps.keep_file()
    restores = alternate(
        bench,
        {"gunzip | psql": dumps.load_by_hand, "hq_backups (serving, checked)": dumps.restore},
        rounds,
        bench.home / "pg",
        dumps.put_file,
    )
    table("Restore of a dump", restores, size)


def measure_server(home: Path, mode: str, options: argparse.Namespace) -> None:
    """Measure PostgreSQL in one mode, its data in the page cache."""
    for name in ("pg", "s3"):
        (home / name).mkdir(mode=0o755)
    server = PostgresServer(options.version, home / "pg")
    give(home / "pg", server.os_user)
    with server, VersityGW(home / "s3") as s3:
        s3.make_bucket(BUCKET, versioned=False)
        server.psql("CREATE DATABASE commcarehq")
        rows = (options.mib or SERVER_MIB) * MIB // BYTES_PER_ROW
        server.psql(DATA.format(rows=rows), dbname="commcarehq")
        server.psql("VACUUM ANALYZE", dbname="commcarehq")
        server.psql("CHECKPOINT")
        size = int(server.psql("SELECT sum(pg_database_size(oid)) FROM pg_database"))
        print(
            f"PostgreSQL {options.version}, {mode}, {size / 1e6:.0f} MB, in page cache; versitygw on loopback"
        )
        bench = Bench(home, server, s3, mode)
        (measure_dump if mode == "dump" else measure_plain)(bench, size, options.rounds)


def measure_files(home: Path, mode: str, options: argparse.Namespace) -> None:
    """Measure one of the file stores."""
    from benchmarks.blobs import measure_blobs
    from benchmarks.couch import measure_couch

    warm = options.warm or not forget_files()
    mib = options.mib or FILES_MIB
    print(f"{mode}, {'in page cache' if warm else 'page cache emptied unless said'}; versitygw on loopback")
    (measure_blobs if mode == "blobs" else measure_couch)(home, mib, options.rounds, warm)


MODES = {"plain": measure_server, "dump": measure_server, "blobs": measure_files, "couch": measure_files}


def main() -> None:
    """Measure every store, or one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mode", nargs="?", choices=("all", *MODES), default="all")
    parser.add_argument(
        "--mib",
        type=int,
        help=f"size of the data (default: {SERVER_MIB} of PostgreSQL, {FILES_MIB} of files; twice as much of files that"
        " compress)",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--warm",
        action="store_true",
        help="file stores: nothing is read from the disk, only from the page cache",
    )
    parser.add_argument("--version", type=int, default=15)
    options = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}")
    for mode in MODES if options.mode == "all" else (options.mode,):
        with short_directory() as home:
            home.chmod(0o755)
            MODES[mode](home, mode, options)
    print("\nRESULT ok run=bench exit=0")


if __name__ == "__main__":
    main()
