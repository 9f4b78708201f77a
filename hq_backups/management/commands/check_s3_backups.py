"""Tell whether the bucket has the backups that it should have."""

from __future__ import annotations

import dataclasses
from typing import Any

from django.core.management.base import CommandParser

from hq_backups import bridge, conf, identity
from hq_backups.cli import EngineCommand, interpreter, require_built, store_name
from hq_backups.conf.engine import is_checked
from hq_backups.engine.config import Job, to_plain
from hq_backups.engine.errors import Exit, HQBackupsError, NotBuiltYet, UsageError
from hq_backups.engine.events import Event
from hq_backups.engine.judgement import worst
from hq_backups.engine.requests import CheckRequest
from hq_backups.settings_table import BUILT_MODES
from hq_backups.wording import clean


class Command(EngineCommand):
    """Judge each store's newest backups in the bucket by the schedule, and write the status files."""

    help = "Check that the bucket has recent, whole backups; write s3_backup_status.txt."
    examples = """\
  %(prog)s           every store that uploads
  %(prog)s postgres
  %(prog)s --json    findings with codes, ages and sizes"""

    def add_arguments(self, parser: CommandParser) -> None:
        """Add this command's options."""
        super().add_arguments(parser)
        parser.add_argument(
            "stores", metavar="STORE", type=store_name, nargs="*", help="default: every store that uploads"
        )
        parser.add_argument(
            "--no-email", action="store_true", help="mail nobody (this release mails nobody yet)"
        )
        parser.add_argument("--send-test-email", action="store_true", help="not built in this release")

    def perform(self, **options: Any) -> Exit:
        """Run one job per store; one that cannot be checked does not stop the others."""
        if options["send_test_email"]:
            raise NotBuiltYet(
                "mail alerts are not built in this release", hint="Leave --send-test-email out."
            )
        resolved = self.settings()
        resolved.require()
        stores = list(dict.fromkeys(options["stores"])) or self.uploading(resolved)
        if resolved["check_s3_backups_email"] and not options["no_email"]:
            self.note("check_s3_backups_email is set, but this release mails nobody: look at the exit code")
        codes = []
        for store in stores:
            try:
                codes.append(self.check_store(store))
            except HQBackupsError as error:
                codes.append(self.failed(error))
        return worst(codes)

    def uploading(self, resolved: conf.Resolved) -> list[str]:
        """Return the stores that are switched on and go to S3; what is not built is said."""
        uploading = [store for store in resolved.switched_on if is_checked(resolved, store)]
        for store in uploading:
            if store not in BUILT_MODES:
                self.note(f"{store} is not checked: it is not built in this release")
        built = [store for store in uploading if store in BUILT_MODES]
        if not built:
            raise UsageError(
                "no store that is built uploads to S3, so there is nothing to check",
                hint="See the settings: list_backups --config",
            )
        return built

    def check_store(self, store: str) -> Exit:
        """Check one store, as its user, or where that cannot be as this one, without its status file."""
        require_built(store)
        job = self.job("check", CheckRequest(store), store)
        if not is_checked(self.resolved, store):
            raise UsageError(
                f"upload to S3 is off for {store}", hint="See the settings: list_backups --config"
            )
        host = job.config.host if store in self.resolved.local else None
        request = CheckRequest(store, self.resolved["nadir_hour"], host)
        job = dataclasses.replace(job, request=to_plain(request))
        findings = _Findings(self)
        code = self.run_check(job, findings)
        if findings.denied is not None:
            why = findings.denied.data
            self.note(f"the status file is not written: {why.get('message')}. {why.get('hint')}")
            request = dataclasses.replace(request, status_file=False)
            job = dataclasses.replace(job, request=to_plain(request))
            code = self.run_check(job, findings, user=identity.me())
        for hint in findings.hints:
            self.show.say(f"  next: {hint}")
        return code

    def run_check(self, job: Job, findings: _Findings, user: str | None = None) -> Exit:
        """Run the job; it is no part of the history."""
        if job.run is not None and job.run not in self.runs:
            self.runs.append(job.run)
        findings.denied = None
        return bridge.run(job, findings, user=user, python=interpreter(self.resolved))

    def note(self, text: str) -> None:
        """Say what is not as one may expect."""
        self.show(Event("warning", {"code": "check", "message": text}))


class _Findings:
    """Shows a check's events; what is to be done is shown after all of them."""

    def __init__(self, command: Command) -> None:
        self.command = command
        self.hints: dict[str, None] = {}
        self.denied: Event | None = None

    def __call__(self, event: Event) -> None:
        """Take in one event."""
        if event.kind == "error" and event.data.get("code") == "WrongUser":
            self.denied = event
        elif event.kind != "result" or self.denied is None:
            if event.data.get("hint") and event.kind == "finding":
                self.hints[clean(event.data["hint"])] = None
            self.command.show(event)
