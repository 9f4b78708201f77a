"""List the backups that there are."""

from __future__ import annotations

from typing import Any

from django.core.management.base import CommandParser

from hq_backups import listing
from hq_backups.cli import EngineCommand, local_date, store_name
from hq_backups.engine.errors import Exit


class Command(EngineCommand):
    """Show the catalog: local directories and buckets, merged."""

    help = "List all backups, local and in S3; --config shows the effective settings."
    examples = """\
  %(prog)s
  %(prog)s postgres --source s3 --since 2026-11-01
  %(prog)s --json    one list, for programs
  %(prog)s --config  each setting and where it came from
  %(prog)s --sync    make the history page's records anew"""
    is_verb = False

    def add_arguments(self, parser: CommandParser) -> None:
        """Add this command's options."""
        super().add_arguments(parser)
        parser.add_argument(
            "store", metavar="STORE", type=store_name, nargs="?", help="default: every enabled store"
        )
        parser.add_argument(
            "--source", choices=["local", "s3", "all"], default="all", help="where to look (default: all)"
        )
        parser.add_argument(
            "--since", metavar="DATE", type=local_date, help="taken on this date or later: 2026-11-22"
        )
        parser.add_argument("--config", action="store_true", help="print the effective settings instead")
        parser.add_argument("--sync", action="store_true", help="make the records what the catalog says")

    def perform(self, **options: Any) -> Exit:
        """List."""
        if options["config"]:
            return listing.show_settings(self, json=options["json"])
        return listing.show_catalog(self, **options)
