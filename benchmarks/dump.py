"""Mode dump against what an operator types by hand: ``pg_dumpall | zstd -1``, and ``gunzip | psql`` back."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from tests.testbed.postgres import PostgresServer
from tests.testbed.process import as_user, give

if TYPE_CHECKING:
    from benchmarks.__main__ import Bench


class Dumps:
    """The contenders of mode dump, on a bench that is set to that mode."""

    def __init__(self, bench: Bench) -> None:
        """Keep nothing but the bench."""
        self.bench = bench
        self.server = bench.server
        self.by_hand_file = bench.home / "by-hand.gz"

    def by_hand(self) -> None:
        """Do ``pg_dumpall | zstd -1``, which checks nothing."""
        server, path = self.server, self.bench.work / "by-hand.zst"
        argv = [server.client_bin_dir / "pg_dumpall", "-h", server.socket_dir, "-p", str(server.port)]
        dump = subprocess.Popen(
            [*argv, "-U", "postgres"], stdout=subprocess.PIPE, cwd="/", **as_user(server.os_user)
        )
        subprocess.run(["zstd", "-q", "-f", "-1", "-o", str(path)], stdin=dump.stdout, check=True)
        if dump.wait():
            raise SystemExit("pg_dumpall failed")

    def ours(self) -> None:
        """Back up until it was read back from disk."""
        self.bench.hq_backups("run_backup", "postgres", "--type", "daily", "--no-prune", "--no-upload")

    # Restores

    def keep_file(self) -> None:
        """Keep one artifact of ours for both to restore."""
        self.ours()
        (made,) = (self.bench.work / "backups").glob("postgres_*.gz")
        shutil.copy2(made, self.by_hand_file)
        shutil.copy2(made.with_name(f".{made.name}.json"), self.bench.home / "by-hand.json")
        self.name = made.name
        self.bench.clean()

    def put_file(self) -> None:
        """Lay the artifact where a restore looks for it."""
        backups = self.bench.work / "backups"
        backups.mkdir(mode=0o700, exist_ok=True)
        shutil.copy2(self.by_hand_file, backups / self.name)
        shutil.copy2(self.bench.home / "by-hand.json", backups / f".{self.name}.json")
        for path in (backups, *backups.iterdir()):
            give(path, self.server.os_user)

    def load_by_hand(self) -> None:
        """Do ``gunzip | psql`` into a fresh cluster, which is made here too: a restore needs one."""
        place = self.bench.work / "fresh"
        with PostgresServer(self.server.version, place) as fresh:
            gunzip = subprocess.Popen(["gunzip", "-c", self.by_hand_file], stdout=subprocess.PIPE)
            argv: list[str | Path] = [fresh.client_bin_dir / "psql", "-X", "-q", "-h", fresh.socket_dir]
            subprocess.run(
                [*argv, "-p", str(fresh.port), "-U", "postgres", "-d", "postgres"],
                stdin=gunzip.stdout,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                check=True,
            )
            if gunzip.wait():
                raise SystemExit("gunzip failed")

    def restore(self) -> None:
        """Restore to a server that answers, everything checked."""
        self.bench.hq_backups("restore_backup", "postgres", "latest", "--noinput", "--confirm-env", "bench")
