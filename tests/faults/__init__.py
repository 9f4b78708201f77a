"""Tests that kill, fill disks and break networks."""

import pytest

pytest.register_assert_rewrite("tests.faults.engine_process", "tests.faults.victim")
