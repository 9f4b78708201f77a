"""What all commands share: their options, their errors, their exit codes, their last line."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import logging
import sys
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandParser, DjangoHelpFormatter

from hq_backups import bridge, conf, console, records, watching
from hq_backups.clock import host_time_zone
from hq_backups.engine.config import STORES, Config, Job, to_plain
from hq_backups.engine.errors import Exit, HQBackupsError, NotBuiltYet
from hq_backups.engine.events import Event, Sink, utc_now
from hq_backups.engine.names import PREFIX, day_of_snapshot, run_id
from hq_backups.engine.requests import Selection
from hq_backups.settings_table import BUILT_MODES

logger = logging.getLogger(__name__)

ALIASES = {"couchdb": "couch", "es": "elasticsearch"}


class HelpFormatter(DjangoHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Django's order of options, with the examples as they were written."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("examples:"):
            return text
        return argparse.HelpFormatter._fill_text(self, text, width, indent)


def store_name(text: str) -> str:
    """Return the store that was meant, or refuse with the nearest match."""
    name = ALIASES.get(text.lower(), text.lower())
    if name in STORES:
        return name
    raise argparse.ArgumentTypeError(f"{text!r} is not a store{nearest(text, STORES)} ({', '.join(STORES)})")


def store_or_all(text: str) -> str:
    """Return the store that was meant, or ``all``."""
    return "all" if text.lower() == "all" else store_name(text)


def local_date(text: str) -> str:
    """Return a date as it was typed, when it is one."""
    try:
        return datetime.strptime(text, "%Y-%m-%d").date().isoformat()
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a date like 2026-11-22") from None


def require_built(store: str) -> None:
    """Raise NotBuiltYet for a store that this release knows by name only."""
    if store not in BUILT_MODES:
        raise NotBuiltYet(
            f"store {store} is not built yet", hint=f"Built in this release: {', '.join(BUILT_MODES)}"
        )


def days(text: str) -> int:
    """Return a number of days, when it is one."""
    if text.isdecimal():
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of days")


def selected(store: str, options: Mapping[str, Any]) -> Selection:
    """Return which artifact the options of a command mean."""
    chosen = {name: options[name] for name in ("source", "host", "version_id")}
    return Selection(store, options["name"], **chosen)


def store_of_name(name: str) -> str | None:
    """Return the store that a backup's name, path or key stands for; None when it does not say."""
    base = name.rsplit("/", 1)[-1]
    known = next((store for store, prefix in PREFIX.items() if base.startswith(f"{prefix}_")), None)
    return known or ("elasticsearch" if day_of_snapshot(base) is not None else None)


def nearest(text: str, names: Iterable[str]) -> str:
    """Return ``; did you mean …?`` or nothing."""
    found = difflib.get_close_matches(text.lower(), list(names), 1)
    return f"; did you mean {found[0]}?" if found else ""


def worst(codes: Iterable[Exit]) -> Exit:
    """Return the exit code of a command that ran several jobs; one job keeps its own."""
    codes = list(codes)
    if len(codes) == 1:
        return codes[0]
    if any(code not in (Exit.OK, Exit.LOCKED, Exit.UPLOAD_FAILED) for code in codes):
        return Exit.ERROR
    return next((code for code in (Exit.LOCKED, Exit.UPLOAD_FAILED) if code in codes), Exit.OK)


class EngineCommand(BaseCommand):
    """A command that hands jobs to the engine and tells the truth about them."""

    requires_system_checks = ()
    examples = ""
    is_verb = True
    """Whether the last line is a RESULT."""

    show: console.Plain
    resolved: conf.Resolved

    def create_parser(self, prog_name: str, subcommand: str, **kwargs: Any) -> CommandParser:
        """Show the examples, and never take a shortened option: commcare-cloud eats some of them."""
        kwargs.setdefault("formatter_class", HelpFormatter)
        program = f"{Path(prog_name).name} {subcommand}"
        kwargs.setdefault("epilog", "examples:\n" + self.examples.replace("%(prog)s", program))
        return super().create_parser(prog_name, subcommand, allow_abbrev=False, **kwargs)

    def add_arguments(self, parser: CommandParser) -> None:
        """Add what every command takes."""
        parser.add_argument(
            "--json", action="store_true", help="write JSON to standard output, words to standard error"
        )

    def perform(self, **options: Any) -> Exit:
        """Do the work; what is raised becomes the last error."""
        raise NotImplementedError

    def handle(self, *args: Any, **options: Any) -> None:
        """Run, and leave with the exit code that says how it went."""
        self.runs: list[str] = []
        self.show = self._console(as_json=options["json"])
        try:
            code = self.perform(**options)
        except HQBackupsError as error:
            code = self.failed(error)
        except KeyboardInterrupt:
            code = self.failed(HQBackupsError("interrupted"))
        except Exception as error:
            if options.get("traceback"):
                raise
            logger.debug("command failed", exc_info=True)
            code = self.failed(
                HQBackupsError(f"{type(error).__name__}: {error}", hint="Details: --traceback")
            )
        finally:
            self.show.close()
        if self.is_verb:
            self.show.result(",".join(self.runs), code)
        sys.exit(int(code))

    def out(self, text: str) -> None:
        """Write a line of what was asked for."""
        self.show.out.line(text)

    def failed(self, error: HQBackupsError) -> Exit:
        """Show why and return the exit code."""
        data = {
            "code": error.code,
            "message": error.message,
            "hint": error.hint,
            "exit": int(error.exit_code),
        }
        self.show(Event("error", data))
        return error.exit_code

    def _console(self, *, as_json: bool) -> console.Plain:
        if as_json and self.is_verb:
            return console.Json(self.stdout, self.stderr)
        if self.stdout.isatty() and not as_json:
            try:
                from hq_backups.terminal import Terminal
            except ImportError:
                pass
            else:
                return Terminal(self.stdout, self.stderr)
        return console.Plain(self.stdout, self.stderr)

    def settings(self) -> conf.Resolved:
        """Return the effective settings."""
        self.resolved = conf.resolve()
        return self.resolved

    def show_notes(self) -> None:
        """Say what the settings are warned about."""
        for note in self.resolved.notes:
            self.show(Event("warning", {"code": "settings", "message": note}))

    def stores(self, store: str | None) -> list[str]:
        """Return the one store asked for, or every one whose backups may lie here, with usable settings."""
        resolved = self.settings()
        wanted = (store,) if store is not None else resolved.enabled
        for name in wanted:
            require_built(name)
        config = resolved.config(require=wanted)
        # A rebuilt host lists and restores before anything is switched on.
        return list(wanted) or [name for name in config.stores if name in BUILT_MODES]

    def config(self, *stores: str) -> Config:
        """Return the engine's configuration of ``stores`` alone, so that no other's secrets travel."""
        config = self.resolved.config(require=stores)
        chosen = {name: config.store(name) for name in stores}
        return dataclasses.replace(config, stores=chosen, timezone=config.timezone or host_time_zone())

    def job(self, verb: str, request: Any, store: str) -> Job:
        """Return a job for one store, with its run id."""
        config = self.config(store)
        return Job(verb, config, to_plain(request), run=run_id(utc_now(), config.host, store))

    def run_job(self, job: Job, *sinks: Sink, record: bool = True) -> Exit:
        """Run one job, shown and, unless it only plans, recorded and told."""
        if job.run is not None and job.run not in self.runs:
            self.runs.append(job.run)
        watcher = watching.Watcher(self.resolved, job, self.show)
        kept: list[Sink] = [records.Recorder(job, self.show), watcher] if record else []
        readers: list[Sink] = [self.show, *kept, *sinks]

        def sink(event: Event) -> None:
            for reader in readers:
                reader(event)

        code = bridge.run(job, sink, python=interpreter(self.resolved))
        if record:
            watcher.ended(code)
        return code


def has_data(resolved: conf.Resolved, store: str) -> bool:
    """Tell whether a store's data lies on this host, as far as can be seen."""
    config = resolved.config().stores.get(store)
    return config is not None and config.data_dir is not None and config.data_dir.is_dir()


def interpreter(resolved: conf.Resolved) -> Path | None:
    """Return the interpreter that HQ's sudo rule names."""
    home = resolved.virtualenv_home
    return Path(home) / "bin" / "python" if home else None
