"""What a store must offer to be attacked, and PostgreSQL in its modes as the first victims.

The attacks know only :class:`Victim`; another store is another subclass.
"""

from __future__ import annotations

import itertools
import json
import os
import secrets
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from hq_backups.engine import names
from hq_backups.engine.config import Config, Job, Retention, S3Config, StoreConfig, to_plain
from hq_backups.engine.entry import run_job
from hq_backups.engine.events import utc_now
from hq_backups.engine.requests import (
    BackupRequest,
    CatalogRequest,
    PruneRequest,
    RestoreRequest,
    Selection,
    UndoRequest,
    UploadRequest,
    VerifyRequest,
)
from tests.faults.engine_process import Engine, Outcome
from tests.testbed.postgres import PostgresServer
from tests.testbed.process import give, wait_until
from tests.testbed.s3 import REGION, S3Service

ENV = "prod"
HOST = "pg0"
_NUMBERS = itertools.count(1)


class Victim(ABC):
    """One store of one host with its backup directory and, when it was given one, its bucket."""

    store: str

    def __init__(self, home: Path, user: str | None, **settings: Any) -> None:
        self.home = home
        self.user = user
        self.settings = settings
        self.backups = home / f"backups-{secrets.token_hex(3)}"
        self.tmp = home / "tmp"
        for directory in (self.backups, self.tmp):
            directory.mkdir(mode=0o700, exist_ok=True)
            give(directory, user)
        self.s3: S3Service | None = None
        self.bucket: str | None = None
        self.endpoint: str | None = None

    # What each store does in its own way.

    @abstractmethod
    def make_data(self, megabytes: int) -> None:
        """Add so many megabytes that do not compress."""

    @abstractmethod
    def change_data(self) -> None:
        """Change something that the fingerprint sees."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a digest of the data that are served now."""

    @abstractmethod
    def is_serving(self) -> bool:
        """Tell whether the store answers."""

    @abstractmethod
    def store_config(self) -> StoreConfig:
        """Return the store's settings, without directory and bucket."""

    @abstractmethod
    def leftovers(self) -> list[str]:
        """Return what a run has left in the store or among the processes."""

    # What is the same for all.

    def use_bucket(self, s3: S3Service, bucket: str, endpoint: str | None = None) -> None:
        self.s3, self.bucket, self.endpoint = s3, bucket, endpoint or s3.endpoint

    def config(self, **changes: Any) -> Config:
        s3 = None
        if self.s3 is not None:
            s3 = S3Config(self.s3.access_key, self.s3.secret_key, self.endpoint, REGION)
        changes = {**self.settings, **changes}
        s3_changes = changes.pop("s3", {})
        store_changes = changes.pop("store", {})
        where = {"backup_dir": self.backups, "s3": s3 is not None, "bucket": self.bucket, **store_changes}
        store = replace(self.store_config(), **where)
        config = Config(ENV, HOST, "UTC", "none", 1, s3 and replace(s3, **s3_changes), {self.store: store})
        return replace(config, **changes)

    def job(self, verb: str, request: Any, **changes: Any) -> Job:
        return Job(verb, self.config(**changes), to_plain(request))

    def backup(self, type_: str = "daily", *, changes: Mapping[str, Any] | None = None, **asked: Any) -> Job:
        return self.job("backup", BackupRequest(self.store, type_, **asked), **(changes or {}))

    def verify(self, name: str = "latest", *, source: str | None = None, deep: bool = False) -> Job:
        return self.job("verify", VerifyRequest(Selection(self.store, name, source), deep))

    def restore(self, name: str = "latest", *, source: str | None = None, **asked: Any) -> Job:
        made = self.job("restore", RestoreRequest(Selection(self.store, name, source), **asked))
        # Two of one second, which no operator manages, must not have one name.
        return replace(made, run=f"{names.run_id(utc_now(), HOST, self.store)}-{next(_NUMBERS)}")

    def undo(self) -> Job:
        return self.job("undo", UndoRequest(self.store))

    def prune(self, **asked: Any) -> Job:
        return self.job("prune", PruneRequest(self.store, **asked))

    def upload(self) -> Job:
        return self.job("upload", UploadRequest(self.store))

    def user_of(self, verb: str) -> str | None:
        """Return who does a verb: root conducts a restore, everything else is the store's user's."""
        return None if verb in ("restore", "undo") else self.user

    def engine(self, job: Job, plan: Mapping[str, Any] | None = None) -> Engine:
        return Engine(job, self.user_of(job.verb), self.tmp, plan)

    def run(self, job: Job, plan: Mapping[str, Any] | None = None) -> Outcome:
        with self.engine(job, plan) as engine:
            return engine.wait()

    def here(self, job: Job) -> Outcome:
        """Do a job that only reads in this process, which is quicker."""
        events: list[dict[str, Any]] = []
        status = run_job(job, lambda event: events.append(json.loads(event.to_json())))
        return Outcome(int(status), events, "", "")

    def entries(self, source: str = "local", **changes: Any) -> list[dict[str, Any]]:
        """Return the catalog, newest first."""
        job = self.job("catalog", CatalogRequest((self.store,), source), **changes)
        found = self.here(job).expect(0).kind("entry")
        return [{key: e[key] for key in e if key not in ("v", "at", "kind")} for e in found]

    def good(self, source: str = "local") -> list[dict[str, Any]]:
        return [e for e in self.entries(source) if e["managed"] and e["problem"] is None]

    def names(self) -> set[str]:
        return set(os.listdir(self.backups))

    def stray_files(self) -> set[str]:
        """Return the files of the backup directory that belong to no listed good artifact."""
        belongs = set()
        for entry in self.good():
            name = entry["name"]
            belongs |= {name, f".{name}.json", f".{name}.verified.json"}
        return self.names() - belongs

    def stray_temporaries(self) -> list[str]:
        return sorted(os.listdir(self.tmp))

    def uploads(self) -> list[str]:
        """Return the keys of the unfinished multipart uploads in the bucket."""
        assert self.s3 is not None
        answer = self.s3.client().list_multipart_uploads(Bucket=self.bucket)
        return [u["Key"] for u in answer.get("Uploads", ())]

    def objects(self) -> dict[str, int]:
        """Return how many versions each key of the bucket has."""
        assert self.s3 is not None
        found: dict[str, int] = {}
        answer = self.s3.client().list_object_versions(Bucket=self.bucket)
        for each in answer.get("Versions", ()):
            found[each["Key"]] = found.get(each["Key"], 0) + 1
        return found

    def settled(self) -> None:
        """Wait until whatever a killed run had started is gone."""
        wait_until(lambda: not self.leftovers(), what=f"an end of {self.leftovers()}", timeout=20)

    def assert_clean(self) -> None:
        """Demand that nothing but good artifacts is there, here, in the bucket and in the store."""
        assert sorted(self.stray_files()) == []
        if self.bucket is not None:
            assert self.uploads() == []
        self.settled()

    def assert_survived(self, runs: set[str], *, source: str = "local") -> str:
        """Demand that the newest good artifact is of one of ``runs`` and whole; return its run."""
        newest = self.good(source)[0]
        assert newest["run"] in runs
        self.here(self.verify(newest["name"], source=source)).expect(0)
        return str(newest["run"])

    def forget(self) -> None:
        """Delete every artifact of the directory."""
        shutil.rmtree(self.backups)
        self.backups.mkdir(mode=0o700)
        give(self.backups, self.user)


class HostVictim(Victim):
    """A store with a data directory, and programs that are run."""

    mode: str
    producer: str
    """The program whose output is the backup."""
    megabytes: int
    """Of data that make an artifact of three parts."""
    programs: frozenset[str]
    """What backup, verify and restore run."""
    link: int
    """Kilobytes a second at which an artifact of two such megabytes comes in about five seconds."""
    server: Any

    def __init__(self, home: Path, server: Any, **settings: Any) -> None:
        super().__init__(home, server.os_user, **settings)
        self.server = server
        self.options: dict[str, Any] = {}

    @classmethod
    @abstractmethod
    def serve(cls, workdir: Path, template: Callable[[int], Path]) -> AbstractContextManager[Any]:
        """Serve empty data for the length of a block."""

    @abstractmethod
    def is_filling(self, said: Sequence[Mapping[str, Any]]) -> bool:
        """Tell whether a restore that has ``said`` so much has begun to fill its new directories."""

    def real_producer(self) -> Sequence[str]:
        """Return the command of the program whose output is the backup."""
        return [str(self.server.bin_dir / self.producer)]

    def stand_in(self, program: Path | None) -> None:
        """Have a program run in the producer's place, or no longer."""
        self.options.clear()
        if program is not None:
            self.options["bin_dir"] = str(program.parent)

    def unfit(self) -> AbstractContextManager[None]:
        """Make the data such that no backup of them is good, for the length of a block."""
        raise NotImplementedError

    def beside(self) -> list[str]:
        """Return what lies beside the data directory, but for locks, which stay."""
        return sorted(n for n in os.listdir(self.server.workdir) if not n.endswith(".lock"))


class PostgresVictim(HostVictim):
    """PostgreSQL, mode plain."""

    store = "postgres"
    mode = "plain"
    producer = "pg_basebackup"
    copying = "backend_type = 'walsender' AND query LIKE 'BASE_BACKUP%'"
    """What the server's sender is known by in pg_stat_activity."""
    megabytes = 4
    programs = frozenset({"psql", "pg_basebackup", "pg_verifybackup"})
    link = 8_000
    server: PostgresServer

    @classmethod
    def serve(cls, workdir: Path, template: Callable[[int], Path]) -> PostgresServer:
        return PostgresServer(15, workdir, template=template(15))

    def make_data(self, megabytes: int) -> None:
        """Fill a table of random bytes, 1 KiB a row and never packed."""
        rows = min(megabytes, 4) * 1024
        self.server.psql(
            "CREATE TABLE IF NOT EXISTS victim (id bigserial PRIMARY KEY, body bytea);"
            "ALTER TABLE victim ALTER body SET STORAGE EXTERNAL;"
            "INSERT INTO victim (body) SELECT (SELECT string_agg(uuid_send(gen_random_uuid()), ''::bytea)"
            f" FROM generate_series(1, 64) WHERE n > 0) FROM generate_series(1, {rows}) n"
        )
        # Copies from so far away are news to gzip.
        if (copies := megabytes // 4 - 1) > 0:
            self.server.psql(
                f"INSERT INTO victim (body) SELECT body FROM generate_series(1, {copies}),"
                f" (SELECT body FROM victim ORDER BY id DESC LIMIT {rows}) known"
            )
        self.server.psql("CHECKPOINT")

    def change_data(self) -> None:
        self.server.psql("UPDATE victim SET body = uuid_send(gen_random_uuid()) WHERE id % 100 = 1")

    def fingerprint(self) -> str:
        return self.server.psql("SELECT md5(string_agg(id || md5(body), ',' ORDER BY id)) FROM victim")

    def is_serving(self) -> bool:
        return self.server.running and self.server.psql("SELECT 1") == "1"

    def is_filling(self, said: Sequence[Mapping[str, Any]]) -> bool:
        staged = self.server.workdir.glob
        return any(staged(".data.*staging*/base")) or any(staged(".data.*staging*/global"))

    def store_config(self) -> StoreConfig:
        options = {
            "host": str(self.server.socket_dir),
            "port": self.server.port,
            "version": self.server.version,
        }
        return StoreConfig(
            "postgres",
            self.mode,
            self.backups,
            Retention(),
            data_dir=self.server.data_dir,
            os_user=self.server.os_user,
            options={**options, "bin_dir": str(self.server.bin_dir), **self.options},
        )

    def leftovers(self) -> list[str]:
        found = [f"process {pid}: {words}" for pid, words in self.processes()]
        if self.server.running:
            slots = self.server.psql("SELECT slot_name FROM pg_replication_slots").splitlines()
            found += [f"slot {name}" for name in slots]
        return found

    def processes(self) -> Iterator[tuple[int, str]]:
        """Yield the clients of this server and the servers on scratch or staged trees."""
        own = self.server.pid
        places = (str(self.backups), f"{self.server.data_dir.parent}/.{self.server.data_dir.name}.hq_backups")
        for pid, words in processes():
            clients = ("psql", "pg_basebackup", "pg_dumpall", "pg_dump")
            client = any(f"/{program} " in words for program in clients)
            is_client = client and str(self.server.socket_dir) in words
            if pid != own and (is_client or any(place in words for place in places)):
                yield pid, words


class DumpVictim(PostgresVictim):
    """PostgreSQL, mode dump."""

    mode = "dump"
    producer = "pg_dumpall"
    copying = "query LIKE 'COPY %victim%' AND state = 'active'"
    megabytes = 16
    programs = frozenset({"psql", "pg_dumpall", "pg_dump", "initdb", "pg_ctl"})
    link = 800

    def is_filling(self, said: Sequence[Mapping[str, Any]]) -> bool:
        """Tell whether a restore, which makes a cluster first, has begun to load."""
        return any(e["kind"] == "step" and e["name"] == "load" for e in said)


VICTIMS: dict[str, type[HostVictim]] = {each.mode: each for each in (PostgresVictim, DumpVictim)}


def processes() -> Iterator[tuple[int, str]]:
    """Yield pid and command line of every process that is no zombie."""
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                words = Path(f"/proc/{name}/cmdline").read_bytes()
            except OSError:
                continue
            if words:
                yield int(name), words.replace(b"\0", b" ").decode(errors="replace")
