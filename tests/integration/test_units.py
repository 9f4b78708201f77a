"""The units that docs/schedule.rst has are what systemd takes."""

from __future__ import annotations

import re
import shutil
import subprocess
import textwrap
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
PAGE = (Path(__file__).parents[2] / "docs/schedule.rst").read_text()
NAMES = (
    "hq_backups_worker.service",
    "hq_backups_worker.path",
    "hq_backups_restart.service",
    "hq_backups.timer",
    "hq_backups.service",
)


def units() -> list[str]:
    found = re.findall(r"^\.\. code-block:: ini\n\n((?:(?: {4}.*)?\n)+)", PAGE, re.MULTILINE)
    return [textwrap.dedent(text) for text in found]


def verify(place: Path, names: tuple[str, ...]) -> str:
    """Return what systemd says of units; their programs are stood for by one that is there."""
    for name, text in zip(names, units(), strict=True):
        text = re.sub(r"^(ExecStart=)/\S+/(celery|hq-backups) ", r"\1/bin/echo ", text, flags=re.MULTILINE)
        (place / name).write_text(re.sub(r"^(User|WorkingDirectory)=.*\n", "", text, flags=re.MULTILINE))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *(str(place / name) for name in names)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    return "\n".join(line for line in done.stderr.splitlines() if "hq_backups" in line)


def test_systemd_has_nothing_to_say_about_them(tmp_path: Path) -> None:
    assert verify(tmp_path, NAMES) == ""


def test_it_would_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.PAGE", PAGE.replace("IOSchedulingClass=idle", "IOSchedulingClass=lazy"))
    assert "lazy" in verify(tmp_path, NAMES)
