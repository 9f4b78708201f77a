"""Blobs by command: merging, single blobs, and what HQ's own records say, with a model that stands for BlobMeta."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from django.core.management import call_command
from django.db import connection, models

from hq_backups import blob_records
from hq_backups.engine.accounts import me
from tests.testbed.process import short_directory

pytestmark = pytest.mark.django_db(transaction=True)
OLD = datetime.now(UTC) - timedelta(days=2)


class StoredBlob(models.Model):
    """What HQ's BlobMeta has, as far as a verifier looks at it."""

    key = models.CharField(max_length=255, unique=True)
    content_length = models.PositiveBigIntegerField()
    compressed_length = models.PositiveBigIntegerField(null=True)
    created_on = models.DateTimeField()

    class Meta:
        """Belong to no installed app."""

        app_label = "stands_for_hq"

    def __str__(self) -> str:
        return self.key


def sampled(limit: int) -> Iterator[blob_records.Row]:
    """Sample that model."""
    return blob_records.of_model(StoredBlob, limit)


def failing(limit: int) -> Iterator[blob_records.Row]:
    """Be as a database that is down."""
    raise ConnectionError("no route to host")


@dataclass
class Ended:
    code: int
    out: str
    err: str


def run(*words: str) -> Ended:
    out, err = io.StringIO(), io.StringIO()
    with pytest.raises(SystemExit) as ended:
        call_command(*words, stdout=out, stderr=err)
    assert isinstance(ended.value.code, int)
    return Ended(ended.value.code, out.getvalue(), err.getvalue())


@pytest.fixture
def table() -> Iterator[None]:
    with connection.schema_editor() as editor:
        editor.create_model(StoredBlob)
    yield
    with connection.schema_editor() as editor:
        editor.delete_model(StoredBlob)


@pytest.fixture
def blobs(settings: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a blob directory of twenty blobs with one backup."""
    monkeypatch.setattr("os.sync", lambda: None)
    with short_directory() as home:
        data = home / "blobdb"
        for n in range(20):
            path = data / f"form-{n}" / "attachment"
            path.parent.mkdir(parents=True)
            path.write_bytes(os.urandom(100 + n))
        settings.HQ_BACKUPS = {
            "backup_postgres": False,
            "backup_blobdb": True,
            "blobdb_dir_path": str(data),
            "blobdb_backup_dir": str(home / "backups"),
            "blobdb_backup_os_user": me(),
            "blobdb_restore_owner": me(),
            "blobdb_verifier": f"{__name__}.sampled",
        }
        ended = run("run_backup", "blobdb")
        assert ended.code == 0, ended.err
        yield data


def record(data: Path, *, lost: int = 0) -> None:
    """Let the model know every blob, a compressed one too, and some that are not there."""
    for n, path in enumerate(sorted(data.rglob("attachment"))):
        size = path.stat().st_size
        compressed = size if n % 2 else None
        StoredBlob.objects.create(
            key=str(path.relative_to(data)),
            content_length=size * 7 if n % 2 else size,
            compressed_length=compressed,
            created_on=OLD,
        )
    for n in range(lost):
        StoredBlob.objects.create(key=f"lost/{n}", content_length=1, created_on=OLD)


@pytest.mark.parametrize("options", [(), ("--deep",)])
def test_a_backup_is_compared_with_what_the_database_says(
    blobs: Path, table: None, options: tuple[str, ...]
) -> None:
    record(blobs)
    StoredBlob.objects.create(
        key="since/then", content_length=5, created_on=datetime.now(UTC) + timedelta(hours=1)
    )
    ended = run("verify_backup", "latest", "--store", "blobdb", *options)
    assert ended.code == 0, ended.err
    assert "as HQ's database records them" in ended.out
    record_of = StoredBlob.objects.get(key="form-3/attachment")
    record_of.content_length, record_of.compressed_length = 1, None
    record_of.save()
    for _ in range(10):  # a sample of so few rows may miss one
        ended = run("verify_backup", "latest", "--store", "blobdb", *options)
        if ended.code == 3:
            break
    assert ended.code == 3
    assert "'form-3/attachment' (" in ended.err
    assert "recorded are 1" in ended.err


def test_a_blob_that_the_database_knows_and_the_backup_lacks_is_found(blobs: Path, table: None) -> None:
    record(blobs, lost=40)
    ended = run("verify_backup", "latest", "--store", "blobdb")
    assert ended.code == 3
    assert "are not in it: 'lost/" in ended.err


@pytest.mark.parametrize(
    ("verifier", "words"),
    [
        (False, "blobdb_verifier is switched off"),
        (f"{__name__}.failing", "no route to host"),
        ("no.such.function", "No module named 'no'"),
        ("hq_backups.blob_records.blob_meta", "HQ is not installed here"),
        (f"{__name__}.sampled", "no such table"),
    ],
)
def test_a_backup_is_verified_without_records_and_that_is_said(
    blobs: Path, settings: Any, verifier: Any, words: str
) -> None:
    settings.HQ_BACKUPS = {**settings.HQ_BACKUPS, "blobdb_verifier": verifier}
    ended = run("verify_backup", "latest", "--store", "blobdb")
    assert ended.code == 0, ended.err
    assert "not compared with HQ's records of blobs" in ended.out + ended.err
    assert words in ended.out + ended.err


def test_an_empty_table_is_no_proof(blobs: Path, table: None) -> None:
    ended = run("verify_backup", "latest", "--store", "blobdb")
    assert ended.code == 0
    assert "knows no blobs" in ended.out


def test_a_sample_is_bounded(table: None) -> None:
    StoredBlob.objects.bulk_create(
        StoredBlob(key=str(n), content_length=n, created_on=OLD) for n in range(3000)
    )
    found = blob_records.sample(f"{__name__}.sampled")
    assert 100 < len(found) <= blob_records.LIMIT
    assert all(each.size == int(each.key) for each in found)


def test_what_is_missing_is_merged_by_command(blobs: Path) -> None:
    shutil.rmtree(blobs / "form-3")
    (blobs / "form-4" / "attachment").write_bytes(b"another")
    ended = run("restore_backup", "blobdb", "latest", "--merge", "--noinput", "--confirm-env", "testing")
    assert ended.code == 0, ended.err
    assert "1 blobs were added, 18 were there already" in ended.out
    assert "left as they are: 'form-4/attachment'" in ended.out + ended.err
    assert (blobs / "form-4" / "attachment").read_bytes() == b"another"


def test_single_blobs_are_brought_beside_by_command(blobs: Path) -> None:
    beside = blobs.parent / "beside"
    words = (
        "--target-dir",
        str(beside),
        "--noinput",
        "--confirm-env",
        "testing",
        "--only",
        "form-3",
        "form-5",
    )
    assert run("restore_backup", "blobdb", "latest", *words).code == 0
    assert sorted(os.listdir(beside)) == ["form-3", "form-5"]
    shutil.rmtree(beside)
    ended = run("restore_backup", "blobdb", "latest", *words, "form-99")
    assert ended.code == 3
    assert "form-99" in ended.err
    assert not beside.exists()


@pytest.mark.parametrize(
    "words",
    [
        ("blobdb", "latest", "--only", "a"),
        ("blobdb", "latest", "--merge", "--target-dir", "/x"),
        ("blobdb", "latest", "--merge", "--staging-dir", "/x"),
        ("blobdb", "latest", "--merge", "--in-place"),
        ("blobdb", "--undo", "--merge"),
        ("postgres", "latest", "--merge"),
        ("postgres", "latest", "--only", "a", "--target-dir", "/x"),
    ],
)
def test_options_that_do_not_go_together_are_refused(blobs: Path, words: tuple[str, ...]) -> None:
    assert run("restore_backup", *words, "--noinput", "--confirm-env", "testing").code == 2


def test_blobs_that_hq_keeps_in_s3_are_not_backed_up(blobs: Path, settings: Any) -> None:
    settings.S3_BLOB_DB_SETTINGS = {"url": "https://s3.example.com"}
    ended = run("run_backup", "blobdb", "--type", "weekly")
    assert ended.code == 2
    assert "HQ keeps its blobs in S3" in ended.err


def test_another_directory_than_hq_uses_is_not_backed_up(blobs: Path, settings: Any) -> None:
    other = blobs.parent / "other"
    other.mkdir()
    settings.SHARED_DRIVE_CONF = SimpleNamespace(blob_dir=str(other))
    ended = run("run_backup", "blobdb", "--type", "weekly")
    assert ended.code == 2
    assert f"but HQ keeps its blobs in {other}" in ended.err
    other.rmdir()
    other.symlink_to(blobs)
    assert run("run_backup", "blobdb", "--type", "weekly").code == 0
