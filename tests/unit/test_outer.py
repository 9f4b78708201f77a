"""Where a restore puts directories outside the data directory: never where anything is, never on a manifest's word."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from hq_backups.engine import outer, space
from hq_backups.engine.errors import NotEnoughSpace, PreflightFailed
from hq_backups.engine.stores.base import Outer
from hq_backups.engine.unfinished import Unfinished, left

RUN = "20261122T000002Z-pg0-postgres"
LATER = "20261129T000002Z-pg0-postgres"
ME = os.geteuid()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Make a place whose parents belong to us or root, as a host's do."""
    for name in ("data/main", "disks"):
        (tmp_path / name).mkdir(parents=True)
    return tmp_path


def place(home: Path, *locations: Path | str, run: str = RUN) -> list[Path]:
    wanted = [Outer(str(16384 + n), Path(each)) for n, each in enumerate(locations)]
    return list(outer.places(wanted, home / "data" / "main", run, ME).values())


def full(path: Path) -> Path:
    path.mkdir()
    (path / "PG_15_202209061").mkdir()
    return path


def test_where_nothing_is_it_goes_where_it_was(home: Path) -> None:
    (home / "disks" / "empty").mkdir()
    wanted = [home / "disks" / "a b", home / "disks" / "empty"]
    assert place(home, *wanted) == wanted


def test_what_is_taken_gets_a_sibling(home: Path) -> None:
    live = full(home / "disks" / "fast")
    (first,) = place(home, live)
    assert first == home / "disks" / f"fast.{RUN}"
    full(first)
    # Restored once more, from a backup of the restored one: names do not grow.
    assert place(home, first, run=LATER) == [home / "disks" / f"fast.{LATER}"]
    assert place(home, first) == [home / "disks" / f"fast.{RUN}.2"]


def test_a_file_or_a_link_is_taken(home: Path) -> None:
    (home / "disks" / "file").touch()
    (home / "disks" / "empty").mkdir()
    (home / "disks" / "link").symlink_to(home / "disks" / "empty")
    (home / "disks" / "dangling").symlink_to(home / "nowhere")
    for name in ("file", "link", "dangling"):
        assert place(home, home / "disks" / name) == [home / "disks" / f"{name}.{RUN}"]


def test_two_never_meet(home: Path) -> None:
    same = home / "disks" / "fast"
    found = place(home, same, same, same)
    assert found == [same, same.with_name(f"fast.{RUN}"), same.with_name(f"fast.{RUN}.2")]
    (home / "disks" / "empty").mkdir()
    above, below = place(home, home / "disks" / "empty", home / "disks" / "empty" / "in it")
    assert above not in below.parents


@pytest.mark.parametrize(
    "location",
    [
        "",
        ".",
        "relative/path",
        "pg_tblspc/16384",
        "/",
        "/srv",
        "/etc/hq",
        "/usr/local/x",
        "/root/x",
        "/proc/self/x",
        "{home}/disks/../../etc/x",
        "{home}/disks/no\0name",
        "{home}/disks/" + "n" * 300,
        "{home}/disks/.ssh",
        "{home}/disks/.verify-x",
        "{home}/nothing here/x",
        "{home}/data/main",
        "{home}/data/main/inside",
        "{home}/data",
        "{home}",
        "{home}/link to etc/x",
        "{home}/link to the data/x",
        "{home}/open to all/x",
        "{home}/disks/PG_15_202209061",
        "/tmp/x",
    ],
)
def test_a_manifest_is_not_followed_where_it_must_not(home: Path, location: str) -> None:
    (home / "link to etc").symlink_to("/etc")
    (home / "link to the data").symlink_to(home / "data" / "main")
    (home / "open to all").mkdir()
    (home / "open to all").chmod(0o777)
    (found,) = place(home, location.format(home=home))
    assert found == home / "data" / "main.outer-16384"


@pytest.mark.root
def test_an_empty_directory_of_somebody_else_is_left_to_him(home: Path) -> None:
    theirs = home / "disks" / "theirs"
    theirs.mkdir()
    os.chown(theirs, 65534, 65534)
    assert place(home, theirs) == [home / "disks" / f"theirs.{RUN}"]
    below = theirs / "x"
    assert place(home, below) == [home / "data" / "main.outer-16384"]


def test_a_mount_point_that_is_taken_is_not_left_for_another_disk(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = full(home / "disks" / "ssd")
    monkeypatch.setattr(space, "is_mount_point", lambda path: path == disk)
    assert place(home, disk) == [disk / f"restored.{RUN}"]


def test_space_is_asked_of_every_disk(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [Outer("1", home / "disks" / "a", 700), Outer("2", home / "disks" / "b", 200)]
    chosen = outer.places(wanted, home / "data" / "main", RUN, ME)
    asked: list[tuple[Path, int]] = []
    monkeypatch.setattr(space, "require", lambda path, needed, *_: asked.append((path, needed)))
    outer.require_space(wanted, chosen, home, 1000)
    assert asked == [(home, 1000)]
    real, disks = os.stat, os.stat_result
    monkeypatch.setattr(
        os,
        "stat",
        lambda path, **k: (
            disks([*real(path)[:2], 7, *real(path)[3:]])
            if Path(str(path)).name == "disks"
            else real(path, **k)
        ),
    )
    asked.clear()
    outer.require_space(wanted, chosen, home, 1000)
    assert asked == [(home, 100), (home / "disks", 918)]
    monkeypatch.undo()
    with pytest.raises(NotEnoughSpace):
        outer.require_space(wanted, chosen, home, 1 << 60)


def test_a_copy_needs_an_empty_place(home: Path) -> None:
    outer.require_empty(home / "nothing")
    outer.require_empty(home / "disks")
    full(home / "full")
    (home / "link").symlink_to(home / "disks")
    for name in ("full", "link"):
        with pytest.raises(PreflightFailed, match="not an empty directory"):
            outer.require_empty(home / name)


# What a killed restore leaves


def made(home: Path, *, kept: bool = False) -> Unfinished:
    staging, apart = home / "data" / ".main.hq_backups-staging-x", home / "disks" / "fast"
    for directory in (staging, apart):
        full(directory)
    numbers = {str(apart): apart.stat().st_ino}
    found = Unfinished(
        RUN, home / "data" / "main", staging, staging.stat().st_ino, numbers, (apart,) if kept else ()
    )
    found.write()
    return found


def test_what_was_made_is_written_down_and_removed(home: Path) -> None:
    record = made(home)
    assert stat.S_IMODE(record.path.stat().st_mode) == 0o600
    (found,) = left(home / "data" / "main")
    assert found == record
    assert found.is_unused()
    found.remove()
    assert sorted(os.listdir(home / "data")) == ["main"]
    assert os.listdir(home / "disks") == []
    assert list(left(home / "data" / "main")) == []


def test_a_directory_that_was_there_before_stays(home: Path) -> None:
    made(home, kept=True).remove()
    assert os.listdir(home / "disks" / "fast") == []


def test_what_is_another_directory_by_now_stays(home: Path) -> None:
    record = made(home)
    (home / "disks" / "fast").rename(home / "disks" / "ours")
    full(home / "disks" / "fast")
    record.remove()
    assert sorted(os.listdir(home / "disks")) == ["fast", "ours"]


def test_a_tree_that_was_moved_is_in_use(home: Path) -> None:
    record = made(home)
    record.staging.rename(home / "data" / "main.failed")
    assert not record.is_unused()


def test_records_are_believed_only_from_ourselves(home: Path) -> None:
    record = made(home)
    body = record.path.read_bytes()
    record.path.chmod(0o666)
    assert list(left(record.target)) == []
    record.path.unlink()
    (home / "elsewhere").write_bytes(body)
    record.path.symlink_to(home / "elsewhere")
    assert list(left(record.target)) == []
    record.path.unlink()
    for content in (b"", b"{}", b"[" * 100_000, body.replace(b"main", b"other")):
        record.path.write_bytes(content)
        record.path.chmod(0o600)
        assert list(left(record.target)) == []
