"""What a restored cluster is not: its original. Subscriptions that must not drain it, slots and rows that are gone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hq_backups.engine.config import Config
from hq_backups.engine.manifest import Manifest

SHOWN = 20
"""How many names are listed."""

_SETTING = "max_logical_replication_workers"
_QUIET = f"""\
# Written by hq_backups: this copy must not receive what its original's subscriptions are waiting for.
{_SETTING} = 0
"""


def is_quiet(manifest: Manifest, config: Config, *, beside: bool) -> bool:
    """Tell whether a copy must receive nothing from the publishers of its original.

    Its subscriptions carry on with the original's replication slots: what the copy takes, the original never gets.
    That is so wherever the original may still be running: on another host or environment, or beside it.
    """
    if manifest.mode != "plain" or not (_enabled(manifest) or "*" in _map(manifest.source.get("unread"))):
        return False
    return beside or (manifest.env, manifest.host) != (config.env, config.host)


def quieten(tree: Path) -> None:
    """Switch the subscriptions of an unpacked cluster off until an operator switches them on."""
    with (tree / "postgresql.auto.conf").open("a") as file:
        file.write(_QUIET)


def plan_facts(manifest: Manifest, *, quiet: bool) -> dict[str, Any]:
    """Return what a plan says of it."""
    found: dict[str, Any] = {}
    names = _enabled(manifest)
    if names and manifest.mode == "plain":
        state = f"switched off ({_SETTING} = 0 in postgresql.auto.conf)" if quiet else "go on by themselves"
        found["subscriptions"] = f"{_listed(names)}: {state}"
    if manifest.mode == "plain" and (unlogged := list(_unlogged(manifest))):
        found["empty_afterwards"] = f"unlogged tables {_listed(unlogged)}"
    return found


def steps(manifest: Manifest, *, quiet: bool) -> list[str]:
    """Return what an operator must do about it after a restore."""
    found = []
    names, slots = _enabled(manifest), _names(manifest.source.get("slots"))
    if quiet:
        found.append(
            f"subscriptions{f' ({_listed(names)})' if names else ''} are switched off, since the original may still "
            f"need them; only when it is gone for good: ALTER SYSTEM RESET {_SETTING}, then restart the server"
        )
    elif names and manifest.mode == "plain":
        found.append(
            f"subscriptions ({_listed(names)}): what was published between the backup and now does not come again; "
            "copy those tables anew (DROP SUBSCRIPTION, CREATE SUBSCRIPTION)"
        )
    elif names:
        found.append(f"subscriptions ({_listed(names)}) are disabled: ALTER SUBSCRIPTION … ENABLE")
    if slots:
        found.append(
            f"replication slots ({_listed(slots)}) are in no backup: make them again for the standbys and subscribers "
            "that used them"
        )
    return found


def _enabled(manifest: Manifest) -> list[str]:
    return _names(manifest.source.get("subscriptions"), "enabled")


def _names(listed: Any, flag: str | None = None) -> list[str]:
    """Return the names in a list of a manifest, which may hold anything."""
    rows = [row for row in listed if isinstance(row, Mapping)] if isinstance(listed, list) else []
    return [str(row.get("name")) for row in rows if flag is None or row.get(flag)]


def _unlogged(manifest: Manifest) -> Iterator[str]:
    for database, held in _map(manifest.source.get("contents")).items():
        tables = _map(held).get("unlogged")
        yield from (f"{database}: {table}" for table in (tables if isinstance(tables, list) else ()))


def _map(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
