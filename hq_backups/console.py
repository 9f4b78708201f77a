"""Readers of a run's events for people and for programs: plain lines, one live line, JSON."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from typing import Any, Protocol

from hq_backups.engine.errors import Exit
from hq_backups.engine.events import Event
from hq_backups.engine.space import human_bytes
from hq_backups.wording import clean, clean_lines, seconds


def width(stream: Stream) -> int:
    """Return how many columns a line may take: a pipe bears any."""
    return shutil.get_terminal_size((80, 24)).columns if stream.isatty() else 10_000


class Stream(Protocol):
    """A text stream, Django's OutputWrapper included."""

    def write(self, text: str, /) -> Any:
        """Write ``text``."""

    def flush(self) -> Any:
        """Send what is buffered."""

    def isatty(self) -> bool:
        """Tell whether a person may be looking."""


class Writer:
    """Writes lines; a reader that went away (``| head``) or a narrow encoding stops nothing."""

    def __init__(self, stream: Stream) -> None:
        """Write to ``stream``."""
        self.stream = stream
        self.broken = False

    def line(self, text: str = "") -> None:
        """Write one line."""
        if self.broken:
            return
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        try:
            self.stream.write(text + "\n")
            self.stream.flush()
        except (OSError, ValueError):
            self.abandon()

    def abandon(self) -> None:
        """Write no more: nobody is there."""
        self.broken = True
        # Python flushes again at its end and would turn a good run into a failed one.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())  # type: ignore[attr-defined]


class Phase:
    """How fast one phase goes, over its last seconds."""

    window = 10.0

    def __init__(self) -> None:
        """Begin with nothing seen."""
        self.samples: list[tuple[float, int]] = []
        self.shown_at = -1e9
        self.shown_part = -1

    def line(self, name: str, done: int, total: int | None) -> str:
        """Return ``copy: 1.2 GiB of 4.0 GiB (30 %), 45 MiB/s, 1:02 left``."""
        now = time.monotonic()
        self.samples = [s for s in self.samples if now - s[0] <= self.window] or self.samples[-1:]
        self.samples.append((now, done))
        (then, before), text = self.samples[0], f"{clean(name)}: {human_bytes(done)}"
        rate = (done - before) / (now - then) if now > then else 0.0
        if total:
            text += f" of {human_bytes(total)} ({min(100, 100 * done // total)} %)"
        if rate > 0:
            text += f", {human_bytes(int(rate))}/s"
            if total and total > done:
                text += f", {seconds((total - done) / rate)} left"
        return text

    def due(self, done: int, total: int | None) -> bool:
        """Tell whether plain output should say something: every 5 s, every 10 %, and at the end."""
        now, part = time.monotonic(), 10 * done // total if total else 0
        if now - self.shown_at < 5 and part <= self.shown_part:
            return False
        self.shown_at, self.shown_part = now, part
        return True


class Plain:
    """One line per event, progress now and then: for logs, cron and pipes."""

    def __init__(self, out: Stream, err: Stream) -> None:
        """Tell the run on ``out``, what is wrong with it on ``err``."""
        self.out, self.err = Writer(out), Writer(err)
        self.phases: dict[str, Phase] = {}
        self.runs: set[str | None] = set()

    def __call__(self, event: Event) -> None:
        """Show one event; kinds that nobody needs to see are passed over."""
        show = getattr(self, f"on_{event.kind}", None)
        if show is not None:
            show(event, event.data)

    def say(self, text: str) -> None:
        """Show one line of the run."""
        self.out.line(text)

    def complain(self, text: str) -> None:
        """Show one line of what is wrong."""
        self.err.line(text)

    def close(self) -> None:
        """Give the terminal back."""

    def on_started(self, event: Event, data: Mapping[str, Any]) -> None:
        """Say which run this is; a part of it that runs as another user is not another one."""
        if event.run in self.runs:
            return
        self.runs.add(event.run)
        if data.get("verb") == "check":
            # Its first line is the one that monitoring has always read there.
            return
        about = " ".join(clean(data[k]) for k in ("verb", "store", "mode", "type") if data.get(k))
        self.say(f"{about} (run {clean(event.run)})")

    def on_step(self, event: Event, data: Mapping[str, Any]) -> None:
        """Say that a stage begins."""
        self.say(f"- {clean_lines(data.get('message', ''), '  ')}")

    def on_progress(self, event: Event, data: Mapping[str, Any]) -> None:
        """Say how far a phase is."""
        name, done, total = str(data.get("phase")), int(data.get("done") or 0), data.get("total")
        phase = self.phases.setdefault(name, Phase())
        self.show_progress(name, phase, done, total)

    def show_progress(self, name: str, phase: Phase, done: int, total: int | None) -> None:
        """Say it when something is to be said."""
        text = phase.line(name, done, total)
        if phase.due(done, total):
            self.say(f"  {text}")

    def on_warning(self, event: Event, data: Mapping[str, Any]) -> None:
        """Say what is not right."""
        self.complain(f"WARNING: {clean_lines(data.get('message', ''), '  ')}")

    def on_error(self, event: Event, data: Mapping[str, Any]) -> None:
        """Say why the run failed and what to type next."""
        self.complain(f"ERROR: {clean_lines(data.get('message', ''), '  ')}")
        if data.get("hint"):
            self.complain(f"  next: {clean_lines(data['hint'], '    ')}")

    def on_artifact(self, event: Event, data: Mapping[str, Any]) -> None:
        """Say what was made and where it lies."""
        manifest = data.get("manifest") or {}
        size = manifest.get("size")
        did = "uploaded" if {p.get("kind") for p in locations(data)} == {"s3"} else "made"
        self.say(
            f"{did} {clean(manifest.get('name', ''))}"
            + (f", {human_bytes(size)}" if size is not None else "")
        )
        for location in locations(data):
            self.say(f"  {place(location)}")

    def on_kept(self, event: Event, data: Mapping[str, Any]) -> None:
        """Say what stays and why."""
        self.say(f"  keep   {clean(data.get('name'))}: {clean(data.get('reason'))}")

    def on_pruned(self, event: Event, data: Mapping[str, Any]) -> None:
        """Say what went and why."""
        self.say(f"  remove {clean(data.get('name'))}: {clean(data.get('reason'))}")

    def on_check(self, event: Event, data: Mapping[str, Any]) -> None:
        """Say what one check found."""
        mark = "ok    " if data.get("ok") else "FAILED"
        self.say(f"  {mark} {clean(data.get('name'))}: {clean_lines(data.get('message', ''), '         ')}")

    def on_finding(self, event: Event, data: Mapping[str, Any]) -> None:
        """Say one sentence of a check."""
        self.say(clean(data.get("line")))

    def on_data(self, event: Event, data: Mapping[str, Any]) -> None:
        """Say what was measured; lists are for programs."""
        for key, value in data.items():
            if isinstance(value, (int, float, str)):
                text = seconds(float(value)) if key.endswith("_seconds") else clean(value)
                self.say(f"  {clean(key.removesuffix('_seconds').replace('_', ' '))}: {text}")

    def result(self, runs: str, code: Exit) -> None:
        """Write the verb's last line."""
        self.close()
        self.say(result_line(runs, code))


class Json(Plain):
    """Events as JSON lines; people's words go to standard error."""

    def __call__(self, event: Event) -> None:
        """Write the event, and errors for people too."""
        self.out.line(event.to_json())
        if event.kind in ("error", "warning"):
            super().__call__(event)

    def say(self, text: str) -> None:
        """Keep standard output for JSON."""
        self.complain(text)


def result_line(runs: str, code: Exit) -> str:
    """Return a verb's last line."""
    return f"RESULT {'failed' if code else 'ok'} run={clean(runs) or '-'} exit={int(code)}"


def locations(data: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return where an ``artifact`` event says that it lies."""
    several = list(data.get("locations") or ())
    return several or ([data["location"]] if data.get("location") else [])


def place(location: Mapping[str, Any]) -> str:
    """Return a location as a person would type it."""
    if location.get("kind") == "snapshot":
        where = location.get("bucket") or location.get("path")
        return f"{clean(location.get('repository'))}/{clean(location.get('snapshot'))} ({clean(where)})"
    if location.get("kind") == "s3":
        version = location.get("version_id")
        text = f"s3://{clean(location.get('bucket'))}/{clean(location.get('key'))}"
        return f"{text} (version {clean(version)})" if version else text
    return clean(location.get("path"))


def as_json(value: Any) -> str:
    """Return ``value`` as indented JSON."""
    return json.dumps(value, indent=2, ensure_ascii=True)
