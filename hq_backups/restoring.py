"""A restore as its operator sees it: the plan, the question, the work, what comes next."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from hq_backups.console import place
from hq_backups.engine.config import to_plain
from hq_backups.engine.errors import Exit, HQBackupsError, NotConfirmed
from hq_backups.engine.events import Event
from hq_backups.engine.requests import RestoreRequest, UndoRequest
from hq_backups.engine.space import human_bytes
from hq_backups.wording import clean, seconds

if TYPE_CHECKING:
    from hq_backups.cli import EngineCommand

LABEL = 14
LABELS = {
    "name": "backup",
    "env": "environment",
    "taken_at": "taken",
    "plain_size": "unpacked",
    "source": "read from",
    "target": "data directory",
    "staging": "unpacked to",
    "set_aside": "old data kept",
    "owner": "as user",
    "outer": "tablespaces",
    "free": "free there",
    "phase": "that restore",
    "put_back": "put back",
    "old_data": "old data",
    "failed_data": "restored data",
}
BESIDE = ("staging", "set_aside", "old_data", "failed_data")
UNSHOWN = ("facts", "next_steps", "outer_names", "run", "sha256", "surveyed")
SIZES = ("size", "bytes", "free", "needed")


def confirmed_run(
    command: EngineCommand, verb: str, request: RestoreRequest | UndoRequest, options: Mapping[str, Any]
) -> Exit:
    """Show the plan, have it confirmed, and do it."""
    store, env = options["store"], command.resolved.config().env
    disturbs = not options.get("target_dir") and not options["dry_run"]
    stops = disturbs and not options.get("merge")
    told = _Told(command, f"\nBefore: commcare-cloud {clean(env)} downtime start" if stops else "")
    if not options["dry_run"]:
        require_way_to_confirm(env, options)
    job = command.job(verb, request, store)
    if options["dry_run"] or not options["noinput"]:
        # Whoever confirmed already sees the plan that the work itself begins with.
        planning = dataclasses.replace(request, plan_only=True)
        code = command.run_job(dataclasses.replace(job, request=to_plain(planning)), told, record=False)
        if code is not Exit.OK:
            return code
        if told.plan is None:
            raise HQBackupsError("the engine made no plan, so nothing was done")
        if options["dry_run"]:
            return Exit.OK
        confirm(command, env)
        if isinstance(request, RestoreRequest):
            surveyed = told.plan.get("surveyed")
            request = dataclasses.replace(
                request, expected_sha256=_sha256(told.plan), surveyed=surveyed if surveyed else None
            )
        job = dataclasses.replace(command.job(verb, request, store), run=job.run)
    code = command.run_job(job, told)
    steps = told.steps if told.steps is not None or verb == "undo" else ()
    if code is Exit.OK and disturbs and steps is not None:
        for line in next_steps(env, {"next_steps": steps}):
            command.show.say(line)
    return code


class _Told:
    """Shows the plan as soon as the engine has made it, and keeps what the end needs of it."""

    def __init__(self, command: EngineCommand, below: str) -> None:
        self.command, self.below = command, below
        self.plan: Mapping[str, Any] | None = None
        self.steps: Sequence[str] | None = None

    def __call__(self, event: Event) -> None:
        if event.data.get("next_steps"):
            self.steps = event.data["next_steps"]
        if event.kind != "plan" or self.plan is not None:
            return
        self.plan = event.data
        for line in [*render(event.data), *([self.below] if self.below else [])]:
            self.command.show.say(line)


def require_way_to_confirm(env: str, options: Mapping[str, Any]) -> None:
    """Refuse before anything is read when nobody will be able to confirm."""
    if options["noinput"]:
        if options["confirm_env"] != env:
            given = (
                f"not {options['confirm_env']}" if options["confirm_env"] else "and --confirm-env is missing"
            )
            raise NotConfirmed(
                f"this environment is {env}, {given}", hint=f"Say it by name: --noinput --confirm-env {env}"
            )
    elif not sys.stdin.isatty():
        raise NotConfirmed(
            "there is no terminal to confirm at", hint=f"Without one: --noinput --confirm-env {env}"
        )


def confirm(command: EngineCommand, env: str) -> None:
    """Have the environment's name typed; raises NotConfirmed."""
    command.show.close()
    try:
        typed = input(f"Type the environment's name ({clean(env)}) to go on: ").strip()
    except (EOFError, KeyboardInterrupt):
        raise NotConfirmed("not confirmed, nothing was changed") from None
    if typed != env:
        raise NotConfirmed(f"{clean(typed)!r} is not {env}: not confirmed, nothing was changed")


def next_steps(env: str, plan: Mapping[str, Any]) -> list[str]:
    """Return what an operator does after a restore."""
    steps = [str(step) for step in plan.get("next_steps") or ()]
    steps = steps or [
        f"commcare-cloud {env} django-manage check_services",
        "Pillows go on from checkpoints that lie in PostgreSQL and may be older or newer than Kafka and "
        "Elasticsearch: look at KafkaCheckpoint before pillows start, and rebuild what is behind.",
        f"commcare-cloud {env} django-manage list_backups --sync",
        f"commcare-cloud {env} downtime end",
        "Delete the old data when you are sure: it was kept aside.",
    ]
    lines = ["", "Next:"]
    for number, step in enumerate(steps, 1):
        # Commands and paths, which stand on lines of their own, are copied whole: only prose is wrapped.
        text, *whole = [clean(line) for line in step.splitlines()]
        parts = [text] if text.startswith("commcare-cloud ") else wrap(text, 74, break_long_words=False)
        parts += whole
        lines += [f"  {number}. {parts[0]}", *(f"     {part}" for part in parts[1:])]
    return lines


def render(plan: Mapping[str, Any], columns: int = 80) -> list[str]:
    """Return a plan's lines: a label, then its value, wrapped; paths and commands are never cut."""
    facts = plan.get("facts")
    shown = {**plan, **(facts if isinstance(facts, Mapping) else {})}
    outer, names = shown.get("outer"), shown.get("outer_names")
    if isinstance(outer, Mapping) and isinstance(names, Mapping):
        shown["outer"] = {names.get(number, number): place for number, place in outer.items()}
    lines = ["", "Plan"]
    for key, value in shown.items():
        if (
            key in UNSHOWN
            or (key == "from_env" and value == plan.get("env"))
            or value in (None, "", [], (), {})
        ):
            continue
        if key in BESIDE and str(value).rpartition("/")[0] == str(plan.get("target")).rpartition("/")[0]:
            value = f"beside it: {str(value).rpartition('/')[2]}"
        label = f"  {LABELS.get(key, clean(key.replace('_', ' '))):<{LABEL}}  "
        for text in _values(key, value):
            parts = wrap(text, columns - len(label), break_long_words=False, break_on_hyphens=False)
            for part in parts or [""]:
                lines.append(label + part)
                label = " " * len(label)
    return lines


def _values(key: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return ["yes" if value else "no"]
    if isinstance(value, int) and key.rsplit("_", 1)[-1] in SIZES:
        return [human_bytes(value)]
    if isinstance(value, float) and key.rsplit("_", 1)[-1] in ("seconds", "duration"):
        return [seconds(value)]
    if isinstance(value, Mapping):
        if value.get("kind") in ("local", "s3"):
            return [place(value)]
        return [
            f"{clean(k)}: {'; '.join(_values(str(k), v))}"
            for k, v in value.items()
            if v not in (None, "", [], {})
        ]
    if isinstance(value, (list, tuple)):
        return [text for item in value for text in _values(key, item)]
    return [clean(value)]


def _sha256(plan: Mapping[str, Any]) -> str | None:
    artifact = plan.get("artifact")
    found = plan.get("sha256") or (artifact.get("sha256") if isinstance(artifact, Mapping) else None)
    return str(found) if found else None
