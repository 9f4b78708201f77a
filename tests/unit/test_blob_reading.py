"""The program that reads blobs: its archives are GNU tar's, it tells all that it met, and it makes nothing up."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import socket
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hq_backups.engine.blobs import reading
from hq_backups.engine.blobs.headers import inside, members
from hq_backups.engine.blobs.judge import Judge
from hq_backups.engine.blobs.reading import BLOCK, LARGE, Broken, Reader
from hq_backups.engine.blobs.stream import BlobStream
from hq_backups.engine.errors import ProducerFailed, ProducerTruncated
from hq_backups.engine.events import Events
from hq_backups.engine.streams import PlainReader

SKIP = (b".ours-*", b"lost+found")


class Pipe:
    """The pipe that a reader writes to, and who takes what comes out of it."""

    def __init__(self) -> None:
        self._out, self.into = os.pipe()
        self.archive = b""
        self.held = threading.Event()
        """Unset, nothing is taken."""
        self.held.set()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while self.held.wait() and (data := os.read(self._out, 1 << 16)):
            self.archive += data

    def finish(self) -> bytes:
        """Return everything."""
        self.held.set()
        if self.into >= 0:
            os.close(self.into)
            self.into = -1
            self._thread.join()
            os.close(self._out)
        return self.archive


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe()
    yield made
    made.finish()


@pytest.fixture
def reader(pipe: Pipe) -> Reader:
    return Reader(pipe.into)


def read(reader: Reader, tree: Path) -> None:
    reader.read(os.fsencode(tree), SKIP)


def contents(archive: bytes) -> dict[bytes, tuple[int, bytes]]:
    """Return mode and bytes of each member, as our own unpacking sees them."""
    plain = PlainReader(io.BytesIO(archive), "none", "it")
    try:
        return {inside(m.name, "it"): (m.mode, b"".join(plain.pieces(m.size))) for m in members(plain)}
    finally:
        plain.close()


def on_call(
    monkeypatch: pytest.MonkeyPatch, name: str, when: Callable[..., bool], do: Callable[[], object]
) -> None:
    """Do something once before a call of ``os.<name>``."""
    real, done = getattr(os, name), []

    def call(*args: Any, **kwargs: Any) -> Any:
        if not done and when(*args):
            done.append(True)
            do()
        return real(*args, **kwargs)

    monkeypatch.setattr(os, name, call)


def failing(
    monkeypatch: pytest.MonkeyPatch, name: str, number: int, when: Callable[..., bool] = lambda *_: True
) -> None:
    real = getattr(os, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        if when(*args):
            raise OSError(number, os.strerror(number))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, name, call)


# What is written


def fill(tree: Path) -> None:
    """Make files of every kind of size and name."""
    names = [
        "a",
        "-rf",
        "n\nl",
        "\udcff\udcfe",
        "x" * 255,
        "ü中",
        "d/" + "y" * 200,
        "d/" * 60 + "deep",
        "l" * 98,
        "m" * 99,
    ]
    for number, name in enumerate(names):
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.fsencode(name) * number)
        path.chmod((0o600, 0o640, 0o4755)[number % 3])
        os.utime(path, (number, number * 1_000_000))
    sizes = (0, 1, BLOCK - 1, BLOCK, BLOCK + 1, LARGE - 1, LARGE, LARGE + 1, reading.BUFFER + 1, 3 << 20)
    for size in sizes:
        (tree / f"size-{size}").write_bytes(os.urandom(size))
    (tree / "empty").mkdir(mode=0o750)


def test_gnu_tar_finds_what_is_on_the_disk(tmp_path: Path, pipe: Pipe, reader: Reader) -> None:
    fill(tmp_path)
    read(reader, tmp_path)
    archive = pipe.finish()
    subprocess.run(
        ["tar", "--compare", "--file=-", f"--directory={tmp_path}"],
        input=archive,
        check=True,
        capture_output=True,
    )
    listed = subprocess.run(["tar", "-tf", "-"], input=archive, check=True, capture_output=True).stdout
    by_tar = subprocess.run(
        ["tar", "-cf", "-", "--format=gnu", f"--directory={tmp_path}", "."], check=True, capture_output=True
    ).stdout
    assert sorted(listed.splitlines()) == sorted(
        subprocess.run(["tar", "-tf", "-"], input=by_tar, check=True, capture_output=True).stdout.splitlines()
    )
    assert len(archive) == len(by_tar)
    assert reader.report()["written"] == len(archive)


def test_it_is_gnu_tar_s_archive_to_the_byte(tmp_path: Path, pipe: Pipe, reader: Reader) -> None:
    """One file to a directory: in which order names come is the file system's affair."""
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / ("long" * 40)).write_bytes(b"content" * 99)
    read(reader, tmp_path)
    by_tar = subprocess.run(
        ["tar", "-cf", "-", "--format=gnu", f"--directory={tmp_path}", "."], check=True, capture_output=True
    ).stdout
    # Whose a long name's own header is differs between versions of tar.
    ours = bytearray(pipe.finish())
    theirs = bytearray(by_tar)
    for archive in (ours, theirs):
        begin = archive.index(b"././@LongLink")
        del archive[begin + 100 : begin + 124], archive[begin + 124 : begin + 308]
    assert ours == theirs


def test_our_own_restore_reads_it(tmp_path: Path, pipe: Pipe, reader: Reader) -> None:
    fill(tmp_path)
    read(reader, tmp_path)
    found = contents(pipe.finish())
    top = os.fsencode(tmp_path)
    there = {os.path.relpath(os.fsencode(p), top): p for p in tmp_path.rglob("*")}
    assert found.keys() - {b""} == there.keys()
    for name, path in there.items():
        mode, content = found[name]
        assert mode == path.stat().st_mode & 0o7777
        assert content == (b"" if path.is_dir() else path.read_bytes())
    report = reader.report()
    files = [p for p in there.values() if p.is_file()]
    assert (report["files"], report["bytes"]) == (len(files), sum(p.stat().st_size for p in files))
    assert report["directories"] == len(there) - len(files)


def test_an_empty_directory_is_an_archive(tmp_path: Path, pipe: Pipe, reader: Reader) -> None:
    read(reader, tmp_path)
    archive = pipe.finish()
    assert len(archive) == reading.RECORD
    assert contents(archive).keys() == {b""}


def test_names_of_one_file_are_files_of_their_own(tmp_path: Path, pipe: Pipe, reader: Reader) -> None:
    (tmp_path / "a").write_bytes(b"content")
    os.link(tmp_path / "a", tmp_path / "b")
    read(reader, tmp_path)
    found = contents(pipe.finish())
    assert found[b"a"] == found[b"b"]
    assert found[b"a"][1] == b"content"


def test_what_is_to_be_left_out_is_and_only_at_the_top(tmp_path: Path, pipe: Pipe, reader: Reader) -> None:
    for name in (".ours-1/a", "lost+found/a", "lost+found2", "d/.ours-1", "d/lost+found"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    read(reader, tmp_path)
    assert contents(pipe.finish()).keys() == {b"", b"lost+found2", b"d", b"d/.ours-1", b"d/lost+found"}


@settings(deadline=None)
@given(
    st.binary(min_size=1, max_size=100).filter(lambda name: b"\0" not in name),
    st.integers(0, 0o7777),
    st.integers(0, 2**32 - 2),
    st.integers(0, 2**32 - 2),
    st.integers(0, 2**62),
    st.integers(0, 2**40),
)
def test_whatever_a_header_must_say_tarfile_reads(
    name: bytes, mode: int, uid: int, gid: int, size: int, mtime: int
) -> None:
    block = reading._block(name, reading._fields(mode, uid, gid, b"0"), size, mtime)
    assert len(block) == BLOCK
    member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    shown = name.decode("utf-8", "surrogateescape").rstrip("/")
    assert (member.name.rstrip("/"), member.mode, member.uid, member.gid) == (shown, mode, uid, gid)
    assert (member.size, member.mtime) == (size, mtime)


def test_a_file_of_before_1970_is_one_of_1970(tmp_path: Path, pipe: Pipe, reader: Reader) -> None:
    (tmp_path / "old").touch()
    os.utime(tmp_path / "old", (-100, -100))
    read(reader, tmp_path)
    with tarfile.open(fileobj=io.BytesIO(pipe.finish())) as tar:
        assert tar.getmember("./old").mtime == 0


def test_a_file_system_that_cannot_splice_is_read_all_the_same(
    tmp_path: Path, pipe: Pipe, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        (tmp_path / name).write_bytes(os.urandom(3 << 20))
    failing(monkeypatch, "splice", errno.EINVAL)
    read(reader, tmp_path)
    found = contents(pipe.finish())
    assert {name: found[name.encode()][1] for name in "ab"} == {
        name: (tmp_path / name).read_bytes() for name in "ab"
    }


def test_what_the_system_writes_only_in_part_is_written_on(
    tmp_path: Path, pipe: Pipe, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path)
    monkeypatch.setattr(os, "writev", lambda fd, pieces: os.write(fd, b"".join(pieces)[:700]))
    read(reader, tmp_path)
    archive = pipe.finish()
    assert reader.report()["written"] == len(archive)
    assert contents(archive)[b"size-65535"][1] == (tmp_path / "size-65535").read_bytes()


def test_the_smallest_files_are_never_more_pieces_than_the_system_takes(
    tmp_path: Path, pipe: Pipe, reader: Reader
) -> None:
    for n in range(3000):
        (tmp_path / str(n)).write_bytes(b"x")
    read(reader, tmp_path)
    assert len(contents(pipe.finish())) == 3001


# What is met


def test_links_pipes_and_sockets_are_counted(tmp_path: Path, pipe: Pipe, reader: Reader) -> None:
    (tmp_path / "link").symlink_to("/etc")
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(tmp_path / "s"))
    (tmp_path / "file").touch()
    read(reader, tmp_path)
    assert contents(pipe.finish()).keys() == {b"", b"file"}
    found = reader.report()["left_out"]
    assert found["count"] == {"symbolic links": 1, "pipes": 1, "sockets": 1}
    assert sorted(found["names"]) == ["'link'", "'pipe'", "'s'"]


@pytest.mark.parametrize("what", ["file", "directory"])
def test_what_vanishes_before_it_is_opened_is_recorded(
    tmp_path: Path, pipe: Pipe, reader: Reader, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    path = tmp_path / "gone"
    path.touch() if what == "file" else path.mkdir()
    on_call(
        monkeypatch, "open", lambda name, *_: name == b"gone", path.unlink if what == "file" else path.rmdir
    )
    read(reader, tmp_path)
    assert contents(pipe.finish()).keys() == {b""}
    assert reader.report()["vanished"] == {"count": 1, "names": ["'gone'"]}


@pytest.mark.parametrize("what", ["link", "pipe", "directory"])
def test_what_comes_in_a_file_s_place_is_not_followed(
    tmp_path: Path, pipe: Pipe, reader: Reader, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    path = tmp_path / "file"
    path.touch()

    def replace() -> None:
        path.unlink()
        if what == "link":
            path.symlink_to("/etc/passwd")
        elif what == "pipe":
            os.mkfifo(path)
        else:
            path.mkdir()

    on_call(monkeypatch, "open", lambda name, *_: name == b"file", replace)
    read(reader, tmp_path)
    assert contents(pipe.finish()).keys() == {b""}
    kind = {"link": "symbolic links", "pipe": "pipes", "directory": "others"}[what]
    assert reader.report()["left_out"]["count"] == {kind: 1}


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM])
def test_what_may_not_be_read_is_counted_files_and_directories_apart(
    tmp_path: Path, pipe: Pipe, reader: Reader, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    (tmp_path / "secret").touch()
    (tmp_path / "closed").mkdir()
    (tmp_path / "file").touch()
    failing(monkeypatch, "open", number, lambda name, *_: name in (b"secret", b"closed"))
    read(reader, tmp_path)
    assert contents(pipe.finish()).keys() == {b"", b"file"}
    report = reader.report()
    assert report["unreadable"] == {"count": 1, "names": ["'secret'"]}
    assert report["unreadable_directories"] == {"count": 1, "names": ["'closed'"]}


@pytest.mark.parametrize("call", ["open", "read", "splice"])
def test_a_disk_that_fails_ends_it(
    tmp_path: Path, pipe: Pipe, reader: Reader, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    (tmp_path / "file").write_bytes(b"x" * (LARGE if call == "splice" else 100))
    failing(monkeypatch, call, errno.EIO, lambda name, *_: call != "open" or name == b"file")
    with pytest.raises(Broken, match=r"unread: 'file' Input/output error"):
        read(reader, tmp_path)
    assert len(pipe.finish()) < reading.RECORD or call == "splice"


@pytest.mark.parametrize("size", [100, LARGE - 1, LARGE, 3 << 20])
def test_a_file_that_shrinks_before_it_is_read_ends_it_and_nothing_is_put_in_its_place(
    tmp_path: Path, pipe: Pipe, reader: Reader, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * size)
    read_by = "splice" if size >= LARGE else "read"
    on_call(monkeypatch, read_by, lambda *_: True, lambda: os.truncate(path, size - 1))
    with pytest.raises(Broken, match="shrank: 'file'"):
        read(reader, tmp_path)
    assert len(pipe.finish()) < size + reading.RECORD
    assert b"\0" * BLOCK not in pipe.archive[2 * BLOCK :]


def test_a_copied_file_that_shrinks_ends_it_and_nothing_is_put_in_its_place(
    tmp_path: Path, pipe: Pipe, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * (3 << 20))
    failing(monkeypatch, "splice", errno.EINVAL)
    on_call(monkeypatch, "read", lambda *_: True, lambda: os.truncate(path, 1 << 20))
    with pytest.raises(Broken, match="shrank: 'file'"):
        read(reader, tmp_path)
    assert b"\0" * BLOCK not in pipe.finish()[2 * BLOCK :]


def test_a_large_file_that_is_cut_while_its_bytes_are_in_the_pipe_ends_it(
    tmp_path: Path, pipe: Pipe, reader: Reader
) -> None:
    """What lies in the pipe is the file's own memory: the kernel puts zeros there at once."""
    path = tmp_path / "file"
    path.write_bytes(b"x" * LARGE)
    pipe.held.clear()
    failed: list[BaseException] = []

    def run() -> None:
        try:
            read(reader, tmp_path)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    # The pipe has room for the whole of it, and for the archive's end.
    reading.fcntl.fcntl(pipe.into, reading.fcntl.F_SETPIPE_SZ, 1 << 20)
    thread.start()
    while reader.written < LARGE:
        pass
    os.truncate(path, LARGE - 100)
    pipe.held.set()
    thread.join()
    assert [str(error) for error in failed] == ["shrank: 'file' "]


@pytest.mark.parametrize("size", [100, 3 << 20])
@pytest.mark.parametrize("how", ["grows", "is written over", "is written over and its time set back"])
def test_a_file_that_changes_while_it_is_read_is_told(
    tmp_path: Path, pipe: Pipe, reader: Reader, monkeypatch: pytest.MonkeyPatch, size: int, how: str
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * size)
    os.utime(path, (1, 1))

    def change() -> None:
        with path.open("ab" if how == "grows" else "r+b") as file:
            file.write(b"more")
        if how.endswith("set back"):
            os.utime(path, (1, 1))

    on_call(monkeypatch, "splice" if size >= LARGE else "read", lambda *_: True, change)
    read(reader, tmp_path)
    assert len(contents(pipe.finish())[b"file"][1]) == size
    assert reader.report()["changed"] == {"count": 1, "names": ["'file'"]}


@pytest.mark.parametrize("how", ["unlink", "link", "chmod", "rename"])
def test_a_file_whose_bytes_stay_has_not_changed(
    tmp_path: Path, pipe: Pipe, reader: Reader, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    path = tmp_path / "d" / "file"
    path.parent.mkdir()
    path.write_bytes(b"x" * 100)
    change: dict[str, Callable[[], object]] = {
        "unlink": path.unlink,
        "link": lambda: os.link(path, tmp_path / "other"),
        "chmod": lambda: path.chmod(0o600),
        "rename": lambda: path.rename(tmp_path / "d" / "renamed"),
    }
    on_call(monkeypatch, "read", lambda *_: True, change[how])
    read(reader, tmp_path)
    assert contents(pipe.finish())[b"d/file"][1] == b"x" * 100
    # A file that was only renamed looks like one that was written to and set back.
    assert reader.report()["changed"]["count"] == (how == "rename")


def test_a_directory_that_changes_while_it_is_read_is_recorded(
    tmp_path: Path, pipe: Pipe, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "file").write_bytes(b"x")
    on_call(monkeypatch, "read", lambda *_: True, lambda: (tmp_path / "d" / "new").touch())
    read(reader, tmp_path)
    pipe.finish()
    assert reader.report()["changed_directories"] == {"count": 1, "names": ["'d'"]}


@pytest.mark.parametrize(("depth", "good"), [(127, True), (128, False)])
def test_what_is_too_deep_to_be_restored_ends_it(
    tmp_path: Path, pipe: Pipe, reader: Reader, depth: int, good: bool
) -> None:
    path = tmp_path.joinpath(*["d"] * depth)
    path.mkdir(parents=True)
    (path / "file").touch()
    if good:
        read(reader, tmp_path)
        assert len(contents(pipe.finish())) == depth + 2
        return
    with pytest.raises(Broken, match="deep"):
        read(reader, tmp_path)


def test_a_directory_that_is_not_there_is_no_empty_archive(tmp_path: Path, reader: Reader) -> None:
    with pytest.raises(Broken, match="unread"):
        read(reader, tmp_path / "gone")


def test_names_of_what_was_met_are_bounded(tmp_path: Path, pipe: Pipe, reader: Reader) -> None:
    for n in range(100):
        (tmp_path / str(n)).symlink_to("x")
    read(reader, tmp_path)
    pipe.finish()
    assert reader.report()["left_out"]["count"] == {"symbolic links": 100}
    assert len(reader.report()["left_out"]["names"]) == reading.SHOWN


# The program


def stream_of(tree: Path) -> contextlib.closing[BlobStream]:
    return contextlib.closing(BlobStream(tree, Events(lambda _: None)))


def drain(stream: BlobStream) -> bytes:
    archive, buffer = b"", memoryview(bytearray(1 << 20))
    while count := stream.readinto(buffer):
        archive += buffer[:count]
    return archive


def test_the_program_s_report_is_what_the_manifest_gets(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "link").symlink_to("x")
    with stream_of(tmp_path) as stream:
        found = contents(drain(stream))
        facts = stream.finish()
    files = sum(p.is_file() and not p.is_symlink() for p in tmp_path.rglob("*"))
    assert (facts["files"], facts["directories"]) == (files, len(found) - 1 - files)
    assert facts["left_out"] == {"count": {"symbolic links": 1}, "names": ["'link'"]}
    assert "vanished" not in facts


def test_a_report_of_the_longest_names_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noted = {"count": 20, "names": ["\\udc80" * reading.MAX_NAME] * reading.SHOWN}
    nothing: dict[str, Any] = {"count": 0, "names": []}
    report = {
        **dict.fromkeys(("vanished", "changed", "changed_directories", "unreadable"), noted),
        **{"unreadable_directories": nothing, "left_out": {"count": {}, "names": []}, "broken": None},
        **{"files": 100_000, "directories": 1, "bytes": 1, "written": 0},
    }
    program = "import os, sys; os.write(int(sys.argv[2]), open(sys.argv[1] + '/report', 'rb').read())"
    (tmp_path / "report").write_text(json.dumps(report))
    monkeypatch.setattr("hq_backups.engine.blobs.stream.PROGRAM", (sys.executable, "-c", program))
    with stream_of(tmp_path) as blobs:
        assert drain(blobs) == b""
        assert blobs.finish()["vanished"] == noted


def test_a_program_that_dies_before_its_end_is_no_end(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(os.urandom(4 << 20))
    with stream_of(tmp_path) as stream:
        stream.readinto(memoryview(bytearray(1 << 16)))
        stream._reader.kill()
        with pytest.raises(ProducerFailed, match=r"the reader of the blobs.*SIGKILL"):
            drain(stream)


def test_a_program_that_was_broken_off_says_by_what(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(4 << 20))
    with stream_of(tmp_path) as stream:
        stream.readinto(memoryview(bytearray(1 << 16)))
        os.truncate(path, 100)
        with pytest.raises(ProducerTruncated, match="'file' became shorter while it was read"):
            drain(stream)


def test_it_ends_when_nobody_reads(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(os.urandom(4 << 20))
    with stream_of(tmp_path) as stream:
        stream.readinto(memoryview(bytearray(1 << 16)))
        assert stream._reader.popen.stdout is not None
        stream._reader.popen.stdout.close()
        assert stream._reader.wait(30)
        assert stream._reader.reap() == 1
        assert stream._reader.stderr_tail == ""


def report(**changes: Any) -> dict[str, Any]:
    none = {"count": 0, "names": []}
    noted = ("vanished", "changed", "changed_directories", "unreadable", "unreadable_directories")
    made: dict[str, Any] = {
        "files": 999,
        "directories": 1,
        "bytes": 1,
        "left_out": {"count": {}, "names": []},
    }
    return {**made, **dict.fromkeys(noted, none), **changes}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"unreadable": {"count": 1, "names": ["'a'"]}}, None),
        ({"unreadable": {"count": 2, "names": ["'a'", "'b'"]}}, "2 of 1001 files cannot be read: 'a', 'b'"),
        ({"unreadable_directories": {"count": 1, "names": ["'d'"]}}, "would be missing: 'd'"),
        ({"vanished": {"count": 500, "names": ["'a'"]}, "changed": {"count": 500, "names": ["'b'"]}}, None),
    ],
)
def test_what_was_met_decides(changes: dict[str, Any], words: str | None) -> None:
    judge = Judge(report(**changes))
    if words is None:
        judge.require()
        assert judge.facts().keys() >= changes.keys()
        return
    with pytest.raises(ProducerTruncated, match=words) as raised:
        judge.require()
    assert "blobdb_backup_os_user" in raised.value.hint
