"""Asking the kernel for blobs before they are read: in the same order, never too far, and of no harm."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import mmap
import os
import random
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from hq_backups.engine.blobs import asking, reading
from hq_backups.engine.blobs.ahead import Ahead
from hq_backups.engine.blobs.asking import Ended, Passed, ask_ahead, ask_for, files, in_memory
from hq_backups.engine.blobs.stream import BlobStream
from hq_backups.engine.events import Events
from tests.testbed.process import alive, wait_until

SIZE = 5000
LIBC = ctypes.CDLL(None)


def make(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * SIZE)


def many(root: Path, count: int) -> None:
    """Make files that cost nothing: one, under many names."""
    make(root, "first")
    for n in range(1, count):
        os.link(root / "first", root / f"{n}")


def listed(root: Path) -> list[str]:
    return [os.path.relpath(os.fsdecode(entry.path), root) for entry in files(os.fsencode(root), b".ours-")]


def forget(root: Path) -> None:
    for path in root.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def lies_in_memory(path: Path) -> bool:
    """Ask mincore(2): to try to read without waiting makes Linux begin to read."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        first = ctypes.c_char.from_buffer(mapped)
        resident = (ctypes.c_ubyte * (len(mapped) // mmap.PAGESIZE + 1))()
        asked = LIBC.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(len(mapped)), resident)
        del first
    assert asked == 0
    return bool(resident[0] & 1)


class Slow(Passed):
    """How far a reader is that passes some files only when it is waited for."""

    def __init__(self, step: int = 0, size: int = SIZE) -> None:
        self.files = self.bytes = 0
        self._step, self._size = step, size

    def look(self) -> None:
        pass

    def wait(self) -> None:
        if not self._step:
            raise Ended
        self.files += self._step
        self.bytes += self._step * self._size


@pytest.fixture
def nothing_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "in_memory", lambda batch: False)


def test_files_come_in_the_order_in_which_they_are_read(tmp_path: Path) -> None:
    make(tmp_path, *(f"{n % 7}/{n % 3}/{n}" for n in range(200)), "top", "0/between")
    (tmp_path / "link").symlink_to("top")
    os.mkfifo(tmp_path / "pipe")
    with contextlib.closing(BlobStream(tmp_path, Events(lambda _: None))) as stream:
        archive = b"".join(iter(functools.partial(some, stream), b""))
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        regular = [member.name.removeprefix("./") for member in tar if member.isreg()]

    assert listed(tmp_path) == regular


def some(stream: BlobStream) -> bytes:
    buffer = memoryview(bytearray(1 << 16))
    return bytes(buffer[: stream.readinto(buffer)])


def test_what_the_backup_leaves_out_is_not_asked_for_and_only_at_the_top(tmp_path: Path) -> None:
    make(tmp_path, ".ours-1/a", "b/.ours-2/c")

    assert listed(tmp_path) == ["b/.ours-2/c"]


def test_a_directory_that_is_not_there_is_as_good_as_empty(tmp_path: Path) -> None:
    assert listed(tmp_path / "gone") == []


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

    assert [path.count("d/") for path in listed(tmp_path)] == [300]


@pytest.mark.usefixtures("nothing_cached")
class TestHowFar:
    def test_so_many_files_are_asked_for_and_then_the_reader_is_waited_for(self, tmp_path: Path) -> None:
        many(tmp_path, asking.FILES + 900)
        asked: list[bytes] = []

        with pytest.raises(Ended):
            ask_ahead(os.fsencode(tmp_path), b".ours-", Slow(), lambda path: bool(asked.append(path)))
        assert len(asked) == asking.FILES

    def test_so_many_bytes_are_asked_for_and_then_the_reader_is_waited_for(self, tmp_path: Path) -> None:
        make(tmp_path, *(f"{n}" for n in range(20)))
        asked: list[bytes] = []

        def large(path: bytes) -> int:
            asked.append(path)
            return asking.BYTES // 4

        with pytest.raises(Ended):
            ask_ahead(os.fsencode(tmp_path), b".ours-", Slow(), large)
        assert len(asked) == 5

    def test_every_file_is_asked_for_once_while_the_reader_goes_on(self, tmp_path: Path) -> None:
        many(tmp_path, 3000)
        asked: list[bytes] = []
        reader = Slow(100, asking.BYTES // 700)

        def large(path: bytes) -> int:
            asked.append(path)
            return asking.BYTES // 700

        ask_ahead(os.fsencode(tmp_path), b".ours-", reader, large)
        assert sorted(asked) == sorted(os.fsencode(tmp_path / name) for name in listed(tmp_path))
        assert len(asked) == 3000

    def test_what_the_reader_has_passed_is_not_asked_for(self, tmp_path: Path) -> None:
        many(tmp_path, 3000)
        reader, asked = Slow(), []
        reader.files = 2000
        ask_ahead(os.fsencode(tmp_path), b".ours-", reader, lambda path: bool(asked.append(path)))

        assert len(asked) == 3000 - 2000 // asking.BATCH * asking.BATCH

    def test_a_batch_is_asked_for_as_the_inodes_lie(self, tmp_path: Path) -> None:
        names = [f"{n}" for n in range(300)]
        random.Random(1).shuffle(names)
        make(tmp_path, *names)
        asked: list[bytes] = []
        ask_ahead(os.fsencode(tmp_path), b".ours-", Slow(), lambda path: bool(asked.append(path)))

        assert [os.stat(path).st_ino for path in asked] == sorted(os.stat(path).st_ino for path in asked)


def test_files_that_lie_in_memory_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many(tmp_path, 3000)
    looked = 0

    def looking(batch: object) -> bool:
        nonlocal looked
        looked += 1
        return True

    monkeypatch.setattr(asking, "in_memory", looking)
    ask_ahead(os.fsencode(tmp_path), b".ours-", Slow(1000), lambda path: pytest.fail("it was asked for"))

    assert looked == 2


def test_what_is_in_memory_and_what_is_not_is_told_apart(tmp_path: Path) -> None:
    make(tmp_path, *(f"{n}" for n in range(100)))
    batch = list(files(os.fsencode(tmp_path), b".ours-"))
    assert in_memory(batch)

    forget(tmp_path)
    # A file system that is memory keeps them.
    kept = lies_in_memory(tmp_path / "0")
    assert in_memory(batch) is kept


@pytest.mark.parametrize("what", ["gone", "directory", "pipe", "link", "empty", "unreadable"])
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
    elif what == "unreadable":
        path.touch(mode=0)

    assert isinstance(ask_for(os.fsencode(path)), int)


def test_both_programs_tell_how_far_it_is_in_the_same_way() -> None:
    assert reading.TOLD.format == asking.TOLD.format


class TestTheProgram:
    def test_files_are_in_memory_before_they_are_read(self, tmp_path: Path) -> None:
        make(tmp_path, *(f"{n % 3}/späte \udce4 '{n}" for n in range(50)))
        forget(tmp_path)
        ahead = Ahead(tmp_path, ".ours-")
        try:
            made = [path for path in tmp_path.rglob("*") if path.is_file()]
            wait_until(lambda: all(map(lies_in_memory, made)), what="the files to be in memory")
        finally:
            ahead.close()

    def test_it_goes_on_when_it_is_told_how_far_the_reader_is(self, tmp_path: Path) -> None:
        many(tmp_path, 2 * asking.FILES)
        forget(tmp_path)
        ahead = Ahead(tmp_path, ".ours-")
        try:
            for passed in range(0, 2 * asking.FILES + 1, 64):
                with contextlib.suppress(BlockingIOError):
                    os.write(ahead.listens, reading.TOLD.pack(passed, passed * SIZE))
            assert ahead._child is not None
            assert ahead._child.wait(30)
            assert ahead._child.reap() == 0
        finally:
            ahead.close()

    def test_it_ends_with_the_process_that_it_was_handed_to(self, tmp_path: Path) -> None:
        many(tmp_path, 2 * asking.FILES)
        forget(tmp_path)
        ahead = Ahead(tmp_path, ".ours-")
        try:
            other = subprocess.Popen(["sleep", "300"], pass_fds=[ahead.listens])
            ahead.hand_over()
            assert ahead.listens == -1
            assert ahead._child is not None
            assert not ahead._child.wait(0.3)
            other.kill()
            other.wait()
            assert ahead._child.wait(30)
        finally:
            ahead.close()

    def test_it_ends_at_once_when_it_is_closed(self, tmp_path: Path) -> None:
        many(tmp_path, 2 * asking.FILES)
        ahead = Ahead(tmp_path, ".ours-")
        ahead.close()

        assert ahead._child is not None
        assert ahead._child.status == -signal.SIGKILL

    def test_it_ends_when_the_backup_is_killed(self, tmp_path: Path) -> None:
        many(tmp_path, 2 * asking.FILES)
        code = (
            "import sys, time; from pathlib import Path; from hq_backups.engine.blobs.ahead import Ahead;"
            "ahead = Ahead(Path(sys.argv[1]), '.ours-'); print(ahead._child.pid, flush=True); time.sleep(60)"
        )
        backup = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True)
        with backup:
            assert backup.stdout is not None
            asks = int(backup.stdout.readline())
            backup.kill()
        wait_until(lambda: not alive(asks), what="its end")

    @pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
    def test_a_backup_does_not_wait_for_one_that_is_dead_or_does_not_listen(
        self, tmp_path: Path, how: signal.Signals
    ) -> None:
        many(tmp_path, 6000)
        stream = BlobStream(tmp_path, Events(lambda _: None))
        with contextlib.closing(stream):
            assert stream._ahead._child is not None
            os.kill(stream._ahead._child.pid, how)
            while some(stream):
                pass
            assert stream.finish()["files"] == 6000

    def test_a_backup_goes_on_without_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        make(tmp_path, "a", "b/c")
        monkeypatch.setattr(sys, "executable", str(tmp_path / "gone"))
        with contextlib.closing(BlobStream(tmp_path, Events(lambda _: None))) as stream:
            assert stream._ahead.listens == -1
            while some(stream):
                pass
            assert stream.finish()["files"] == 2
