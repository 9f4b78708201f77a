"""What list_backups shows: the catalog of every place that can be read, as a table or as one JSON list."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hq_backups import bridge, conf, identity, records
from hq_backups.cli import interpreter
from hq_backups.console import as_json, width
from hq_backups.engine.config import Job, to_plain
from hq_backups.engine.errors import Exit
from hq_backups.engine.events import Event
from hq_backups.engine.requests import CatalogRequest
from hq_backups.engine.space import human_bytes
from hq_backups.wording import clean

if TYPE_CHECKING:
    from hq_backups.cli import EngineCommand

KEYS = (
    "store", "mode", "type", "env", "host", "taken_at", "name", "size", "sha256",
    "managed", "verified_at", "run", "locations",
)  # fmt: skip


class Listing:
    """Collects entries; warnings and errors go on to the console."""

    def __init__(self, command: EngineCommand) -> None:
        """Collect for ``command``."""
        self.command = command
        self.entries: list[dict[str, Any]] = []
        self.denied: list[Event] = []
        self.partial = False

    def __call__(self, event: Event) -> None:
        """Take in one event."""
        if event.kind == "entry":
            self.entries.append({**event.data, "run": event.data.get("run", event.run)})
        elif event.kind == "error" and event.data.get("code") == "WrongUser":
            self.denied.append(event)
        elif event.kind in ("warning", "error"):
            self.partial = True
            self.command.show(event)


def show_settings(command: EngineCommand, *, json: bool) -> Exit:
    """Print each effective setting and where it came from."""
    resolved = command.settings()
    rows = conf.describe(resolved)
    if json:
        command.out(as_json(rows))
    else:
        for row in rows:
            if row["status"] != "dead" or row["source"] != "default":
                value = "unset" if row["value"] is None else clean(row["value"])
                command.out(f"{row['name']}: {value}  ({clean(row['source'])})")
    for finding in resolved.check():
        level = "error" if finding.stops(finding.store) else "warning"
        command.show(Event(level, {"message": finding.message, "hint": finding.hint}))
    return Exit.USAGE if any(finding.stops(finding.store) for finding in resolved.check()) else Exit.OK


def show_catalog(command: EngineCommand, **options: Any) -> Exit:
    """Print what there is; ``--sync`` makes the records say the same."""
    stores = command.stores(options["store"])
    listing = Listing(command)
    codes = [
        _list(listing, group, options["source"], options["since"])
        for group in _by_user(command, stores, options["source"])
    ]
    listing.entries.sort(key=lambda e: (str(e.get("store")), str(e.get("taken_at"))))
    if options["json"]:
        command.out(as_json([{key: entry.get(key) for key in KEYS} for entry in listing.entries]))
    elif listing.entries or not (any(codes) or command.unusable):
        for line in table(listing.entries, width(command.stdout), command.resolved.config().host):
            command.out(line)
    if options["sync"]:
        whole = options["source"] == "all" and options["since"] is None
        whole = whole and not listing.partial and not command.unusable
        codes.append(_sync(command, listing.entries, stores, complete=whole and not any(codes)))
    return command.worst(codes)


def _by_user(command: EngineCommand, stores: Sequence[str], source: str) -> list[list[str]]:
    """Group the stores by the user who can read their directories: one job, perhaps one sudo, for each."""
    if source == "s3":
        return [list(stores)] if stores else []
    config = command.resolved.config()
    groups: dict[str, list[str]] = {}
    for store in stores:
        groups.setdefault(identity.store_user(config.store(store)), []).append(store)
    return list(groups.values())


def _list(listing: Listing, stores: Sequence[str], source: str, since: str | None) -> Exit:
    command = listing.command
    config = command.config(*stores)
    job = Job("catalog", config, to_plain(CatalogRequest(tuple(stores), source, since)))
    listing.denied.clear()
    code = bridge.run(job, listing, python=interpreter(command.resolved))
    if not listing.denied:
        return code
    listing.partial = True
    if source == "local" or not any(config.store(name).s3 for name in stores):
        command.show(listing.denied[0])
        return code
    message = f"local backups of {', '.join(stores)} are not listed: {listing.denied[0].data.get('message')}"
    command.show(Event("warning", {"code": "WrongUser", "message": message}))
    job = dataclasses.replace(job, request={**job.request, "source": "s3"})
    return bridge.run(job, listing, user=identity.me())


def _sync(
    command: EngineCommand, entries: list[dict[str, Any]], stores: Sequence[str], *, complete: bool
) -> Exit:
    counts: list[tuple[int, int]] = []
    problem = records.guarded(lambda: counts.append(records.sync(entries, stores, complete=complete)))
    if problem:
        command.show(
            Event("error", {"message": problem, "hint": "Mend the database, then repeat the command."})
        )
        return Exit.ERROR
    ((listed, gone),) = counts
    note = "" if complete else "; the catalog was not read whole, so nothing was marked as gone"
    command.show.complain(f"records: {listed} artifacts, {gone} gone{note}")
    return Exit.OK


def table(entries: Sequence[Mapping[str, Any]], columns: int, our_host: str) -> list[str]:
    """Return the catalog's lines; where a name would not fit, its facts stand below it."""
    if not entries:
        return ["no backups"]
    rows = [(clean(entry.get("name")), *_facts(entry, our_host)) for entry in entries]
    longest = max(len(row[0]) for row in rows)
    head = f"{'size':>10}  {'where':<8}  {'taken (UTC)':<16}  notes"
    lines = []
    if all(longest + 2 + len(facts) + 2 + len(notes) <= columns for _, facts, notes in rows):
        lines.append(f"{'name':<{longest}}  {head}")
        lines += [f"{name:<{longest}}  {facts}  {notes}".rstrip() for name, facts, notes in rows]
        return lines
    for name, facts, notes in rows:
        lines += [name, f"  {facts}  {notes}".rstrip()]
    return lines


def _facts(entry: Mapping[str, Any], our_host: str) -> tuple[str, str]:
    size = entry.get("size")
    places = entry.get("locations") or ()
    kinds = dict.fromkeys(str(place.get("medium") or place.get("kind")) for place in places)
    taken = str(entry.get("taken_at") or "")[:16].replace("T", " ")
    shown = human_bytes(size) if isinstance(size, int) else "?"
    notes = []
    if not entry.get("managed"):
        notes.append("unmanaged")
    if entry.get("problem"):
        notes.append(f"BAD: {clean(entry['problem'])}")
    if entry.get("host") and entry["host"] != our_host:
        notes.append(f"of {clean(entry['host'])}")
    if entry.get("verified_at"):
        notes.append(f"verified {clean(entry['verified_at'])[:10]}")
    return f"{shown:>10}  {clean('+'.join(kinds)):<8}  {clean(taken):<16}", ", ".join(notes)
