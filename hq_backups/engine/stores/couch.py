"""CouchDB: one tar of a running node's data directory, and its way back to a node of another name.

Facts: couchdb.md of the design, docs.couchdb.org (cluster/sharding, config/couchdb), and what a real node did.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hq_backups.engine import accounts, archive
from hq_backups.engine.control import Service, planned
from hq_backups.engine.couch import (
    asking,
    copying,
    deep,
    host,
    layout,
    limits,
    passing,
    scratch,
    serving,
    snapshot,
    union,
    unpacked,
)
from hq_backups.engine.couch.contents import listed
from hq_backups.engine.couch.node import Node
from hq_backups.engine.couch.release import Release
from hq_backups.engine.couch.service import find_couch_service
from hq_backups.engine.errors import PreflightFailed
from hq_backups.engine.events import Events
from hq_backups.engine.manifest import Manifest, load_manifest
from hq_backups.engine.requests import RestoreRequest
from hq_backups.engine.stores.base import Destination, Part, Prepared, Stream, StreamStore
from hq_backups.engine.streams import PlainReader

ASK_SECONDS = 20.0
SERVE_SECONDS = 120.0
"""How long one answer of a freshly started node may take."""
_LEFT_TO_DO = (
    "lay the files into an empty data directory of a node that is stopped, stands alone and cannot reach the old one",
    "chown them to its user and start it",
    "rewrite every shard map through it: GET and PUT /_node/_local/_dbs/…, with its name in changelog, by_node, "
    "by_range",
)


class Couch(StreamStore):
    """The data directory of a CouchDB node."""

    name = "couch"
    mode = "tar"
    looks = "a tar archive"

    def node(self, timeout: float = ASK_SECONDS) -> Node:
        """Return how to ask the node itself, never a proxy."""
        options = self.settings.options
        url = str(options.get("url") or "http://127.0.0.1:15984")
        return Node(url, options.get("username"), options.get("password"), timeout)

    # Backup

    def prepare(self, last: Manifest | None, events: Events) -> Prepared:
        """Look at the data directory and ask the node who it is."""
        root = self.target().resolve()
        _require_couch(root)
        try:
            found = snapshot.listed(root)
        except snapshot.Moved:
            # The snapshot itself will look again.
            found = snapshot.Listing((), (), ())
        limits.allow(len(found.files))
        if found.left_out:
            events.warning(
                "left-out",
                f"not CouchDB's, so not in the backup: {listed(found.left_out)}, in {root}",
            )
        size = sum(_size(root / path) for path in found.files)
        told = asking.identity(self.node(), events)
        tools = {"couchdb": told["version"]} if "version" in told else {}
        self._events = events
        return Prepared(size, {**told, "data_dir": str(root)}, tools)

    @contextmanager
    def open_stream(
        self, prepared: Prepared, run: str, *, accept_bad_pages: bool = False
    ) -> Iterator[Stream]:
        """Take a snapshot that is whole, ask the node for its counts, and stream what is held."""
        told: dict[str, Any] = {"node": prepared.source.get("node")}
        events = self._events
        with copying.whole(Path(prepared.source["data_dir"]), told["node"], events) as (taken, contents):
            if told["node"] in contents.nodes:
                names = [each.name for each in contents.maps]
                told["counts"] = asking.counts(self.node(), names, events)
            elif told["node"] is not None and contents.nodes:
                events.warning(
                    "other-node",
                    f"the node that answers is {told['node']}, the files are of {', '.join(contents.nodes)}: "
                    "couch_data_dir or couchdb_url is another node's, or its shard maps were never rewritten",
                )
            if not taken.one_moment:
                events.warning(
                    "several-moments",
                    f"something was written all the time: the files are of moments within {taken.seconds:.2f} seconds",
                )
            events.step(
                "snapshot",
                f"{len(taken.files)} files of {len(contents.maps)} databases held after {taken.seconds * 1000:.1f} ms",
            )
            yield copying.CouchStream(taken, contents, told)

    # Verify and restore

    @classmethod
    def recognises(cls, head: bytes) -> bool:
        """Look for a tar's first header."""
        return archive.is_tar(head)

    def walk(self, plain: PlainReader, manifest: Manifest | None, events: Events) -> Mapping[str, Any]:
        """Compare every file with the manifest; without one, find out what is there."""
        if manifest is None or manifest.surveyed:
            return passing.walk_old(plain, events)
        return passing.walk_ours(plain, manifest, events)

    def unite(self, parts: Sequence[Part]) -> Manifest:
        """Return what several nodes' backups are together; raises CorruptBackup when a range is in none."""
        return union.unite([part.manifest for part in parts], [part.location for part in parts])

    def parts(self, manifest: Manifest) -> Sequence[Part]:
        """Return the backups of each node."""
        return [
            Part(load_manifest(json.dumps(each["manifest"]).encode(), manifest.name), each["location"])
            for each in manifest.source.get(union.PARTS, ())
        ]

    def join(self, tree: Path, trees: Sequence[Path], manifest: Manifest, events: Events) -> None:
        """Make one data directory of what was unpacked of each node."""
        union.join(tree, trees, manifest.name, events)

    def unpack(self, plain: PlainReader, spot: Destination, manifest: Manifest, events: Events) -> None:
        """Unpack databases and what of their views can be trusted; never the nodes of the old cluster."""
        archive.extract(plain, spot.tree, strip=unpacked.wrapper(manifest), wanted=unpacked.wanted(manifest))

    def check_unpacked(self, target: Path, manifest: Manifest, events: Events) -> None:
        """Check that every recorded file is there and every database whole."""
        unpacked.check(target, manifest, events)

    def check_deep(self, manifest: Manifest) -> None:
        """Look at the release that a node is to be started from, if one is configured."""
        if (release := self._release()) is not None:
            release.require(str(manifest.source.get("version") or ""))

    def deep_check(self, tree: Path, manifest: Manifest, events: Events) -> None:
        """Read every document of every database; have a node serve them where a release is configured."""
        deep.read_everything(tree, manifest, events)
        if (release := self._release()) is None:
            events.warning("not-served", deep.UNSERVED)
        else:
            deep.serve(tree, release, manifest, events)

    def clean_scratch(self, tree: Path) -> None:
        """End a node that was started on ``tree``."""
        scratch.stop(tree.parent / scratch.HOME)

    def _release(self) -> Release | None:
        directory = self.settings.options.get("release_dir")
        return Release.find(Path(directory)) if directory else None

    def target(self) -> Path:
        """Return the node's data directory."""
        if self.settings.data_dir is None:
            raise PreflightFailed("the data directory of CouchDB is not known", hint="Set couch_data_dir.")
        return self.settings.data_dir

    def owner(self) -> str:
        """Return the configured user, else the data directory's owner, else its parent's, else CouchDB's."""
        return self.settings.os_user or accounts.owner_of(
            self.settings.data_dir, str(self.settings.options.get("user") or "couchdb")
        )

    def check_restore(self, manifest: Manifest, request: RestoreRequest, events: Events) -> Mapping[str, Any]:
        """Check that a single node is here to serve it, and that it would not join the one that it is from."""
        if not request.also:
            union.refuse_parts(manifest)
        about = host.about(manifest)
        if request.target_dir is not None:
            return {**about, "left_to_do": _LEFT_TO_DO}
        host.require_whole(manifest)
        version = self.settings.options.get("version")
        found = host.find(self.node(), self.target(), manifest, request, version)
        return {**about, **found, **planned(self.service(manifest))}

    def service(self, manifest: Manifest | None) -> Service:
        """Return how the node is stopped and started."""
        return find_couch_service(
            self.target(),
            str(self.settings.options.get("service") or "couchdb"),
            stop_command=self.settings.stop_command,
            start_command=self.settings.start_command,
        )

    def check_serving(
        self, manifest: Manifest | None, request: RestoreRequest | None, events: Events
    ) -> None:
        """Map every database to the started node, open and count each, read its views."""
        node = self.node(SERVE_SECONDS)
        serving.await_answer(node)
        if manifest is None:
            found = serving.open_all(node)
            events.emit(
                "check", name="serving", ok=True, message=f"{len(found)} databases open at {node.url}"
            )
            return
        name = serving.require_alone(node, request.new_node if request else None)
        serving.adopt(node, name, events)
        found = serving.open_all(node)
        serving.compare(found, manifest.source.get("databases", {}), events)
        views = serving.read_views(node, events)
        documents = sum(present for present, _ in found.values())
        message = f"{name} serves {len(found)} databases with {documents} documents, {views} indexes answer"
        events.emit("check", name="serving", ok=True, message=message)

    def next_steps(self, manifest: Manifest | None = None) -> list[str]:
        """Return what an operator of HQ does after CouchDB is back."""
        env = self.config.env
        return [
            f"commcare-cloud {env} django-manage check_services",
            f"commcare-cloud {env} django-manage list_backups --sync",
            "reset pillow checkpoints that are newer than the restored databases: pillows skip what comes before",
            f"commcare-cloud {env} downtime end",
        ]


def _require_couch(root: Path) -> None:
    """Refuse what is no data directory of CouchDB 2 or 3; raises PreflightFailed."""
    try:
        names = os.listdir(root)
    except OSError as error:
        raise snapshot.unreadable(root, error) from error
    if layout.DBS in names:
        return
    if any(name.endswith(".couch") for name in names):
        raise PreflightFailed(
            f"{root} is a data directory of CouchDB 1: it has databases and no {layout.DBS}",
            hint="Replicate it into a CouchDB 3 first; this cannot back up the old one.",
        )
    raise PreflightFailed(
        f"{root} is no data directory of CouchDB: {layout.DBS} is not in it",
        hint="Set couch_data_dir to the node's database_dir.",
    )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
