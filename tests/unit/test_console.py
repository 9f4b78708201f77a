"""What people and programs read of a run."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from hq_backups import console, listing, restoring, wording
from hq_backups.engine.errors import Exit
from hq_backups.engine.events import Event
from hq_backups.terminal import Terminal

HOSTILE = "a\x1b[2Jb\x1b]0;title\x07c\r\nRESULT ok run=x exit=0\u202e\x9b31m\x00"


class Streams:
    def __init__(self, kind: type[console.Plain] = console.Plain) -> None:
        self.out, self.err = io.StringIO(), io.StringIO()
        self.console = kind(self.out, self.err)

    def tell(self, kind: str, **data: Any) -> None:
        self.console(Event(kind, data, "run-1"))

    @property
    def lines(self) -> list[str]:
        return self.out.getvalue().splitlines()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def test_a_run_is_told_line_by_line() -> None:
    said = Streams()
    said.tell("started", verb="backup", store="postgres", env="e", host="h")
    said.tell("started", verb="unpack", store="all")
    said.tell("step", name="backup", message="reading postgres")
    said.tell(
        "artifact", manifest={"name": "x.tar.gz", "size": 2048}, location={"kind": "local", "path": "/b/x"}
    )
    said.tell("artifact", manifest={"name": "x.tar.gz"}, location={"kind": "s3", "bucket": "b", "key": "k"})
    said.tell("kept", name="x.tar.gz", reason="newest")
    said.tell("pruned", name="y.tar.gz", reason="too old")
    said.tell("check", name="sha256", ok=False, message="differs")
    said.tell("data", downtime_seconds=61.2, old_data="/opt/old", next_steps=["a"])
    said.tell("nobody-knows", this="kind")
    said.console.result("run-1", Exit.OK)
    assert said.lines == [
        "backup postgres (run run-1)",
        "- reading postgres",
        "made x.tar.gz, 2.0 KiB",
        "  /b/x",
        "uploaded x.tar.gz",
        "  s3://b/k",
        "  keep   x.tar.gz: newest",
        "  remove y.tar.gz: too old",
        "  FAILED sha256: differs",
        "  downtime: 1:01",
        "  old data: /opt/old",
        "RESULT ok run=run-1 exit=0",
    ]
    assert said.err.getvalue() == ""


def test_what_is_wrong_goes_to_standard_error_with_the_next_command() -> None:
    said = Streams()
    said.tell("warning", code="space", message="little is free")
    said.tell("error", code="X", message="it failed:\nbadly", hint="Type:\nthis", exit=1)
    assert (
        said.err.getvalue()
        == "WARNING: little is free\nERROR: it failed:\n  badly\n  next: Type:\n    this\n"
    )
    assert said.lines == []


@pytest.mark.parametrize(
    "kind", ["step", "warning", "error", "kept", "pruned", "check", "started", "artifact", "data"]
)
def test_names_from_outside_cannot_drive_the_terminal_or_forge_a_result(kind: str) -> None:
    said = Streams()
    said.tell(
        kind,
        message=HOSTILE,
        hint=HOSTILE,
        name=HOSTILE,
        reason=HOSTILE,
        verb=HOSTILE,
        store=HOSTILE,
        manifest={"name": HOSTILE},
        location={"kind": "s3", "bucket": HOSTILE, "key": HOSTILE},
    )
    said.console.result(HOSTILE, Exit.ERROR)
    text = said.out.getvalue() + said.err.getvalue()
    assert not {"\x1b", "\r", "\x00", "\x07", "\x9b", "\u202e"} & set(text)
    assert not any(line.startswith("RESULT ok") for line in text.splitlines())
    assert said.lines[-1].startswith("RESULT failed run=a?b")


@given(st.text())
def test_cleaned_text_is_one_printable_line(text: str) -> None:
    cleaned = wording.clean(text)
    assert not [c for c in cleaned if ord(c) < 32 or 126 < ord(c) < 160]
    assert len((cleaned + "x").splitlines()) == 1


def test_progress_is_shown_every_ten_percent_or_five_seconds_and_at_the_end(clock: list[float]) -> None:
    said = Streams()
    for done in range(0, 1001):
        clock[0] += 0.001
        said.tell("progress", phase="backup", done=done << 20, total=1000 << 20)
    assert len(said.lines) == 11
    assert said.lines[0] == "  backup: 0 B of 1000.0 MiB (0 %)"
    assert said.lines[-1].startswith("  backup: 1000.0 MiB of 1000.0 MiB (100 %), ")
    clock[0] += 5
    said.tell("progress", phase="backup", done=1000 << 20, total=1000 << 20)
    assert len(said.lines) == 12


def test_progress_tells_rate_and_time_left_of_the_last_seconds(clock: list[float]) -> None:
    said = Streams()
    for second in range(0, 60, 5):
        clock[0] += 5
        said.tell("progress", phase="p", done=second << 20, total=600 << 20)
    assert said.lines[-1] == "  p: 55.0 MiB of 600.0 MiB (9 %), 1.0 MiB/s, 9:05 left"
    said.tell("progress", phase="q", done=5 << 20, total=None)
    assert said.lines[-1] == "  q: 5.0 MiB"


def test_json_is_the_events_and_words_go_to_standard_error() -> None:
    said = Streams(console.Json)
    said.tell("step", name="backup", message=HOSTILE)
    said.tell("error", code="X", message="it failed", hint="do this", exit=1)
    said.console.result("run-1", Exit.ERROR)
    assert [json.loads(line)["kind"] for line in said.lines] == ["step", "error"]
    assert json.loads(said.lines[0])["message"] == HOSTILE
    assert said.err.getvalue().splitlines() == [
        "ERROR: it failed",
        "  next: do this",
        "RESULT failed run=run-1 exit=1",
    ]


def test_a_result_without_a_run_says_so() -> None:
    assert console.result_line("", Exit.USAGE) == "RESULT failed run=- exit=2"


class Terminal80(Streams):
    def __init__(self) -> None:
        super().__init__()
        self.screen = io.StringIO()
        self.rich = Console(file=self.screen, force_terminal=True, width=80, markup=False, highlight=False)
        self.console = Terminal(self.out, self.err, self.rich)


def test_the_live_line_never_wraps_and_goes_away(clock: list[float]) -> None:
    said = Terminal80()
    for second in range(5):
        clock[0] += 1
        said.tell("progress", phase="reading-a-rather-long-name-of-a-phase", done=second << 30, total=9 << 30)
        said.tell("progress", phase="upload", done=second << 29, total=9 << 30)
    live = said.console.live  # type: ignore[attr-defined]
    rendered = said.rich.render_lines(live.get_renderable(), pad=False)
    assert len(rendered) == 1
    text = "".join(segment.text for segment in rendered[0])
    assert len(text) <= 80
    assert text.startswith("reading-a-rather-long-name-of-a-phase: 4.0 GiB of 9.0 GiB")
    said.tell("warning", code="x", message="[red]not markup[/red] " + HOSTILE)
    assert "WARNING: [red]not markup[/red] a?b" in said.screen.getvalue()
    said.console.result("run-1", Exit.OK)
    assert said.console.live is None  # type: ignore[attr-defined]
    assert said.lines[-1] == "RESULT ok run=run-1 exit=0"


def test_a_finished_phase_becomes_a_line_and_leaves_the_live_one(clock: list[float]) -> None:
    said = Terminal80()
    said.tell("progress", phase="backup", done=5, total=10)
    said.tell("progress", phase="backup", done=10, total=10)
    assert "backup: 10 B of 10 B (100 %)" in said.screen.getvalue()
    assert said.console.running == {}  # type: ignore[attr-defined]
    assert said.console.live is None  # type: ignore[attr-defined]
    said.console.close()


def test_a_reader_that_went_away_stops_nothing() -> None:
    script = """
import sys
from hq_backups.console import Plain
from hq_backups.engine.events import Event
shown = Plain(sys.stdout, sys.stderr)
for number in range(20_000):
    shown(Event("step", {"message": f"line {number}"}, "r"))
sys.stderr.write("went on")
"""
    done = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert done.stdout is not None
    done.stdout.readline()
    done.stdout.close()
    assert done.stderr is not None
    assert done.stderr.read() == "went on"
    done.stderr.close()
    assert done.wait() == 0


def test_a_narrow_encoding_stops_nothing() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    console.Writer(stream).line("blöb → ok")
    assert raw.getvalue() == b"bl\\xf6b \\u2192 ok\n"


ENTRY = {
    "name": "postgres_demo_daily_2026_11_22.tar.gz",
    "size": 5 << 30,
    "taken_at": "2026-11-22T00:00:02Z",
    "managed": True,
    "host": "pg0",
    "locations": [{"kind": "local"}, {"kind": "s3"}],
}


def test_the_catalog_is_one_line_each_where_that_fits_and_two_where_not() -> None:
    wide = listing.table([ENTRY], 10_000, "pg0")
    assert len(wide) == 2
    assert wide[1].split() == [ENTRY["name"], "5.0", "GiB", "local+s3", "2026-11-22", "00:00"]
    odd = {**ENTRY, "managed": False, "host": "pg1", "name": "x" * 70, "problem": HOSTILE, "size": None}
    narrow = listing.table([ENTRY, odd], 80, "pg0")
    assert len(narrow) == 4
    assert narrow[3].split()[0] == "?"
    assert "unmanaged, BAD: a?b" in narrow[3]
    assert not {"\x1b", "\r"} & set("".join(narrow))
    assert listing.table([], 80, "pg0") == ["no backups"]


def plan(**facts: Any) -> dict[str, Any]:
    return {
        "store": "postgres",
        "env": "demo",
        "name": ENTRY["name"],
        "run": "r",
        "sha256": "f" * 64,
        "from_env": "demo",
        "taken_at": "2026-11-22T00:00:02Z",
        "size": 5 << 30,
        "source": "s3://dimagi-demo-postgres-backups/" + "k" * 90,
        "target": "/opt/data/postgresql/14/main",
        "set_aside": None,
        "free": 9 << 30,
        "facts": facts,
        "next_steps": ["commcare-cloud demo downtime end"],
    }


def test_a_plan_reads_well_at_80_columns() -> None:
    lines = restoring.render(
        plan(
            connections=["app@hq from 10.0.0.1", HOSTILE],
            warnings=["word " * 40],
            standby=True,
            service={"stop": "x"},
        )
    )
    text = "\n".join(lines)
    assert "  taken           2026-11-22T00:00:02Z" in lines
    assert "  size            5.0 GiB" in lines
    assert "  free there      9.0 GiB" in lines
    assert "  standby         yes" in lines
    assert "s3://dimagi-demo-postgres-backups/" + "k" * 90 in text
    assert all(len(line) <= 80 for line in lines if "k" * 90 not in line)
    assert "\x1b" not in text
    assert "old data kept" not in text
    assert "f" * 64 not in text


def test_a_plan_calls_tablespaces_by_their_names() -> None:
    made = plan(outer_names={"16384": "fa st", "16385": HOSTILE})
    lines = restoring.render({**made, "outer": {"16384": "/disks/a", "16385": "/disks/b", "7": "/disks/c"}})
    text = "\n".join(lines)
    assert "  tablespaces     fa st: /disks/a" in lines
    assert "7: /disks/c" in text
    assert "1638" not in text
    assert "\x1b" not in text


def test_next_steps_keep_commands_whole() -> None:
    steps = ["commcare-cloud demo django-manage " + "x" * 90, "look " * 30]
    lines = restoring.next_steps("demo", {"next_steps": steps})
    assert f"  1. {steps[0]}" in lines
    assert all(len(line) <= 80 for line in lines[3:])
    assert "commcare-cloud demo downtime end" in "\n".join(restoring.next_steps("demo", {}))


def test_sizes_of_time_are_read_easily() -> None:
    assert [wording.seconds(value) for value in (0.04, 59.94, 61, 3723)] == [
        "0.0 s",
        "59.9 s",
        "1:01",
        "1:02:03",
    ]


def test_a_pipe_bears_any_width() -> None:
    read, write = os.pipe()
    with os.fdopen(read), os.fdopen(write, "w") as stream:
        assert console.width(stream) > 1000
