"""Send to the bucket what it still lacks."""

from __future__ import annotations

from typing import Any

from django.core.management.base import CommandParser

from hq_backups.cli import EngineCommand, store_name
from hq_backups.engine.errors import Exit, UsageError
from hq_backups.engine.requests import UploadRequest


class Command(EngineCommand):
    """Upload finished local backups whose upload failed or was put off."""

    help = "Send finished local backups that the bucket still lacks."
    examples = """\
  %(prog)s                 of every store that uploads
  %(prog)s postgres"""

    def add_arguments(self, parser: CommandParser) -> None:
        """Add this command's options."""
        super().add_arguments(parser)
        parser.add_argument(
            "store", metavar="STORE", type=store_name, nargs="?", help="default: every store that uploads"
        )

    def perform(self, **options: Any) -> Exit:
        """Run one job per store."""
        stores = self.stores(options["store"])
        config = self.resolved.config()
        sending = [store for store in stores if config.store(store).s3]
        if not sending and not self.unusable:
            raise UsageError(
                f"upload to S3 is off for {', '.join(stores)}", hint="See the settings: list_backups --config"
            )
        return self.worst(
            [self.run_job(self.job("upload", UploadRequest(store), store)) for store in sending]
        )
