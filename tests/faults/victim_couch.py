"""A CouchDB node as a victim: the stand-in, on files of our own."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests

from hq_backups.engine.config import Retention, StoreConfig
from hq_backups.engine.errors import HQBackupsError
from tests.faults.victim import HostVictim
from tests.testbed.couch import FakeCouch, couch_user
from tests.testbed.couch_data import give_tree, make_data_dir
from tests.testbed.process import give

MIB = 1 << 20
PIECE = 64 << 10
DATABASE = "commcarehq"


class CouchVictim(HostVictim):
    """CouchDB."""

    store = "couch"
    mode = "tar"
    producer = ""
    """None: the files are read by the engine itself."""
    megabytes = 40
    programs = frozenset()
    link = 5_000
    least = 24
    """Megabytes: an artifact of several parts, or it would be fetched before it could be cut."""
    most = 64
    """Megabytes of documents that differ; of more there are copies, in databases of their own."""
    server: FakeCouch

    @classmethod
    @contextmanager
    def serve(cls, workdir: Path, template: Callable[[int], Path]) -> Iterator[FakeCouch]:
        workdir.mkdir(exist_ok=True)
        give(workdir, couch_user())
        make_data_dir(workdir / "data", {DATABASE: [{"_id": "first", "n": 0}]}, os_user=couch_user())
        with FakeCouch(workdir, os_user=couch_user()) as node:
            yield node

    def make_data(self, megabytes: int) -> None:
        """Write documents of random text; the node reads its files when it is asked."""
        pieces = min(self.most, max(self.least, megabytes)) * MIB // PIECE
        docs = [
            {
                "_id": f"doc-{n:06d}",
                "_rev": f"1-{n:032x}",
                "text": base64.b64encode(os.urandom(PIECE * 3 // 4)).decode(),
            }
            for n in range(pieces)
        ]
        copies: dict[str, list[Any]] = {f"copy-{n}": [] for n in range(megabytes // self.most - 1)}
        self.server.stop()
        data = make_data_dir(self.server.data_dir, {DATABASE: docs, **copies})
        for shard in data.glob(f"shards/*/{DATABASE}.*.couch"):
            for copy in copies:
                shutil.copyfile(shard, shard.with_name(shard.name.replace(DATABASE, copy)))
        give_tree(data, self.server.os_user)
        self.server.start()

    def change_data(self) -> None:
        answer = requests.put(
            f"{self.server.url}/{DATABASE}/changed-{os.urandom(4).hex()}",
            json={"changed": True},
            auth=(self.server.username, self.server.password),
            timeout=30,
        )
        answer.raise_for_status()

    def fingerprint(self) -> str:
        rows = requests.get(
            f"{self.server.url}/{DATABASE}/_all_docs",
            auth=(self.server.username, self.server.password),
            timeout=60,
        ).json()["rows"]
        return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()

    def is_serving(self) -> bool:
        try:
            return self.server.node().counts(DATABASE)[0] > 0
        except HQBackupsError:
            return False

    def beside(self) -> list[str]:
        """Return what lies beside the data directory, but for locks and what belongs to the node."""
        own = {"log", "pid", "state.json", self.server.log.name}
        return sorted(n for n in os.listdir(self.server.workdir) if not n.endswith(".lock") and n not in own)

    def is_filling(self, said: Sequence[Mapping[str, Any]]) -> bool:
        return any(self.server.workdir.glob(".data.*staging*/*"))

    @contextmanager
    def unfit(self) -> Iterator[None]:
        """Take away a shard: the node would serve an empty one in its place."""
        shard = next(self.server.data_dir.glob(f"shards/*/{DATABASE}.*.couch"))
        shard.rename(shard.with_suffix(".away"))
        yield
        shard.unlink(missing_ok=True)
        shard.with_suffix(".away").rename(shard)

    def store_config(self) -> StoreConfig:
        stop, start = self.server.commands()
        options = {
            "url": self.server.url,
            "username": self.server.username,
            "password": self.server.password,
        }
        return StoreConfig(
            "couch",
            self.mode,
            self.backups,
            Retention(),
            data_dir=self.server.data_dir,
            os_user=self.server.os_user,
            stop_command=stop,
            start_command=start,
            options={**options, **self.options},
        )

    def leftovers(self) -> list[str]:
        return []
