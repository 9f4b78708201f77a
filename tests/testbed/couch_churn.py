"""Write to a data directory without pause, as a busy node does, and record what each moment held.

    python -m tests.testbed.couch_churn DATA_DIR LOG [--seed N]

Appends documents, compacts (the new file takes the old one's place), makes and deletes databases. After whatever
changes what a node would serve, one line of JSON tells of the database that changed: its documents, null when it is
gone. So the state after any number of lines is known, and no other state ever was. Ends with its standard input.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import sys
from pathlib import Path
from typing import IO, Any

from tests.testbed.couch_data import FIXTURE_NODE, shard_map, span_of, spans
from tests.testbed.couch_writer import CouchAppender

Q = 2
MOST_DATABASES = 6
MOST_DOCS = 60


class Database:
    """One database of two shards."""

    def __init__(self, root: Path, name: str) -> None:
        self.name = name
        self.doc = shard_map(name, q=Q, nodes=[FIXTURE_NODE])
        suffix = "".join(map(chr, self.doc["shard_suffix"]))
        self.files: dict[str, CouchAppender] = {}
        for span in spans(Q):
            path = root / "shards" / span / f"{name}{suffix}.couch"
            path.parent.mkdir(parents=True, exist_ok=True)
            self.files[span] = CouchAppender(path)
        self.revs: dict[str, str] = {}
        self.gone: set[str] = set()

    def put(self, doc: dict[str, Any]) -> None:
        """Write one document and commit it."""
        span = span_of(doc["_id"], self.files)
        assert span is not None
        file = self.files[span]
        rev = file.put(doc)
        file.commit()
        if doc.get("_deleted"):
            del self.revs[doc["_id"]]
        else:
            self.revs[doc["_id"]] = rev

    def drop(self) -> None:
        """Delete the files, as a node does when the map is gone."""
        for file in self.files.values():
            file.path.unlink()
            file.close()


class Churn:
    """All databases of the directory, and the log."""

    def __init__(self, root: Path, log: IO[str], seed: int) -> None:
        self.root, self.log = root, log
        self.random = random.Random(seed)
        self.maps = CouchAppender(root / "_dbs.couch")
        self.databases: dict[str, Database] = {}
        self.made = 0

    def tell(self, name: str) -> None:
        """Record what a database holds from now on."""
        database = self.databases.get(name)
        self.log.write(json.dumps([name, None if database is None else database.revs]) + "\n")
        self.log.flush()

    def create(self) -> None:
        """Make a database: its files first, then its map (fabric_db_create)."""
        self.made += 1
        name = f"db-{self.made}/part"
        made = Database(self.root, name)
        self.maps.put(made.doc)
        self.maps.commit()
        self.databases[name] = made
        self.tell(name)

    def delete(self) -> None:
        """Delete a database: its map first, then its files (fabric_db_delete)."""
        name = self.random.choice(sorted(self.databases))
        gone = self.databases.pop(name)
        self.maps.put({"_id": name, "_deleted": True})
        self.maps.commit()
        self.tell(name)
        gone.drop()

    def write(self) -> None:
        """Write or delete one document."""
        database = self.databases[self.random.choice(sorted(self.databases))]
        name = f"doc-{self.random.randrange(MOST_DOCS)}"
        doc: dict[str, Any] = {
            "_id": name,
            "n": self.random.random(),
            "text": "x" * self.random.randrange(3000),
        }
        if name in database.revs and self.random.random() < 0.2:
            doc = {"_id": name, "_deleted": True}
        database.put(doc)
        self.tell(database.name)

    def compact(self) -> None:
        """Put a compacted file in a shard's place."""
        database = self.databases[self.random.choice(sorted(self.databases))]
        self.random.choice(list(database.files.values())).compact()

    def step(self) -> None:
        """Do one thing."""
        chance = self.random.random()
        if len(self.databases) < 2 or (chance < 0.02 and len(self.databases) < MOST_DATABASES):
            self.create()
        elif chance < 0.03:
            self.delete()
        elif chance < 0.10:
            self.compact()
        else:
            self.write()


def main(arguments: list[str]) -> int:
    """Write until standard input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("log", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args(arguments)
    os.nice(5)
    with given.log.open("w") as log:
        churn = Churn(given.data_dir, log, given.seed)
        churn.step()
        churn.step()
        print("ready", flush=True)
        while not select.select([sys.stdin], [], [], 0)[0]:
            churn.step()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
