"""Put a backup back."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from django.core.management.base import CommandParser

from hq_backups import restoring
from hq_backups.cli import EngineCommand, selected, store_name
from hq_backups.engine.errors import Exit, UsageError
from hq_backups.engine.requests import RestoreRequest, UndoRequest


class Command(EngineCommand):
    """Restore: show the plan, have it confirmed, do it, say what comes next."""

    help = "Restore a backup: shows its plan first, keeps the old data aside, rolls back when it fails."
    examples = """\
  %(prog)s postgres latest --dry-run            only the plan
  %(prog)s postgres latest --source s3
  %(prog)s postgres postgres_demo_daily_2026_11_22.tar.gz
  %(prog)s postgres latest --target-dir /mnt/x  only unpack
  %(prog)s postgres --undo                      take it back
  %(prog)s couch latest --new-node couchdb@10.0.0.5
  %(prog)s blobdb latest --merge        add what is missing
  %(prog)s blobdb latest --only KEY KEY --target-dir /mnt/x
  %(prog)s elasticsearch latest --indices forms,cases
  %(prog)s elasticsearch latest --rename-prefix old-
  %(prog)s postgres latest --noinput --confirm-env monolith"""

    def add_arguments(self, parser: CommandParser) -> None:
        """Add this command's options."""
        super().add_arguments(parser)
        parser.add_argument(
            "store", metavar="STORE", type=store_name, help="postgres, couch, blobdb or elasticsearch"
        )
        parser.add_argument(
            "name", metavar="NAME", nargs="?", help="a name that list_backups shows, a path, a key, or latest"
        )
        parser.add_argument(
            "--undo", action="store_true", help="put back what the last restore set aside, or finish it"
        )
        parser.add_argument(
            "--source", choices=["local", "s3"], help="which copy (default: the local one if there is one)"
        )
        parser.add_argument("--host", help="of which host, where several have one")
        parser.add_argument(
            "--version-id", metavar="V", help="which version of an object in a bucket that keeps them"
        )
        parser.add_argument(
            "--target-dir", metavar="D", type=Path, help="unpack into this new directory instead"
        )
        parser.add_argument(
            "--staging-dir", metavar="D", type=Path, help="where to unpack before the swap (default: beside)"
        )
        parser.add_argument("--dry-run", action="store_true", help="show the plan, do nothing")
        parser.add_argument(
            "--noinput", "--no-input", action="store_true", help="ask nothing; needs --confirm-env"
        )
        parser.add_argument(
            "--confirm-env", metavar="ENV", help="the environment's name, in place of typing it"
        )
        parser.add_argument(
            "--from-env", metavar="ENV", help="the other environment whose backup may be put here"
        )
        parser.add_argument(
            "--in-place",
            action="store_true",
            help="load a dump into the running server, whose directory is not ours; it must be empty",
        )
        parser.add_argument(
            "--recreate",
            action="store_true",
            help="with --in-place: delete what the server holds first, for good",
        )
        parser.add_argument(
            "--new-node",
            metavar="NODE",
            help="couch: the name that the restored node must have, such as couchdb@10.0.0.5",
        )
        parser.add_argument(
            "--also",
            metavar="NAME",
            nargs="+",
            default=[],
            help="couch: the backups of the other nodes of the same cluster, all into this one node",
        )
        parser.add_argument(
            "--merge",
            action="store_true",
            help="blobdb: add what is missing to the data that are there, and change nothing else",
        )
        parser.add_argument(
            "--only",
            metavar="KEY",
            nargs="+",
            default=[],
            help="blobdb, with --merge or --target-dir: only these blobs, or all below such a directory",
        )
        parser.add_argument(
            "--indices",
            metavar="A,B",
            type=index_names,
            default=(),
            help="elasticsearch: only these indices of the snapshot",
        )
        parser.add_argument(
            "--rename-prefix",
            metavar="P",
            help="elasticsearch: restore under names that begin so, beside what is live",
        )
        parser.add_argument("--disconnect", action="store_true", help="go on over open client connections")

    def perform(self, **options: Any) -> Exit:
        """Check what was typed, then hand over."""
        if options["undo"] == bool(options["name"]):
            raise UsageError(
                "name a backup, or give --undo, not both", hint="See what there is: list_backups"
            )
        for name in ("target_dir", "staging_dir"):
            if options[name] is not None and not options[name].is_absolute():
                raise UsageError(f"--{name.replace('_', '-')} must be an absolute path: {options[name]}")
        if options["recreate"] and not options["in_place"]:
            raise UsageError(
                "--recreate goes with --in-place only", hint="A data directory is never deleted."
            )
        if options["in_place"] and (options["undo"] or options["target_dir"] or options["staging_dir"]):
            raise UsageError(
                "--in-place goes with neither --undo, --target-dir nor --staging-dir",
                hint="It changes the running server itself, and cannot be undone.",
            )
        for name in ("new_node", "also"):
            if options[name] and options["store"] != "couch":
                raise UsageError(f"--{name.replace('_', '-')} is for couch only")
        for name in ("indices", "rename_prefix"):
            if options[name] and (options["store"] != "elasticsearch" or options["undo"]):
                raise UsageError(f"--{name.replace('_', '-')} goes with a backup of elasticsearch")
        if options["undo"] and options["also"]:
            raise UsageError("--also goes with the name of a backup, not with --undo")
        (store,) = self.stores(options["store"])
        _require_parts(store, options)
        if options["undo"]:
            return restoring.confirmed_run(self, "undo", UndoRequest(store), options)
        request = RestoreRequest(
            selected(store, options),
            target_dir=options["target_dir"],
            staging_dir=options["staging_dir"],
            from_env=options["from_env"],
            disconnect=options["disconnect"],
            in_place=options["in_place"],
            recreate=options["recreate"],
            new_node=options["new_node"],
            also=tuple(options["also"]),
            merge=options["merge"],
            only=tuple(options["only"]),
            indices=tuple(options["indices"]),
            rename_prefix=options["rename_prefix"],
        )
        return restoring.confirmed_run(self, "restore", request, options)


def index_names(text: str) -> tuple[str, ...]:
    """Return names between commas, each an exact one."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names or any("*" in name for name in names):
        raise argparse.ArgumentTypeError(f"{text!r} are not names of indices, with commas between them")
    return names


def _require_parts(store: str, options: Mapping[str, Any]) -> None:
    """Raise UsageError for a restore of parts that is none."""
    if not options["merge"] and not options["only"]:
        return
    if store != "blobdb":
        raise UsageError("--merge and --only are for blobdb", hint="Other stores are restored whole.")
    if options["undo"]:
        raise UsageError(
            "--undo goes with neither --merge nor --only", hint="A merge changes nothing that is there."
        )
    if options["merge"] and (options["target_dir"] or options["staging_dir"] or options["in_place"]):
        raise UsageError(
            "--merge goes with neither --target-dir, --staging-dir nor --in-place",
            hint="It adds to the blob directory itself.",
        )
    if options["only"] and not options["merge"] and not options["target_dir"]:
        raise UsageError(
            "--only goes with --merge or --target-dir",
            hint="A restore of the whole directory would set all the other blobs aside.",
        )
