"""The console of a person at a terminal: lines as they come, and one live line below them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from textwrap import wrap
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from hq_backups.console import Phase, Plain, Stream, Writer
from hq_backups.engine.events import Event

STALE = 15.0
"""Seconds after which a phase that says nothing more leaves the live line."""


class Terminal(Plain):
    """Shows what runs now in one line that never wraps."""

    def __init__(self, out: Stream, err: Stream, console: Console | None = None) -> None:
        """Take over the terminal behind ``out`` until :meth:`close`."""
        super().__init__(out, err)
        self.console = console or Console(highlight=False, markup=False, emoji=False)
        self.live: Live | None = None
        self.running: dict[str, tuple[float, str]] = {}

    def say(self, text: str) -> None:
        """Write a line above the live one."""
        self._print(self.out, fitted(text, self.console.width), "")

    def complain(self, text: str) -> None:
        """Write a line above the live one, in the colour of its kind."""
        style = "bold red" if text.startswith("ERROR") else "yellow" if text.startswith("WARNING") else ""
        text = fitted(text, self.console.width)
        if self.live is None:
            self.err.line(text)
        else:
            self._print(self.err, text, style)

    def show_progress(self, name: str, phase: Phase, done: int, total: int | None) -> None:
        """Show it in the live line."""
        now = time.monotonic()
        self.running[name] = (now, phase.line(name, done, total))
        if total and done >= total:
            finished = self.running.pop(name)
            self.say(f"  {finished[1]}")
        self.running = {key: value for key, value in self.running.items() if now - value[0] < STALE}
        self._refresh()

    def on_step(self, event: Event, data: Mapping[str, Any]) -> None:
        """Say that a stage begins; what the last one showed is over."""
        super().on_step(event, data)
        self.running.clear()
        self._refresh()

    def close(self) -> None:
        """Take the live line away."""
        live, self.live = self.live, None
        if live is not None:
            try:
                live.stop()
            except OSError:
                self._lost()

    def _refresh(self) -> None:
        text = Text(" | ".join(line for _, line in self.running.values()), no_wrap=True, overflow="ellipsis")
        if not self.running or self.out.broken:
            self.close()
            return
        try:
            if self.live is None:
                self.live = Live(
                    text,
                    console=self.console,
                    transient=True,
                    refresh_per_second=4,
                    redirect_stdout=False,
                    redirect_stderr=False,
                )
                self.live.start()
            self.live.update(text)
        except OSError:
            self._lost()

    def _lost(self) -> None:
        """Go on without the terminal: the connection is gone."""
        self.out.abandon()
        self.err.abandon()
        self.close()

    def _print(self, writer: Writer, text: str, style: str) -> None:
        if self.live is None:
            writer.line(text)
        elif not writer.broken:
            try:
                self.console.print(Text(text, style=style), soft_wrap=True)
            except OSError:
                self._lost()


def fitted(text: str, columns: int) -> str:
    """Break long lines between words; paths stay whole, and so do commands, which are copied."""
    if text.startswith("  next:") or "commcare-cloud " in text:
        return text
    lines = []
    for line in text.split("\n"):
        indent = " " * (len(line) - len(line.lstrip()) + 2)
        parts = wrap(line, columns, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
        lines += [line] if len(line) <= columns or " " not in line.strip() else parts
    return "\n".join(lines)
