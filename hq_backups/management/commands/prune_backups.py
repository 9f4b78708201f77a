"""Remove local backups that retention no longer asks for."""

from __future__ import annotations

from typing import Any

from django.core.management.base import CommandParser

from hq_backups.cli import EngineCommand, days, store_name
from hq_backups.engine.errors import Exit
from hq_backups.engine.requests import PruneRequest


class Command(EngineCommand):
    """Prune, and say why each backup stays or goes."""

    help = "Remove old local backups by the retention settings; say why each stays or goes."
    examples = """\
  %(prog)s --dry-run                        what would go, why
  %(prog)s postgres
  %(prog)s postgres --manual-older-than 90  old manual ones too"""

    def add_arguments(self, parser: CommandParser) -> None:
        """Add this command's options."""
        super().add_arguments(parser)
        parser.add_argument(
            "store", metavar="STORE", type=store_name, nargs="?", help="default: every enabled store"
        )
        parser.add_argument(
            "--manual-older-than", metavar="DAYS", type=days, help="remove manual backups older than this"
        )
        parser.add_argument("--dry-run", action="store_true", help="remove nothing")

    def perform(self, **options: Any) -> Exit:
        """Run one job per store."""
        requests = [
            PruneRequest(store, manual_older_than=options["manual_older_than"], dry_run=options["dry_run"])
            for store in self.stores(options["store"])
        ]
        return self.worst([self.run_job(self.job("prune", request, request.store)) for request in requests])
