"""Print docs/settings.rst, made from the table of settings."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

INTRODUCTION = """\
Settings
========

.. This page is made by tools/settings_reference.py (``make docs``): edit hq_backups/settings_table.py.

The names are those of CommCare Cloud's ``public.yml``, and a few of our own. A setting is taken from the
first of these places that says something:

1. ``HQ_BACKUPS`` in the Django settings: a map of the names below;
2. the environment: ``HQ_BACKUPS_`` and the name in capitals, dots as underscores
   (``HQ_BACKUPS_POSTGRES_S3``, ``HQ_BACKUPS_COUCHDB2_USERNAME``);
3. the YAML file that ``HQ_BACKUPS_CONFIG`` names. A whole ``public.yml`` may be given: names that are not
   below are passed over, its ``localsettings`` and ``localsettings_private`` are looked into, and values that
   only the vault knows count as unset. Of template expressions only ``{{ encrypted_root }}``,
   ``{{ deploy_env }}`` and ``{{ env_monitoring_id }}`` are expanded;
4. the Django settings that HQ has already, where one is named below;
5. the default.

``None``, ``null``, ``~`` and an empty text mean unset, and the next place is asked. Only ``backup_postgres``
takes ``None`` for off. True and False may be written ``yes``, ``on``, ``1`` and ``no``, ``off``, ``0``. A
name that is not below is an error in the first two places. A list or a map in the environment is written as
JSON, or a list with commas.

``list_backups --config`` prints every setting, its value and where that comes from; ``manage.py check``
prints what is wrong.
"""

KINDS = {
    "any": "anything",
    "text": "text",
    "text_or_off": "text, or False",
    "name": "name",
    "remote": "host, or False",
    "bool": "True or False",
    "int": "whole number",
    "dir": "absolute path",
    "version": "version",
    "emails": "mail addresses",
    "words": "command",
    "size": "size",
    "url": "address",
    "urls": "addresses",
    "bucket": "bucket",
    "timezone": "time zone",
    "hosts": "map of hosts",
}


def page() -> str:
    """Return the whole page."""
    from hq_backups.setting import DEAD, REFUSED
    from hq_backups.settings_table import GROUPS, SETTINGS

    parts = [INTRODUCTION]
    for title, group in GROUPS.items():
        shown = [setting for setting in group if setting.status not in (DEAD, REFUSED)]
        parts.append("\n".join([title, "-" * len(title), "", *_table(shown)]))
    title = "Without effect"
    gone = [setting for setting in SETTINGS.values() if setting.status in (DEAD, REFUSED)]
    lines = [f"* ``{s.name}``: {'refused; ' if s.status == REFUSED else ''}{s.reason}." for s in gone]
    parts.append(
        "\n".join([title, "-" * len(title), "", "Accepted, so that old files still work.", "", *lines])
    )
    parts.append(_findings())
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _table(settings: list[Any]) -> Iterator[str]:
    yield from (".. list-table::", "   :header-rows: 1", "   :widths: 28 14 24 34", "")
    yield from _row("Name", "Type", "Default", "Meaning")
    for setting in settings:
        names = f"``{setting.name}``" + "".join(f" (also ``{alias}``)" for alias in setting.aliases)
        default = _default(setting)
        if setting.django:
            default = f"``settings.{setting.django.label}``" + (f", else {default}" if default else "")
        yield from _row(names, _kind(setting), default, _meaning(setting))


def _row(*cells: str) -> Iterator[str]:
    for number, cell in enumerate(cells):
        yield f"   {'* -' if number == 0 else '  -'} {cell}".rstrip()


def _kind(setting: Any) -> str:
    if setting.choices:
        words = [f"``{choice}``" for choice in setting.choices]
        return ", ".join([*words, "False"] if setting.kind == "mode" else words)
    if setting.low is not None and setting.high is not None:
        return f"{setting.low} to {setting.high}"
    return KINDS[setting.kind]


def _default(setting: Any) -> str:
    from hq_backups.setting import FoundOut

    if setting.default is None:
        return ""
    return str(setting.default) if isinstance(setting.default, FoundOut) else f"``{setting.default}``"


def _meaning(setting: Any) -> str:
    from hq_backups.setting import NOT_BUILT

    words = [setting.help]
    if setting.secret:
        words.append("Secret: never shown.")
    if setting.status == NOT_BUILT:
        words.append("*Not built in this release.*")
    return " ".join(words)


def _findings() -> str:
    from hq_backups.conf.findings import IDS

    title = "What is checked"
    lines = [f"* ``hq_backups.{id_}``: {meaning}" for id_, meaning in IDS.items()]
    text = "An error (E) stops what concerns its store, with exit code 2; a warning (W) is only said."
    return "\n".join([title, "-" * len(title), "", text, "", *lines])


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.stdout.write(page())
