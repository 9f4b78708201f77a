"""A restore as its operator sees it: the plan, the question, the work, what comes next."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from hq_backups.console import place
from hq_backups.engine.errors import Exit, HQBackupsError, NotConfirmed
from hq_backups.engine.events import Event, Sink
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
    "free": "free there",
}
UNSHOWN = ("facts", "next_steps", "run", "sha256")
SIZES = ("size", "bytes", "free", "needed")


def confirmed_run(
    command: EngineCommand, verb: str, request: RestoreRequest | UndoRequest, options: Mapping[str, Any]
) -> Exit:
    """Show the plan, have it confirmed, and do it."""
    store = options["store"]
    env = command.resolved.config().env
    plans: list[Mapping[str, Any]] = []
    if not options["dry_run"]:
        require_way_to_confirm(env, options)
    planning = command.job(verb, dataclasses.replace(request, plan_only=True), store)
    code = command.run_job(planning, _keep_plans(plans), record=False)
    if code is not Exit.OK:
        return code
    if not plans:
        raise HQBackupsError("the engine made no plan, so nothing was done")
    plan = plans[-1]
    for line in render(plan):
        command.show.say(line)
    if options["dry_run"]:
        return Exit.OK
    disturbs = not options.get("target_dir")
    if disturbs:
        command.show.say(f"\nBefore: commcare-cloud {clean(env)} downtime start")
    confirm(command, env, options)
    if isinstance(request, RestoreRequest):
        request = dataclasses.replace(request, expected_sha256=_sha256(plan))
    code = command.run_job(dataclasses.replace(command.job(verb, request, store), run=planning.run))
    if code is Exit.OK and disturbs:
        for line in next_steps(env, plan):
            command.show.say(line)
    return code


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


def confirm(command: EngineCommand, env: str, options: Mapping[str, Any]) -> None:
    """Have the environment's name typed; raises NotConfirmed."""
    if options["noinput"]:
        return
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
        # A command is copied whole: only prose is wrapped.
        text = clean(step)
        parts = [text] if text.startswith("commcare-cloud ") else wrap(text, 74)
        lines += [f"  {number}. {parts[0]}", *(f"     {part}" for part in parts[1:])]
    return lines


def render(plan: Mapping[str, Any], columns: int = 80) -> list[str]:
    """Return a plan's lines: a label, then its value, wrapped; paths and commands are never cut."""
    facts = plan.get("facts")
    shown = {**plan, **(facts if isinstance(facts, Mapping) else {})}
    lines = ["", "Plan"]
    for key, value in shown.items():
        if (
            key in UNSHOWN
            or (key == "from_env" and value == plan.get("env"))
            or value in (None, "", [], (), {})
        ):
            continue
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


def _keep_plans(plans: list[Mapping[str, Any]]) -> Sink:
    def sink(event: Event) -> None:
        if event.kind == "plan":
            plans.append(event.data)

    return sink
