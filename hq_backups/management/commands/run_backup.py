"""Back up one store, or all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from django.core.management.base import CommandParser

from hq_backups import watching
from hq_backups.cli import EngineCommand, has_data, require_built, store_or_all, worst
from hq_backups.clock import automatic_type
from hq_backups.engine.config import TYPES
from hq_backups.engine.errors import ConfigurationError, Exit, HQBackupsError
from hq_backups.engine.requests import BackupRequest


class Command(EngineCommand):
    """Make a backup, test it, publish it, upload it, then prune old ones."""

    help = "Back up a store: make, test, publish, upload, then prune old ones."
    examples = """\
  %(prog)s postgres              one now, which no run prunes
  %(prog)s all --type auto       cron: weekly on Sundays, or daily
  %(prog)s postgres --dry-run    only say what would be done
  %(prog)s postgres --no-upload  to the local disk only"""

    def add_arguments(self, parser: CommandParser) -> None:
        """Add this command's options."""
        super().add_arguments(parser)
        parser.add_argument(
            "store", metavar="STORE", type=store_or_all, help="postgres, couch, blobdb, elasticsearch or all"
        )
        parser.add_argument(
            "--type",
            choices=[*TYPES, "auto"],
            default="manual",
            help="auto: weekly on Sundays, else daily (default: manual)",
        )
        parser.add_argument(
            "--no-upload", action="store_true", help="keep it on this host; upload_backups sends it later"
        )
        parser.add_argument("--no-prune", action="store_true", help="remove no old backups afterwards")
        parser.add_argument(
            "--accept-shrink", action="store_true", help="accept a backup much smaller than the last one"
        )
        parser.add_argument(
            "--accept-bad-pages",
            action="store_true",
            help="back up a server with damaged pages too, and mark the backup",
        )
        parser.add_argument(
            "--dry-run", action="store_true", help="check everything and say what would be done"
        )

    def perform(self, **options: Any) -> Exit:
        """Run one job per store; one that cannot even begin does not stop the others."""
        try:
            stores = self.wanted(options["store"])
        except HQBackupsError as error:
            self.refused(None, error, options)
            raise
        type_ = options["type"]
        if type_ == "auto":
            type_ = automatic_type(self.config())
        codes = []
        for store in stores:
            request = BackupRequest(
                store,
                type=type_,
                upload=not options["no_upload"],
                prune=not options["no_prune"],
                accept_shrink=options["accept_shrink"],
                accept_bad_pages=options["accept_bad_pages"],
                dry_run=options["dry_run"],
            )
            try:
                require_built(store)
                self.resolved.require(store, backup=True)
                job = self.job("backup", request, store)
            except HQBackupsError as error:
                codes.append(self.failed(error))
                self.refused(store, error, options)
            else:
                codes.append(self.run_job(job, record=not options["dry_run"]))
        return worst(codes)

    def refused(self, store: str | None, error: HQBackupsError, options: Mapping[str, Any]) -> None:
        """Have it told that a backup could not begin."""
        if not options["dry_run"]:
            watching.refused(self.resolved, store, error, options["type"], self.show)

    def wanted(self, store: str) -> list[str]:
        """Return the store that was named, or every one that is switched on and belongs to this host."""
        resolved = self.settings()
        resolved.require()
        self.show_notes()
        if store != "all":
            return [store]
        unbuilt = [
            name for name in resolved.unbuilt if name not in resolved.local and has_data(resolved, name)
        ]
        if not resolved.local and not unbuilt:
            raise ConfigurationError(
                "no store that belongs to this host is switched on",
                hint="See the settings: list_backups --config",
            )
        return [*resolved.local, *unbuilt]
