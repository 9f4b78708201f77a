"""The cron jobs of the old scripts are noticed wherever they could do harm."""

from __future__ import annotations

from pathlib import Path

import pytest

from hq_backups.engine import crons

JOB = "#Ansible: daily\n0 0 * * 1,2,3,4,5,6 postgres /usr/local/sbin/create_postgres_backup.sh daily 2\n"


@pytest.fixture
def cron_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(crons, "CRON_DIR", tmp_path)
    return tmp_path


@pytest.mark.parametrize("store", crons.FILES)
def test_a_job_that_is_installed_is_told_with_its_file(store: str, cron_dir: Path) -> None:
    assert crons.collision(store) is None
    (cron_dir / crons.FILES[store]).write_text(JOB)
    assert str(cron_dir / crons.FILES[store]) in (crons.collision(store) or "")


@pytest.mark.parametrize("text", ["", "\n  \n", "#0 0 * * * postgres x\n", "MAILTO=root\n# nothing\n"])
def test_a_file_without_a_job_does_nothing(text: str, cron_dir: Path) -> None:
    (cron_dir / "backup_postgres").write_text(text)
    assert crons.installed("postgres") is None


@pytest.mark.parametrize("line", ["*/5 * * * * root x", "@daily root x", "  15 */3 * * * root x"])
def test_every_way_of_writing_a_job_counts(line: str, cron_dir: Path) -> None:
    (cron_dir / "backup_couch").write_text(f"MAILTO=root\n{line}\n")
    assert crons.installed("couch") == cron_dir / "backup_couch"


def test_one_that_cannot_be_read_counts(cron_dir: Path) -> None:
    (cron_dir / "backup_blobdb").mkdir()
    assert crons.installed("blobdb") is not None
