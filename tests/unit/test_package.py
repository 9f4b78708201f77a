"""What is built to be installed has the page's templates and style in it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import hq_backups

ROOT = Path(hq_backups.__file__).parent.parent


def test_a_wheel_has_every_template_and_static_file(tmp_path: Path) -> None:
    for name in ("setup.py", "pyproject.toml", "README.rst"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(
        ROOT / "hq_backups",
        tmp_path / "hq_backups",
        ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"),
    )
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('dist'))"
    (tmp_path / "dist").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    with zipfile.ZipFile(tmp_path / "dist" / done.stdout.splitlines()[-1]) as wheel:
        inside = set(wheel.namelist())
    package = ROOT / "hq_backups"
    wanted = {
        str(path.relative_to(ROOT))
        for directory in ("templates", "static")
        for path in (package / directory).rglob("*")
        if path.is_file()
    }
    assert "hq_backups/static/hq_backups/history.css" in wanted
    assert "hq_backups/templates/admin/hq_backups/backuprun/change_list.html" in wanted
    assert wanted <= inside
