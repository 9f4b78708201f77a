"""kill -9 at every step of a restore and of its undoing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.swap_driver import SCENARIOS
from tests.testbed.process import short_directory

pytestmark = pytest.mark.faults
ROOT = Path(__file__).parents[2]
IN_FULL = ("stopped", "test-fails")
"""Scenarios whose steps are nearly those of another."""


def sweep(kind: str, scenario: str) -> int:
    with short_directory() as directory:
        done = subprocess.run(
            [sys.executable, "-m", "tests.faults.swap_driver", kind, scenario, directory],
            cwd=ROOT,
            env={"PATH": os.defpath, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
            timeout=500,
        )
    assert done.returncode == 0, done.stderr
    sweeps: int = json.loads(done.stdout)["sweeps"]
    return sweeps


@pytest.mark.parametrize(
    "scenario", [pytest.param(name, marks=pytest.mark.slow if name in IN_FULL else ()) for name in SCENARIOS]
)
def test_a_restore_killed_at_any_step_is_undone_whole(scenario: str) -> None:
    assert sweep("switch", scenario) > 50


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_an_undo_killed_at_any_step_is_repeated(scenario: str) -> None:
    assert sweep("undo", scenario) > 200
