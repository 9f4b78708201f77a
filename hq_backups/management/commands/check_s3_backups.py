"""Tell whether the bucket has the backups that it should have."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from django.core.management.base import CommandParser

from hq_backups import alarm_state, alerts, bridge, checked, conf, health, identity, mailing, watching
from hq_backups.alarm_state import Checked, State
from hq_backups.bounded import within
from hq_backups.cli import EngineCommand, interpreter, require_built, store_name
from hq_backups.conf.engine import is_checked
from hq_backups.engine.config import Job, to_plain
from hq_backups.engine.errors import ConfigurationError, Exit, HQBackupsError, UsageError
from hq_backups.engine.events import Event, utc_now
from hq_backups.engine.judgement import worst
from hq_backups.engine.requests import CheckRequest
from hq_backups.problems import Problem
from hq_backups.schedule import timetable
from hq_backups.settings_table import BUILT_MODES
from hq_backups.wording import clean

SECONDS = 180.0
"""How long telling may take: it asks the database and the broker too, and mails."""


class Command(EngineCommand):
    """Judge each store's newest backups in the bucket by the schedule, write the status files, mail alarms."""

    help = "Check that the bucket has recent, whole backups; write s3_backup_status.txt; mail what is wrong."
    examples = """\
  %(prog)s           every store that uploads
  %(prog)s postgres
  %(prog)s --json    findings with codes, ages and sizes
  %(prog)s --send-test-email"""

    def add_arguments(self, parser: CommandParser) -> None:
        """Add this command's options."""
        super().add_arguments(parser)
        parser.add_argument(
            "stores", metavar="STORE", type=store_name, nargs="*", help="default: every store that uploads"
        )
        parser.add_argument(
            "--no-email",
            action="store_true",
            help="mail nobody; the next check without it does",
        )
        parser.add_argument(
            "--send-test-email",
            action="store_true",
            help="send one mail to whoever gets alarms, and check nothing",
        )

    def perform(self, **options: Any) -> Exit:
        """Run one job per store; one that cannot be checked does not stop the others."""
        resolved = self.settings()
        if options["send_test_email"]:
            return self.send_test_email()
        remembered = alarm_state.load(alerts.directory(resolved))
        self.notes = _notes(remembered)
        self.found: dict[str, tuple[Problem, ...]] = {}
        self.amendable: list[Job] = []
        codes: list[Exit] = []
        try:
            resolved.require()
            stores = list(dict.fromkeys(options["stores"])) or self.uploading(resolved)
        except HQBackupsError:
            # No bucket is asked, but whatever else is wrong is told.
            self.tell(mail=not options["no_email"])
            raise
        for store in stores:
            try:
                codes.append(self.check_store(store, remembered))
            except HQBackupsError as error:
                codes.append(self.failed(error))
                if isinstance(error, ConfigurationError) or not isinstance(error, UsageError):
                    now = utc_now()
                    self.found[store] = (checked.refusal(resolved, store, error, remembered, now),)
        codes += self.tell(mail=not options["no_email"])
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

    def check_store(self, store: str, remembered: State) -> Exit:
        """Check one store, as its user, or where that cannot be as this one, without its status file."""
        require_built(store)
        job = self.job("check", CheckRequest(store), store)
        if not is_checked(self.resolved, store):
            raise UsageError(
                f"upload to S3 is off for {store}", hint="See the settings: list_backups --config"
            )
        host = job.config.host if store in self.resolved.local else None
        nadir_hour = timetable(self.resolved, store).nadir_hour
        request = CheckRequest(store, nadir_hour, host, notes=self.notes)
        job = dataclasses.replace(job, request=to_plain(request))
        findings = _Findings(self)
        code = self.run_check(job, findings)
        if findings.denied is not None:
            why = findings.denied.data
            self.note(f"the status file is not written: {why.get('message')}. {why.get('hint')}")
            request = dataclasses.replace(request, status_file=False)
            job = dataclasses.replace(job, request=to_plain(request))
            code = self.run_check(job, findings, user=identity.me())
        else:
            self.amendable.append(job)
        for hint in findings.hints:
            self.show.say(f"  next: {hint}")
        self.found[store] = self.problems(store, findings, code, remembered)
        return code

    def problems(self, store: str, findings: _Findings, code: Exit, state: State) -> tuple[Problem, ...]:
        """Return what was found of a store, a check that broke off included."""
        now = utc_now()
        made = (checked.problem(self.resolved, store, each, state, now) for each in findings.found)
        problems = [each for each in made if each is not None]
        if findings.error is not None and (code is not Exit.OK and not findings.found):
            words = findings.error
            error = HQBackupsError(str(words.get("message") or ""), hint=str(words.get("hint") or ""))
            problems.append(checked.refusal(self.resolved, store, error, state, now))
        return tuple(problems)

    def run_check(self, job: Job, findings: _Findings, user: str | None = None) -> Exit:
        """Run the job; it is no part of the history."""
        if job.run is not None and job.run not in self.runs:
            self.runs.append(job.run)
        findings.denied = None
        return bridge.run(job, findings, user=user, python=interpreter(self.resolved))

    def tell(self, *, mail: bool) -> list[Exit]:
        """Have told what was found here and whatever else is wrong; return an exit code when nobody can be."""
        now = utc_now().replace(microsecond=0)
        try:
            told = within(SECONDS, lambda: self._tell(now, mail=mail), what="telling of the check")
        except Exception as error:
            return [self.failed(HQBackupsError(f"nobody could be told of this check: {error}"))]
        for note in told.notes:
            self.note(note)
        if not mail:
            return []
        after = alarm_state.load(alerts.directory(self.resolved))
        notes = _notes(after) or (_mail_note(told.failed),) * bool(told.failed)
        if notes != self.notes:
            for job in self.amendable:
                request = {**job.request, "notes": list(notes), "only_notes": True}
                bridge.run(
                    dataclasses.replace(job, request=request),
                    self._amended,
                    python=interpreter(self.resolved),
                )
        if not told.failed:
            return []
        hint = "See what the mail server says: check_s3_backups --send-test-email"
        return [self.failed(HQBackupsError(f"an alarm mail cannot be sent: {told.failed}", hint=hint))]

    def _amended(self, event: Event) -> None:
        if event.kind in ("warning", "error"):
            self.show(event)

    def _tell(self, now: datetime, *, mail: bool) -> alerts.Told:
        def remember(state: State) -> State:
            checks = {store: Checked(now, problems) for store, problems in self.found.items()}
            return dataclasses.replace(state, checks={**state.checks, **checks})

        # First what was found is remembered, then everything is looked at together and told in one mail. Without
        # mail it begins no alarm, which the next run on this host would tell: another host may mail the same.
        with alarm_state.opened(alerts.directory(self.resolved), now) as held:
            held.state = remember(held.state)
        told = alerts.Told(notes=tuple(held.notes))
        if mail:
            reports = [
                r for store, found in self.found.items() for r in checked.reports(self.resolved, store, found)
            ]
            reports += health.survey(self.resolved, now).reports
            told = alerts.tell(self.resolved, reports, remember=remember, now=now)
        for note in watching.beat(self.resolved):
            self.note(note)
        return told

    def send_test_email(self) -> Exit:
        """Send one mail to whoever gets alarms, and say all there is to say about it."""
        resolved = self.resolved
        to = mailing.recipients(resolved)
        if not to:
            raise UsageError(
                "alarms are mailed to nobody: neither check_s3_backups_email nor ADMINS is set",
                hint="Set check_s3_backups_email.",
            )
        where = mailing.server(resolved)
        self.show.say(f"to: {clean(', '.join(to))}")
        self.show.say(f"from: {clean(mailing.sender())}")
        self.show.say(
            f"backend: {clean(mailing.backend(resolved))}" + (f", server {clean(where)}" if where else "")
        )
        if kind := mailing.delivers_nowhere(resolved):
            raise ConfigurationError(
                f"mail goes nowhere: the mail backend is {kind}",
                hint="Give the host a mail server: EMAIL_SMTP_HOST in public.yml, EMAIL_LOGIN in the vault.",
            )
        try:
            answer = within(SECONDS, lambda: mailing.send_test(resolved, to, utc_now()), what="sending")
        except TimeoutError as error:
            raise mailing.NotSent(f"{where} did not take the mail: {error}") from error
        self.show.say(answer)
        self.show.say("Look whether it arrives, and not among the spam.")
        return Exit.OK

    def note(self, text: str) -> None:
        """Say what is not as one may expect."""
        self.show(Event("warning", {"code": "check", "message": text}))


def _notes(state: State) -> tuple[str, ...]:
    """Return what the status file says of mails."""
    lost = state.undelivered
    return (_mail_note(lost.why, f" since {lost.since:%Y-%m-%d %H:%M} UTC"),) if lost else ()


def _mail_note(why: str, since: str = "") -> str:
    return f"mails cannot be sent{since}: {why}"


class _Findings:
    """Shows a check's events; what is to be done is shown after all of them."""

    def __init__(self, command: Command) -> None:
        self.command = command
        self.hints: dict[str, None] = {}
        self.found: list[Mapping[str, Any]] = []
        self.error: Mapping[str, Any] | None = None
        self.denied: Event | None = None

    def __call__(self, event: Event) -> None:
        """Take in one event."""
        if event.kind == "error" and event.data.get("code") == "WrongUser":
            self.denied = event
        elif event.kind != "result" or self.denied is None:
            if event.kind == "error":
                self.error = event.data
            if event.kind == "finding":
                self.found.append(event.data)
                if event.data.get("hint"):
                    self.hints[clean(event.data["hint"])] = None
            self.command.show(event)
