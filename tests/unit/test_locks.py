from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hq_backups.engine import locks
from hq_backups.engine.errors import Locked, PreflightFailed
from hq_backups.engine.locks import HOLDER_NAME, FileLock, StoreLock
from tests.testbed.process import as_user, short_directory

ROOT = str(Path(__file__).parents[2])
RUN = "20261122T000002Z-pg0-postgres"
HOLD = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from hq_backups.engine import locks
with locks.{kind}(Path({path!r}), {run!r}, "backup"):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(kind: str, path: Path, user: str | None = None) -> Iterator[subprocess.Popen[str]]:
    code = HOLD.format(root=ROOT, kind=kind, path=str(path), run=RUN)
    with subprocess.Popen(
        [sys.executable, "-I", "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        **as_user(user),
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        if process.poll() is None:
            process.communicate("")


@pytest.mark.parametrize("kind", ["StoreLock", "FileLock"])
class TestBoth:
    def path(self, kind: str, tmp_path: Path) -> Path:
        return tmp_path if kind == "StoreLock" else tmp_path / "target.lock"

    def test_a_second_run_is_told_who_holds_it(self, kind: str, tmp_path: Path) -> None:
        path = self.path(kind, tmp_path)
        with (
            holder(kind, path) as process,
            pytest.raises(Locked) as caught,
            getattr(locks, kind)(path, "b", "prune"),
        ):
            pass
        message = str(caught.value)
        assert f"another run holds {path}: run {RUN} (backup), pid {process.pid} of user " in message
        assert message.endswith(" UTC")
        assert caught.value.exit_code == 6

    def test_kill_9_frees_it_at_once(self, kind: str, tmp_path: Path) -> None:
        path = self.path(kind, tmp_path)
        with holder(kind, path) as process:
            process.send_signal(signal.SIGKILL)
            process.wait()
            with getattr(locks, kind)(path, "b", "prune"):
                pass

    def test_the_facts_of_a_dead_run_are_nobodys(self, kind: str, tmp_path: Path) -> None:
        path = self.path(kind, tmp_path)
        facts = path / HOLDER_NAME if kind == "StoreLock" else path
        with holder(kind, path) as process:
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert facts.stat().st_size
            assert locks.describe_holder(facts) == "an unknown process"

    def test_it_may_be_taken_again_after_release(self, kind: str, tmp_path: Path) -> None:
        lock = getattr(locks, kind)(self.path(kind, tmp_path), "a", "backup")
        for _ in range(2):
            with lock, pytest.raises(Locked):
                getattr(locks, kind)(self.path(kind, tmp_path), "b", "backup").acquire()
            lock.release()

    def test_a_child_that_outlives_us_does_not_keep_it(self, kind: str, tmp_path: Path) -> None:
        path = self.path(kind, tmp_path)
        with getattr(locks, kind)(path, "a", "backup"):
            child = subprocess.Popen(["sleep", "300"], close_fds=False)
        try:
            with getattr(locks, kind)(path, "b", "backup"):
                pass
        finally:
            child.kill()
            child.wait()

    def test_a_failed_attempt_leaves_no_descriptor(self, kind: str, tmp_path: Path) -> None:
        path = self.path(kind, tmp_path)
        with getattr(locks, kind)(path, "a", "backup"):
            before = len(os.listdir("/proc/self/fd"))
            with pytest.raises(Locked):
                getattr(locks, kind)(path, "b", "backup").acquire()
            assert len(os.listdir("/proc/self/fd")) == before

    def test_what_cannot_be_opened_is_explained(self, kind: str, tmp_path: Path) -> None:
        with pytest.raises(PreflightFailed, match="cannot be locked: No such file or directory") as caught:
            getattr(locks, kind)(tmp_path / "no" / "such", "a", "backup").acquire()
        assert "ls -ld" in caught.value.hint

    def test_a_symbolic_link_is_not_followed(self, kind: str, tmp_path: Path) -> None:
        real = tmp_path / "real"
        real.mkdir() if kind == "StoreLock" else real.touch()
        (tmp_path / "link").symlink_to(real)
        with pytest.raises(PreflightFailed):
            getattr(locks, kind)(tmp_path / "link", "a", "backup").acquire()


@pytest.mark.parametrize(
    "content",
    [
        b"", b"nonsense", b"[]", b"{}", b"null", b"[" * 4000, b"\xff" * 50,
        b'{"pid": "x", "run": 1, "verb": 1, "user": 1, "since": "?", "started": 1}',
    ],
)  # fmt: skip
def test_facts_that_cannot_be_read_are_nobodys(tmp_path: Path, content: bytes) -> None:
    with StoreLock(tmp_path, "a", "backup"):
        (tmp_path / HOLDER_NAME).write_bytes(content)
        with pytest.raises(Locked, match=r"an unknown process$"):
            StoreLock(tmp_path, "b", "backup").acquire()


def test_facts_of_a_reused_pid_are_nobodys(tmp_path: Path) -> None:
    with StoreLock(tmp_path, "a", "backup"):
        path = tmp_path / HOLDER_NAME
        path.write_text(json.dumps({**json.loads(path.read_text()), "started": 1}))
        assert locks.describe_holder(path) == "an unknown process"


def test_control_characters_in_facts_are_not_shown(tmp_path: Path) -> None:
    with StoreLock(tmp_path, "\x1b[2Jrun", "backup"):
        assert "\x1b" not in locks.describe_holder(tmp_path / HOLDER_NAME)


def test_facts_go_away_with_the_lock(tmp_path: Path) -> None:
    with StoreLock(tmp_path, "a", "backup"):
        assert os.listdir(tmp_path) == [HOLDER_NAME]
    assert os.listdir(tmp_path) == []


def test_a_directory_that_takes_no_facts_is_locked_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> bytes:
        raise OSError(errno.ENOSPC, "full")

    (tmp_path / HOLDER_NAME).write_text("a dead run's")
    monkeypatch.setattr(locks, "_facts", full)
    with StoreLock(tmp_path, "a", "backup"):
        assert os.listdir(tmp_path) == []
        with pytest.raises(Locked, match="an unknown process"):
            StoreLock(tmp_path, "b", "backup").acquire()


def test_where_directories_cannot_be_locked_a_file_in_them_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fcntl.flock

    def nfs(fd: int, operation: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EBADF, "not open for writing")
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", nfs)
    with StoreLock(tmp_path, "a", "backup"), pytest.raises(Locked, match=r"run a \(backup\)"):
        StoreLock(tmp_path, "b", "backup").acquire()
    with StoreLock(tmp_path, "b", "backup"):
        assert (tmp_path / locks.FALLBACK_NAME).stat().st_mode & 0o777 == 0o600


def test_a_lock_file_is_private(tmp_path: Path) -> None:
    with FileLock(tmp_path / "f", "a", "restore"):
        assert (tmp_path / "f").stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
class TestAcrossUsers:
    def test_root_keeps_the_owner_out_and_tells_who_it_is(self) -> None:
        with short_directory("nobody") as directory, StoreLock(directory, "a", "restore"):
            done = subprocess.run(["flock", "-n", directory, "true"], check=False, **as_user("nobody"))
            assert done.returncode == 1
            seen = subprocess.check_output(["cat", directory / HOLDER_NAME], **as_user("nobody"))
            assert json.loads(seen)["user"] == "root"

    def test_the_owner_keeps_root_out(self) -> None:
        with short_directory("nobody") as directory:
            argv = ["flock", directory, "sh", "-c", "echo held; exec cat"]
            with subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **as_user("nobody")
            ) as process:
                assert process.stdout is not None
                assert process.stdout.readline() == b"held\n"
                with pytest.raises(Locked):
                    StoreLock(directory, "a", "restore").acquire()
                process.communicate(b"")
