"""Prove that a backup is whole."""

from __future__ import annotations

from typing import Any

from django.core.management.base import CommandParser

from hq_backups import blob_records
from hq_backups.cli import EngineCommand, selected, store_name, store_of_name
from hq_backups.engine.errors import Exit, UsageError
from hq_backups.engine.events import Event
from hq_backups.engine.requests import BlobRecord, VerifyRequest


class Command(EngineCommand):
    """Verify one backup; deep: by restoring it into a scratch place."""

    help = "Prove that a backup is whole: size, sha256, archive; --deep starts a server on it."
    examples = """\
  %(prog)s latest --store postgres
  %(prog)s postgres_monolith_daily_2026_11_22.tar.gz
  %(prog)s latest --store postgres --source s3 --deep"""

    def add_arguments(self, parser: CommandParser) -> None:
        """Add this command's options."""
        super().add_arguments(parser)
        parser.add_argument(
            "name", metavar="NAME", help="a name that list_backups shows, a path, a key, or latest"
        )
        parser.add_argument(
            "--store", metavar="STORE", type=store_name, help="needed where the name does not say it"
        )
        parser.add_argument(
            "--source", choices=["local", "s3"], help="which copy (default: the local one if there is one)"
        )
        parser.add_argument("--host", help="of which host, where several have one")
        parser.add_argument(
            "--version-id", metavar="V", help="which version of an object in a bucket that keeps them"
        )
        parser.add_argument(
            "--deep", action="store_true", help="restore it into a scratch place, start it and count"
        )

    def perform(self, **options: Any) -> Exit:
        """Run the job."""
        store = options["store"] or store_of_name(options["name"])
        if store is None:
            enabled = self.settings().enabled
            if len(enabled) != 1:
                raise UsageError(
                    f"{options['name']} does not say of which store it is",
                    hint=f"Add --store: {', '.join(enabled)}",
                )
            (store,) = enabled
        (store,) = self.stores(store)
        request = VerifyRequest(
            selected(store, options),
            deep=options["deep"],
            records=self._records() if store == "blobdb" else (),
        )
        return self.run_job(self.job("verify", request, store))

    def _records(self) -> tuple[BlobRecord, ...]:
        """Return some of HQ's own records, where there are any."""
        try:
            return blob_records.sample(self.resolved["blobdb_verifier"])
        except blob_records.NoRecords as error:
            message = f"not compared with HQ's records of blobs: {error}"
            self.show(Event("step", {"name": "records", "message": message}))
            return ()
