"""What HQ's database says of some blobs, compared with an archive or with what was unpacked of it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from hq_backups.engine.blobs.judge import Noted
from hq_backups.engine.errors import CorruptBackup
from hq_backups.engine.events import Events, parse_utc
from hq_backups.engine.manifest import Manifest
from hq_backups.engine.requests import BlobRecord


class Records:
    """The records of a sample, and what was found of each."""

    def __init__(self, records: Iterable[BlobRecord]) -> None:
        """Take the sample."""
        self._records = {os.fsencode(record.key.strip("/")): record for record in records}
        self._found: dict[bytes, int] = {}

    def saw(self, key: bytes, size: int) -> None:
        """Note a blob that is there."""
        if key in self._records:
            self._found[key] = size

    def look_in(self, tree: Path) -> None:
        """Look for each in an unpacked tree."""
        for key in self._records:
            path = os.path.join(os.fsencode(tree), key)
            if os.path.isfile(path):
                self._found[key] = os.stat(path).st_size

    def finish(self, manifest: Manifest, events: Events) -> None:
        """Compare; raises CorruptBackup when a blob older than the backup is missing or of another size."""
        missing, other, compared = Noted(), Noted(), 0
        for key, record in self._records.items():
            # What came while the backup ran may be in it or not.
            if parse_utc(record.created) >= manifest.taken_at:
                continue
            compared += 1
            size = self._found.get(key)
            if size is None:
                missing.add(ascii(record.key))
            elif size != record.size:
                other.add(f"{record.key!a} ({size} bytes, recorded are {record.size})")
        said = [
            f"{noted.count} {what}: {noted.listed()}"
            for noted, what in ((missing, "are not in it"), (other, "are of another size"))
            if noted.count
        ]
        if said:
            raise CorruptBackup(
                f"of {compared} blobs that HQ's database knows, {'; '.join(said)}",
                name=manifest.name,
                hint="Blobs may be missing on the disk as well: look for these keys in the blob directory.",
            )
        skipped = len(self._records) - compared
        newer = f"; {skipped} are newer than the backup" if skipped else ""
        events.emit(
            "check",
            name="records",
            ok=True,
            message=f"{compared} blobs are as HQ's database records them{newer}",
        )
