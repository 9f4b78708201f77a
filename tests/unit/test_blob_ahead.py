"""Asking the kernel for blobs before tar reads them: in tar's order, never too far, and of no harm."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path

import pytest

from hq_backups.engine.blobs import ahead
from hq_backups.engine.blobs.ahead import Ahead, files


def make(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 5000)


def test_files_come_in_the_order_in_which_tar_reads_them(tmp_path: Path) -> None:
    make(tmp_path, *(f"{n % 7}/{n % 3}/{n}" for n in range(200)), "top", "0/between")
    (tmp_path / "link").symlink_to("top")
    os.mkfifo(tmp_path / "pipe")
    listed = subprocess.run(
        ["tar", "--create", "--file=/dev/null", "--verbose", f"--directory={tmp_path}", "."],
        capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    regular = [
        name.removeprefix("./") for name in listed if (tmp_path / name).is_file() and "link" not in name
    ]

    assert [os.path.relpath(path, tmp_path) for path in files(str(tmp_path), ".ours-")] == regular


def test_what_the_backup_leaves_out_is_not_asked_for_and_only_at_the_top(tmp_path: Path) -> None:
    make(tmp_path, ".ours-1/a", "b/.ours-2/c")

    assert list(files(str(tmp_path), ".ours-")) == [str(tmp_path / "b/.ours-2/c")]


def test_a_directory_that_is_not_there_is_as_good_as_empty(tmp_path: Path) -> None:
    assert list(files(str(tmp_path / "gone"), ".ours-")) == []


def test_directories_deeper_than_any_stack_are_walked_with_one_open_each(tmp_path: Path) -> None:
    here = os.open(tmp_path, os.O_RDONLY)
    try:
        for _ in range(300):
            os.mkdir("d", dir_fd=here)
            below = os.open("d", os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = below
        os.close(os.open("f", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    finally:
        os.close(here)

    assert [path.count("/d") for path in files(str(tmp_path), ".ours-")] == [300]


def test_it_asks_for_so_many_files_and_then_waits_for_tar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, *(f"{n % 10}/{n}" for n in range(900)))
    asked: list[str] = []
    enough = threading.Semaphore(0)

    def note(path: str) -> bool:
        asked.append(path)
        enough.release()
        return True

    monkeypatch.setattr(ahead, "_asked", note)
    passed = [0]
    looking = Ahead(tmp_path, lambda: passed[0], ".ours-")
    try:
        for _ in range(ahead._FILES):
            assert enough.acquire(timeout=10)
        more = 0
        while enough.acquire(timeout=10 * ahead._PAUSE):
            more += 1
        assert more <= ahead._BATCH
        passed[0] = 900 - ahead._FILES
        for _ in range(900 - ahead._FILES - more):
            assert enough.acquire(timeout=10)
    finally:
        looking.close()


def test_files_that_lie_in_memory_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, *(f"{n}" for n in range(3000)))
    asked: list[str] = []
    monkeypatch.setattr(ahead, "_asked", lambda path: bool(asked.append(path)))
    looking = Ahead(tmp_path, lambda: 0, ".ours-")
    looking._passed = lambda: len(asked)
    for thread in looking._threads:
        thread.join(1)
    looking.close()

    assert 0 < len(asked) < 1000


def test_it_ends_at_once_when_it_is_closed(tmp_path: Path) -> None:
    make(tmp_path, *(f"{n}" for n in range(2000)))
    looking = Ahead(tmp_path, lambda: 0, ".ours-")
    looking.close()

    assert not any(thread.is_alive() for thread in looking._threads)


@pytest.mark.parametrize("what", ["gone", "directory", "pipe", "link", "empty"])
def test_what_is_no_file_with_bytes_does_no_harm(what: str, tmp_path: Path) -> None:
    path = tmp_path / what
    if what == "directory":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "link":
        path.symlink_to("elsewhere")
    elif what == "empty":
        path.touch()

    assert ahead._asked(str(path)) in (True, False)
