"""A directory of blobs as a victim: HQ is whoever reads and writes it."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from hq_backups.engine.blobs.stream import PROGRAM
from hq_backups.engine.config import Job, Retention, StoreConfig
from tests.faults.engine_process import Engine
from tests.faults.victim import HostVictim, processes
from tests.testbed.places import server_user
from tests.testbed.process import give

MIB = 1 << 20


class BlobDirectory:
    """Where blobs lie; nothing runs."""

    running = True

    def __init__(self, workdir: Path, os_user: str | None = None) -> None:
        self.workdir = workdir
        self.os_user = os_user or server_user()
        self.data_dir = workdir / "data"

    def __enter__(self) -> Self:
        self.workdir.mkdir(exist_ok=True)
        self.data_dir.mkdir(mode=0o755, exist_ok=True)
        for path in (self.workdir, self.data_dir):
            give(path, self.os_user)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave everything to whoever made the working directory."""

    def stop(self) -> None:
        """Do nothing, as nothing runs."""

    start = stop

    def write(self, key: str | bytes, content: bytes, mode: int = 0o644) -> Path:
        """Write a blob as HQ would."""
        path = Path(os.fsdecode(os.path.join(os.fsencode(self.data_dir), os.fsencode(key))))
        for parent in reversed(path.parents):
            if not parent.exists():
                parent.mkdir(mode=0o755)
                give(parent, self.os_user)
        path.write_bytes(content)
        path.chmod(mode)
        give(path, self.os_user)
        return path


class BlobVictim(HostVictim):
    """BlobDB."""

    store = "blobdb"
    mode = "tar"
    producer = "reading.py"
    megabytes = 40
    programs = frozenset()
    link = 5_000
    server: BlobDirectory
    _stand_in: Path | None = None

    def real_producer(self) -> Sequence[str]:
        return PROGRAM

    def stand_in(self, program: Path | None) -> None:
        self._stand_in = program

    def engine(self, job: Job, plan: Mapping[str, Any] | None = None) -> Engine:
        if self._stand_in is not None and job.verb == "backup":
            plan = {**(plan or {}), "reader": str(self._stand_in)}
        return super().engine(job, plan)

    @classmethod
    def serve(cls, workdir: Path, template: Callable[[int], Path]) -> BlobDirectory:
        return BlobDirectory(workdir)

    def make_data(self, megabytes: int) -> None:
        """Write so many megabytes of blobs, 24 at least: half of them in one each, half in a hundred."""
        for _ in range(max(12, megabytes // 2)):
            name = secrets.token_hex(8)
            self.server.write(f"large/{name}", os.urandom(MIB))
            for n in range(100):
                self.server.write(f"small/{name}/{n}", os.urandom(MIB // 100))

    def change_data(self) -> None:
        for path in list(self.server.data_dir.glob("small/*/0")):
            path.write_bytes(os.urandom(100))

    def fingerprint(self) -> str:
        return fingerprint(self.server.data_dir)

    def is_serving(self) -> bool:
        return self.server.data_dir.is_dir()

    def is_filling(self, said: Sequence[Mapping[str, Any]]) -> bool:
        return any(self.server.workdir.glob(".data.*staging*/*"))

    def store_config(self) -> StoreConfig:
        options = {"owner": self.server.os_user, "owner_is_set": True}
        return StoreConfig(
            "blobdb",
            self.mode,
            self.backups,
            Retention(),
            data_dir=self.server.data_dir,
            os_user=self.server.os_user,
            options={**options, **self.options},
        )

    def leftovers(self) -> list[str]:
        places = (str(self.home), str(self.server.workdir))
        return [
            f"process {pid}: {words}"
            for pid, words in processes()
            if self.producer in words and any(place in words for place in places)
        ]


def fingerprint(tree: Path) -> str:
    """Return a digest of the names, contents and modes below a directory."""
    digest = hashlib.sha256()
    top = os.fsencode(tree)
    for directory, names, files in sorted(os.walk(top)):
        for name in sorted(names + files):
            path = os.path.join(directory, name)
            about = os.lstat(path)
            digest.update(b"%s %o " % (os.path.relpath(path, top), about.st_mode))
            if name in files:
                with open(path, "rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
