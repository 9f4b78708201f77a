"""What the repository holds, and whether it is what was put there: the list, its metadata, their sizes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from hq_backups.engine import names
from hq_backups.engine.elasticsearch import snapshot
from hq_backups.engine.elasticsearch.client import Cluster
from hq_backups.engine.errors import CorruptBackup, ServiceError
from hq_backups.engine.manifest import Manifest
from hq_backups.engine.stores.base import Kept

ASKED = 5
"""Snapshots whose sizes are asked for a forecast, at most."""


@dataclass(frozen=True)
class Holdings:
    """The snapshots of one repository, whoever took them."""

    cluster: Cluster
    repository: str

    def kept(self) -> list[Kept]:
        """Return what the repository holds: its own list, and their times where all can be read."""
        listed = snapshot.listed(self.cluster, self.repository)
        details: dict[str, snapshot.Snapshot] = {}
        unreadable: dict[str, str] = {}
        try:
            details = {s.name: s for s in snapshot.described(self.cluster, self.repository)}
        except ServiceError:
            # One that cannot be read hides all the others: only now each is asked for by itself.
            for each in listed:
                try:
                    found = snapshot.find(self.cluster, self.repository, each.name)
                except ServiceError as error:
                    unreadable[each.name] = (
                        f"its metadata cannot be read: {error.facts.get('reason') or error.message}"
                    )
                else:
                    if found is None:
                        unreadable[each.name] = "its metadata are missing in the repository"
                    else:
                        details[each.name] = found
        # 6.8 leaves one of no indices out of its list, and yet its name is taken.
        known = {each.name for each in listed}
        listed += [each for each in details.values() if each.name not in known]
        return [self._kept(each, details.get(each.name), unreadable.get(each.name)) for each in listed]

    @staticmethod
    def _kept(listed: snapshot.Snapshot, full: snapshot.Snapshot | None, problem: str | None) -> Kept:
        if full is None:
            return Kept(listed.name, listed.uuid, names.day_of_snapshot(listed.name), problem)
        taken = datetime.fromtimestamp(full.started / 1000, UTC) if full.started else None
        return Kept(full.name, full.uuid, taken, problem or full.problem())

    def survey(self, name: str) -> Mapping[str, Any]:
        """Ask what a snapshot holds that somebody else took."""
        found = self._found(name)
        if (problem := found.problem()) is not None:
            raise CorruptBackup(problem, name=name)
        size, new, sizes = self._sizes(name)
        return {
            "version": found.version,
            "repository": self.repository,
            "snapshot": name,
            "uuid": found.uuid,
            "shards": found.shards,
            "indices": {index: {"bytes": sizes.get(index, 0)} for index in found.indices},
            "bytes": size,
            "new_bytes": new,
            "finished": found.ended,
        }

    def _found(self, name: str) -> snapshot.Snapshot:
        try:
            found = snapshot.find(self.cluster, self.repository, name)
        except ServiceError as error:
            if not error.facts.get("status"):
                raise
            why = error.facts.get("reason") or error.message
            raise CorruptBackup(f"its metadata cannot be read: {why}", name=name) from error
        if found is None:
            raise CorruptBackup("the repository does not have it any more", name=name)
        return found

    def _sizes(self, name: str) -> tuple[int, int, dict[str, int]]:
        try:
            return snapshot.sizes(self.cluster, self.repository, name)
        except ServiceError as error:
            if not error.facts.get("status"):
                raise
            why = error.facts.get("reason") or error.message
            raise CorruptBackup(f"the metadata of its shards cannot be read: {why}", name=name) from error

    def check(self, manifest: Manifest) -> str:
        """Read every metadata file of a snapshot, and compare with the manifest."""
        found = self._found(manifest.name)
        recorded = manifest.source
        if recorded.get("uuid") and found.uuid != recorded["uuid"]:
            raise CorruptBackup("another snapshot has its name: the uuid differs", name=manifest.name)
        if (problem := found.problem(list(recorded.get("indices") or ()))) is not None:
            raise CorruptBackup(problem, name=manifest.name)
        size, _, _ = self._sizes(manifest.name)
        if recorded.get("bytes") is not None and size != recorded["bytes"]:
            raise CorruptBackup(
                f"it has {size} bytes, its manifest says {recorded['bytes']}", name=manifest.name
            )
        return f"{len(found.indices)} indices, {found.shards} shards; all metadata can be read"

    def stored(self, parts: Collection[str]) -> dict[str, int] | None:
        """Return the bytes that newer snapshots hold of some indices; None when that cannot be asked.

        What they hold is not copied again, unless its segments were merged since.
        """
        found: dict[str, int] = {}
        try:
            whole = [s for s in snapshot.described(self.cluster, self.repository) if s.problem() is None]
            for _ in range(ASKED):
                missing = set(parts) - set(found)
                # The newest that knows more of them: with a day's snapshot it is one question.
                each = max(
                    (s for s in whole if missing & set(s.indices)), key=lambda s: s.started, default=None
                )
                if each is None:
                    break
                whole.remove(each)
                sizes = snapshot.sizes(self.cluster, self.repository, each.name)[2]
                found |= {name: sizes.get(name, 0) for name in missing & set(each.indices)}
        except ServiceError:
            return None
        return found
