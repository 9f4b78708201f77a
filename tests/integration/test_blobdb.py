"""Blobs through the engine: round trips, what happens to them while they are read, owners, merging, old archives."""

from __future__ import annotations

import io
import os
import shutil
import signal
import socket
import stat
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hq_backups.engine.blobs.stream import PROGRAM
from hq_backups.engine.config import Job
from hq_backups.engine.locks import FileLock, StoreLock
from hq_backups.engine.requests import BlobRecord, CheckRequest, Selection, VerifyRequest
from tests.faults.engine_process import Hold, Outcome
from tests.faults.producer import in_front
from tests.faults.test_memory import BOUND, Peak
from tests.faults.victim import processes
from tests.faults.victim_blobdb import BlobDirectory, BlobVictim, fingerprint
from tests.testbed.places import server_user
from tests.testbed.process import give, run_here, short_directory, wait_until
from tests.testbed.s3 import S3Service

ODD = [
    b"plain",
    b"-rf",
    b"with space",
    b"new\nline",
    b"\xff\xfe undecodable",
    "\u00fc\u4e2d\U0001f600".encode(),
    b"x" * 255,
    b"back\\slash\\n",
    b'quote"s',
    b"*?[a]",
    b"d/" * 60 + b"deep",
    b"long/" + b"y" * 200 + b"/" + b"z" * 200,
    b"tab\t\x1b[31m",
]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out sync(2): it waits for whatever else this machine writes."""
    monkeypatch.setattr("os.sync", lambda: None)


@pytest.fixture
def blobs() -> Iterator[BlobVictim]:
    with short_directory(server_user()) as home, BlobDirectory(home / "w") as directory:
        yield BlobVictim(home, directory)


@pytest.fixture
def filled(blobs: BlobVictim) -> BlobVictim:
    """Return a host with blobs of every odd name."""
    for n, name in enumerate(ODD):
        blobs.server.write(name, name * n, mode=(0o600, 0o640, 0o644, 0o664)[n % 4])
    blobs.server.write("empty", b"")
    blobs.server.write("large", os.urandom(3 << 20))
    return blobs


def do(victim: BlobVictim, job: Job, status: int = 0) -> Outcome:
    """Do a job as root here: quicker than another process, and the child is real."""
    return victim.here(job).expect(status)


def owners(tree: Path) -> set[tuple[int, int]]:
    return {(p.lstat().st_uid, p.lstat().st_gid) for p in tree.rglob("*")}


def source(victim: BlobVictim) -> dict[str, Any]:
    from hq_backups.engine.manifest import load_manifest

    name = victim.good()[0]["name"]
    return dict(load_manifest((victim.backups / f".{name}.json").read_bytes(), name).source)


# Round trips


def test_a_round_trip_keeps_every_name_byte_and_mode(filled: BlobVictim) -> None:
    before = fingerprint(filled.server.data_dir)
    do(filled, filled.backup())
    do(filled, filled.verify())
    assert "are as the manifest says" in str(do(filled, filled.verify(deep=True)).kind("check"))
    shutil.rmtree(filled.server.data_dir / "long")
    filled.server.write("plain", b"changed")
    outcome = do(filled, filled.restore())
    assert fingerprint(filled.server.data_dir) == before
    old = outcome.kind("data")[0]["old_data"]
    assert (Path(old) / "plain").read_bytes() == b"changed"
    do(filled, filled.undo())
    assert (filled.server.data_dir / "plain").read_bytes() == b"changed"
    counts = source(filled)
    assert (counts["files"], counts["bytes"]) == (
        len(ODD) + 2, (3 << 20) + sum(len(name) * n for n, name in enumerate(ODD)),
    )  # fmt: skip


def test_a_tar_by_hand_unpacks_it(filled: BlobVictim, tmp_path: Path) -> None:
    do(filled, filled.backup(changes={"compression": "gzip"}))
    (archive,) = filled.backups.glob("blobdb_daily_*.tar.gz")
    run_here("tar", "-xzf", archive, "-C", tmp_path)
    assert fingerprint(tmp_path) == fingerprint(filled.server.data_dir)


def test_it_goes_beside_and_to_a_host_that_has_none(filled: BlobVictim, tmp_path: Path) -> None:
    before = fingerprint(filled.server.data_dir)
    do(filled, filled.backup())
    do(filled, filled.restore(target_dir=filled.home / "beside"))
    assert fingerprint(filled.home / "beside") == before
    filled.server.data_dir.chmod(0o775)
    do(filled, filled.backup("weekly"))
    # Both may be of one second: which of them is the latest is no matter here.
    (weekly,) = (e["name"] for e in filled.good() if e["type"] == "weekly")
    shutil.rmtree(filled.server.data_dir)
    do(filled, filled.restore(weekly))
    assert fingerprint(filled.server.data_dir) == before
    assert stat.S_IMODE(filled.server.data_dir.stat().st_mode) == 0o775


def big_tree(victim: BlobVictim, files: int, large: int) -> None:
    """Write many small blobs, and one that is large and has holes."""
    for n in range(files):
        directory = victim.server.data_dir / f"{n % 97:02d}"
        if n < 97:
            directory.mkdir()
        (directory / f"{n:032x}").write_bytes(b"%d" % n * (n % 50))
    with (victim.server.data_dir / "large").open("wb") as file:
        file.truncate(large)
        for place in range(0, large, large // 8):
            file.seek(place)
            file.write(os.urandom(1 << 16))
    run_here("chown", "-R", f"{victim.user}:", victim.server.data_dir)


@pytest.mark.parametrize(
    ("files", "large"),
    [(5_000, 64 << 20), pytest.param(200_000, 3 << 30, marks=(pytest.mark.slow, pytest.mark.faults))],
)
def test_many_small_blobs_and_a_large_one_in_little_memory(blobs: BlobVictim, files: int, large: int) -> None:
    big_tree(blobs, files, large)
    before, ids = fingerprint(blobs.server.data_dir), owners(blobs.server.data_dir)
    for job in (blobs.backup(changes={"compression": "gzip"}), blobs.verify(), blobs.restore()):
        with blobs.engine(job) as engine, Peak(engine.pid) as peak:
            engine.wait(900).expect(0)
        print(f"{job.verb}: {peak.most >> 20} MiB at most, of {peak.samples} samples")
        assert peak.most < BOUND
    assert fingerprint(blobs.server.data_dir) == before
    assert owners(blobs.server.data_dir) == ids


# While they are read


class Meanwhile:
    """A backup that stands still after its first megabytes, so that blobs can change under it."""

    def __init__(self, victim: BlobVictim) -> None:
        self.victim = victim
        # One file is read after the other, in the order of the directory.
        for n in range(24):
            victim.server.write(f"b{n:02d}", os.urandom(1 << 20))
        self.names = os.listdir(victim.server.data_dir)

    def backup(self, change: Callable[[Path], None], status: int = 0) -> Outcome:
        """Change the blobs that are read last."""
        with in_front(self.victim) as fake:
            fake.plan(pause=1 << 20)
            with self.victim.engine(self.victim.backup()) as engine:
                while fake.reached is None:
                    assert engine.running
                for name in self.names[-4:]:
                    change(self.victim.server.data_dir / name)
                fake.go()
                return engine.wait().expect(status)


@pytest.fixture
def meanwhile(blobs: BlobVictim) -> Meanwhile:
    return Meanwhile(blobs)


def test_blobs_that_vanish_are_recorded_and_no_fault(meanwhile: Meanwhile) -> None:
    outcome = meanwhile.backup(Path.unlink)
    assert outcome.warnings == ""
    found = source(meanwhile.victim)
    assert found["vanished"]["count"] == 4
    assert sorted(found["vanished"]["names"]) == sorted(map(ascii, meanwhile.names[-4:]))
    assert found["files"] == 20


def test_a_reader_that_is_killed_in_the_middle_leaves_nothing(meanwhile: Meanwhile) -> None:
    victim = meanwhile.victim
    do(victim, victim.backup())
    with Hold(victim.tmp, 4 << 20) as hold, victim.engine(victim.backup("weekly"), hold.plan) as engine:
        wait_until(lambda: hold.reached, what="the middle of the backup")
        (pid,) = [pid for pid, words in processes() if f"{PROGRAM[-1]} {victim.server.data_dir} " in words]
        os.kill(pid, signal.SIGKILL)
        hold.go()
        outcome = engine.wait().expect(1)
    assert "SIGKILL" in outcome.errors
    assert [e["type"] for e in victim.good()] == ["daily"]
    victim.assert_clean()


def test_a_target_that_another_restore_works_on_is_left_alone(filled: BlobVictim) -> None:
    do(filled, filled.backup())
    data = filled.server.data_dir
    with FileLock(data.parent / f".{data.name}.hq_backups.lock", "another", "restore"):
        for job in (filled.restore(),):
            assert "run another (restore)" in do(filled, job, 6).errors
    with StoreLock(filled.backups, "another", "backup"):
        for job in (filled.restore(), filled.restore(merge=True), filled.backup()):
            assert "run another (backup)" in do(filled, job, 6).errors


def test_a_blob_that_grows_while_it_is_read_is_a_warning(blobs: BlobVictim) -> None:
    path = blobs.server.write("new\nline", os.urandom(24 << 20))
    before = path.read_bytes()
    with Hold(blobs.tmp, 1) as hold, blobs.engine(blobs.backup(), hold.plan) as engine:
        wait_until(lambda: hold.reached, what="the first bytes")
        with path.open("ab") as file:
            file.write(b"more")
        hold.go()
        outcome = engine.wait().expect(0)
    assert "changed: 1 files changed while they were read: 'new\\nline'" in outcome.warnings
    assert source(blobs)["changed"] == {"count": 1, "names": ["'new\\nline'"]}
    do(blobs, blobs.restore(target_dir=blobs.home / "beside"))
    assert (blobs.home / "beside" / "new\nline").read_bytes() == before


@pytest.mark.parametrize(("others", "status"), [(1200, 0), (50, 1)])
def test_an_unreadable_blob_is_a_warning_among_a_thousand(
    blobs: BlobVictim, others: int, status: int
) -> None:
    for n in range(others):
        (blobs.server.data_dir / str(n)).write_bytes(b"x")
    blobs.server.write("secret", b"x", mode=0)
    run_here("chown", "root:root", blobs.server.data_dir / "secret")
    outcome = blobs.run(blobs.backup()).expect(status)
    if status:
        assert "1 of 51 files cannot be read: 'secret'" in outcome.errors
        assert "blobdb_backup_os_user" in outcome.errors
        return
    assert "unreadable: 1 files could not be read and are not in the backup: 'secret'" in outcome.warnings
    assert source(blobs)["unreadable"]["count"] == 1
    blobs.run(blobs.restore()).expect(0)
    assert not (blobs.server.data_dir / "secret").exists()


def test_an_unreadable_directory_fails_the_run(filled: BlobVictim) -> None:
    (filled.server.data_dir / "long").chmod(0)
    run_here("chown", "root:root", filled.server.data_dir / "long")
    outcome = filled.run(filled.backup()).expect(1)
    assert "may not read a directory, and what is in it would be missing: 'long'" in outcome.errors


def test_the_lost_and_found_of_a_file_system_that_holds_only_blobs_is_not_looked_into(
    filled: BlobVictim,
) -> None:
    found = filled.server.data_dir / "lost+found"
    before = fingerprint(filled.server.data_dir)
    found.mkdir(mode=0o700)
    run_here("chown", "root:root", found)
    do(filled, filled.backup())
    do(filled, filled.restore())
    assert fingerprint(filled.server.data_dir) == before


def test_what_is_no_file_is_left_out_and_told(filled: BlobVictim) -> None:
    data = filled.server.data_dir
    before = fingerprint(data)
    (data / "link").symlink_to("/etc/passwd")
    os.mkfifo(data / "pipe")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(data / "socket"))
        outcome = do(filled, filled.backup())
    assert "1 pipes, 1 sockets, 1 symbolic links" in outcome.warnings
    do(filled, filled.restore())
    assert fingerprint(data) == before


# What holds less than before


def test_an_emptied_directory_is_an_alarm_and_no_backup(filled: BlobVictim) -> None:
    do(filled, filled.backup())
    for path in filled.server.data_dir.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    outcome = do(filled, filled.backup("weekly"), 5)
    assert "blobdb holds 0 files, at its last good backup" in outcome.errors
    assert "--accept-shrink" in outcome.errors
    assert len(filled.good()) == 1
    filled.assert_clean()
    do(filled, filled.backup("weekly", accept_shrink=True))
    assert len(filled.good()) == 2


def test_a_directory_that_lost_most_blobs_is_an_alarm(blobs: BlobVictim) -> None:
    for n in range(40):
        blobs.server.write(f"a/{n}", b"x")
    do(blobs, blobs.backup())
    for n in range(12):
        (blobs.server.data_dir / f"a/{n}").unlink()
    do(blobs, blobs.backup("weekly"))
    for n in range(12, 34):
        (blobs.server.data_dir / f"a/{n}").unlink()
    assert "holds 6 files" in do(blobs, blobs.backup("manual"), 5).errors


# In the bucket


def test_a_backup_in_the_bucket_is_judged_and_restored(
    filled: BlobVictim, s3: S3Service, versioned_bucket: str
) -> None:
    filled.use_bucket(s3, versioned_bucket)
    before = fingerprint(filled.server.data_dir)
    for type_ in ("daily", "weekly"):
        do(filled, filled.backup(type_))
    assert set(filled.objects()) == {
        f"blobdb_{type_}_pg0.tar{end}" for type_ in ("daily", "weekly") for end in ("", ".manifest.json")
    }
    found = do(filled, filled.job("check", CheckRequest("blobdb")))
    assert {e["severity"] for e in found.kind("finding")} == {"ok"}
    filled.forget()
    shutil.rmtree(filled.server.data_dir)
    do(filled, filled.restore(source="s3"))
    assert fingerprint(filled.server.data_dir) == before
    (filled.server.data_dir / "large").unlink()
    do(filled, filled.restore(source="s3", merge=True))
    assert fingerprint(filled.server.data_dir) == before


# Where they are


def test_a_directory_that_is_a_link_is_followed(filled: BlobVictim) -> None:
    link = filled.server.workdir / "link"
    link.symlink_to(filled.server.data_dir)
    before = fingerprint(filled.server.data_dir)
    changes = {"store": {"data_dir": link}}
    do(filled, filled.backup(changes=changes))
    filled.server.write("plain", b"changed")
    job = filled.job("restore", filled.restore().request, **changes)
    do(filled, job)
    assert link.is_symlink()
    assert fingerprint(filled.server.data_dir) == before


@pytest.mark.parametrize("what", ["missing", "file"])
def test_a_directory_that_is_none_is_refused(blobs: BlobVictim, what: str) -> None:
    blobs.server.data_dir.rmdir()
    if what == "file":
        blobs.server.data_dir.touch()
    outcome = do(blobs, blobs.backup(), 5)
    assert "SHARED_DRIVE_CONF.blob_dir" in outcome.errors


@pytest.mark.root
def test_a_mount_point_is_refused_and_nothing_changed(
    filled: BlobVictim, small_disk: Callable[[str], Path]
) -> None:
    do(filled, filled.backup())
    disk = small_disk("64m")
    (disk / "kept").write_bytes(b"x")
    job = filled.job("restore", filled.restore().request, store={"data_dir": disk})
    outcome = do(filled, job, 5)
    assert "is a mount point" in outcome.errors
    assert os.listdir(disk) == ["kept"]


@pytest.mark.root
def test_too_little_space_is_told_before_anything_happens(
    filled: BlobVictim, small_disk: Callable[[str], Path]
) -> None:
    do(filled, filled.backup())
    disk = small_disk("8m")
    (disk / "data").mkdir()
    job = filled.job("restore", filled.restore().request, store={"data_dir": disk / "data"})
    assert "NotEnoughSpace" in do(filled, job, 5).errors
    assert [name for name in os.listdir(disk) if not name.endswith(".lock")] == ["data"]


# Whom they belong to


@pytest.mark.root
@pytest.mark.parametrize(
    ("owner", "group"),
    [("nobody", None), ("65534", None), ("4711", None), ("4711", "4712"), ("postgres", "daemon")],
)
def test_restored_blobs_belong_to_whom_the_settings_name(
    filled: BlobVictim, owner: str, group: str | None
) -> None:
    import grp
    import pwd

    run_here("chmod", "-R", "go+rX", filled.home, filled.server.workdir)
    do(filled, filled.backup())
    filled.options = {"owner": owner, "group": group}
    do(filled, filled.restore())
    entry = pwd.getpwnam(owner) if not owner.isdecimal() else None
    uid = entry.pw_uid if entry else int(owner)
    own = entry.pw_gid if entry else int(owner)
    gid = own if group is None else int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid
    assert owners(filled.server.data_dir) == {(uid, gid)}


@pytest.mark.root
@pytest.mark.parametrize(("owner", "group"), [("nosuchuser", None), ("nobody", "nosuchgroup")])
def test_an_owner_who_is_unknown_is_told_before_anything_is_unpacked(
    filled: BlobVictim, owner: str, group: str | None
) -> None:
    do(filled, filled.backup())
    filled.options = {"owner": owner, "group": group}
    before = filled.beside()
    outcome = do(filled, filled.restore(), 5)
    assert f"there is no {'group' if group else 'user'} {group or owner} on this host" in outcome.errors
    assert filled.beside() == before


@pytest.mark.root
def test_blobs_whose_backup_only_root_may_read_are_restored_as_their_owner(filled: BlobVictim) -> None:
    before = fingerprint(filled.server.data_dir)
    run_here("chown", "-R", "root:root", filled.backups)
    do(filled, filled.backup())
    (archive,) = filled.backups.glob("blobdb_*.tar")
    assert (archive.stat().st_uid, archive.stat().st_mode & 0o777) == (0, 0o600)
    filled.server.write("plain", b"changed")
    do(filled, filled.restore())
    assert fingerprint(filled.server.data_dir) == before
    do(filled, filled.restore(merge=True))


def test_no_restored_blob_has_more_rights_than_are_good(blobs: BlobVictim) -> None:
    blobs.server.write("set-id", b"x", mode=0o6777)
    do(blobs, blobs.backup())
    do(blobs, blobs.restore())
    assert stat.S_IMODE((blobs.server.data_dir / "set-id").stat().st_mode) == 0o775


# Merging, and single blobs


def test_a_merge_adds_what_is_missing_and_changes_nothing(filled: BlobVictim) -> None:
    data = filled.server.data_dir
    do(filled, filled.backup())
    before = fingerprint(data)
    shutil.rmtree(data / "long")
    (data / "-rf").unlink()
    (data / "large").unlink()
    outcome = do(filled, filled.restore(merge=True))
    assert fingerprint(data) == before
    assert owners(data) == {(data.stat().st_uid, data.stat().st_gid)}
    (told,) = [e for e in outcome.kind("data") if "added" in e]
    assert (told["added"], told["same"], told["other"]) == (3, len(ODD) - 1, 0)


def test_a_merge_tells_what_it_leaves_as_it_is(filled: BlobVictim) -> None:
    data = filled.server.data_dir
    do(filled, filled.backup())
    filled.server.write("plain", b"another")
    filled.server.write("new", b"since then")
    large = bytearray((data / "large").read_bytes())
    large[1234567] ^= 1
    filled.server.write("large", bytes(large))
    shutil.rmtree(data / "long")
    (data / "long").symlink_to("/etc")
    (data / 'quote"s').unlink()
    (data / 'quote"s').mkdir()
    outcome = do(filled, filled.restore(merge=True))
    assert (data / "plain").read_bytes() == b"another"
    assert (data / "new").read_bytes() == b"since then"
    assert (data / "large").read_bytes() == large
    assert "2 blobs are there with another content" in outcome.warnings
    assert "could not be put in their place" in outcome.warnings
    assert (data / "long").is_symlink()
    assert not any(name.startswith("y") for name in os.listdir("/etc"))
    assert [name for name in os.listdir(data) if name.startswith(".hq_backups")] == []


def test_what_a_killed_merge_has_left_is_no_blob_and_goes(filled: BlobVictim) -> None:
    data = filled.server.data_dir
    filled.server.write(".hq_backups-merge-dead/1", b"half")
    do(filled, filled.backup())
    assert source(filled)["files"] == len(ODD) + 2
    do(filled, filled.restore(merge=True))
    assert not (data / ".hq_backups-merge-dead").exists()


def test_single_blobs_come_back_and_nothing_else(filled: BlobVictim) -> None:
    data = filled.server.data_dir
    do(filled, filled.backup())
    for name in ("plain", "-rf", "large"):
        (data / name).unlink()
    do(filled, filled.restore(merge=True, only=("plain", "long")))
    assert (data / "plain").read_bytes() == b"plain" * 0
    assert not (data / "-rf").exists()
    beside = filled.home / "beside"
    do(filled, filled.restore(target_dir=beside, only=("long", "-rf")))
    assert sorted(os.listdir(beside)) == ["-rf", "long"]
    assert fingerprint(beside / "long") == fingerprint(data / "long")


@pytest.mark.parametrize("how", ["merge", "beside"])
def test_a_blob_that_is_not_in_it_is_told_and_nothing_done(filled: BlobVictim, how: str) -> None:
    do(filled, filled.backup())
    (filled.server.data_dir / "plain").unlink()
    before, beside = fingerprint(filled.server.data_dir), filled.home / "beside"
    where: dict[str, Any] = {"merge": True} if how == "merge" else {"target_dir": beside}
    outcome = do(filled, filled.restore(only=("plain", "no/such"), **where), 3)
    assert "'no/such'" in outcome.errors
    assert fingerprint(filled.server.data_dir) == before
    assert not beside.exists()


def test_single_blobs_in_place_of_all_are_refused(filled: BlobVictim) -> None:
    do(filled, filled.backup())
    assert "--merge or --target-dir" in do(filled, filled.restore(only=("plain",)), 2).errors


# HQ's records


def records(victim: BlobVictim, *rows: tuple[str, int, str], deep: bool = False) -> Job:
    found = tuple(BlobRecord(*row) for row in rows)
    return victim.job("verify", VerifyRequest(Selection("blobdb"), deep, found))


@pytest.mark.parametrize("deep", [False, True])
def test_records_of_hq_are_compared_with_the_archive(filled: BlobVictim, deep: bool) -> None:
    do(filled, filled.backup())
    old, new = "2020-01-01T00:00:00Z", "2099-01-01T00:00:00Z"
    good = ("large", 3 << 20, old)
    outcome = do(filled, records(filled, good, ("came/later", 5, new), deep=deep))
    assert "1 blobs are as HQ's database records them; 1 are newer" in str(outcome.kind("check"))
    for bad, words in (
        (("lost", 5, old), "1 are not in it: 'lost'"),
        (("large", 7, old), "1 are of another size: 'large' (3145728 bytes, recorded are 7)"),
    ):
        assert words in do(filled, records(filled, good, bad, deep=deep), 3).errors


# Archives of the old scripts


def old_archive(victim: BlobVictim, name: str, path: str, options: tuple[str, ...] = ()) -> Path:
    """Make an archive as a script did, of a directory at ``path``."""
    made = victim.backups / name
    data = str(victim.server.data_dir)
    run_here("tar", "-Pzcf", made, "--transform", f"flags=r;s,^{data},{path},", *options, data)
    made.chmod(0o600)
    give(made, victim.user)
    return made


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("blobdb_daily_2026_08_22.tar.gz", "/opt/data/blobdb"),
        ("blobdb_hourly_2026_08_22_03.tar.gz", "/srv/other/root/blobdb"),
        ("blobdb_daily_2017_12_13.tar.gz", "opt/data/blobdb"),
        ("blobdb_weekly_2017_02_12.gz", "opt/shared_prod/blobdb"),
        ("blobdb_2016_02_06.gz", "opt/shared_data_prod/blobdb"),
        ("blobdb_daily_2026_08_21.tar.gz", "/opt/data/blobs-of-hq"),
        ("blobdb_daily_2026_08_20.tar.gz", "."),
    ],
)
def test_an_old_archive_is_listed_verified_and_restored(filled: BlobVictim, name: str, path: str) -> None:
    data = filled.server.data_dir
    filled.server.write("blobdb/key", b"a key may be called so")
    before = fingerprint(data)
    old_archive(filled, name, path)
    (entry,) = filled.entries()
    assert (entry["name"], entry["managed"]) == (name, False)
    assert "no manifest" in do(filled, filled.verify(name)).warnings
    do(filled, filled.verify(name, deep=True))
    filled.server.write("plain", b"changed")
    (data / "large").unlink()
    do(filled, filled.restore(name, from_env="unknown", merge=True))
    assert (data / "large").exists()
    assert (data / "plain").read_bytes() == b"changed"
    do(filled, filled.restore(name, from_env="unknown"))
    assert fingerprint(data) == before
    beside = filled.home / "beside"
    do(filled, filled.restore(name, from_env="unknown", target_dir=beside, only=("blobdb/key",)))
    assert [str(p.relative_to(beside)) for p in beside.rglob("*")] == ["blobdb", "blobdb/key"]


def packed(victim: BlobVictim, name: str, *members: tuple[str, bytes, str]) -> str:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz", format=tarfile.GNU_FORMAT) as archive:
        for path, kind, link in members:
            info = tarfile.TarInfo(path)
            info.type, info.linkname = kind, link
            archive.addfile(info)
    (victim.backups / name).write_bytes(made.getvalue())
    give(victim.backups / name, victim.user)
    return name


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("opt/shared_prod/blobdb", tarfile.SYMTYPE, "/opt/data/blobdb")], "the script archived the link"),
        ([("/opt/data/blobdb/", tarfile.DIRTYPE, ""), ("/etc/passwd", tarfile.REGTYPE, "")], "more than one"),
        ([("opt/data/blobdb/", tarfile.DIRTYPE, ""), ("opt/data/blobdb/../../../x", tarfile.REGTYPE, "")], "leaves"),
        (
            [("opt/data/couchdb/", tarfile.DIRTYPE, ""), ("opt/data/couchdb/_users.couch", tarfile.REGTYPE, "")],
            "it is a backup of CouchDB",
        ),
        ([], "not a tar archive"),
    ],
)  # fmt: skip
def test_an_old_archive_that_holds_no_blobs_says_why(
    filled: BlobVictim, members: list[tuple[str, bytes, str]], words: str
) -> None:
    name = packed(filled, "blobdb_daily_2016_03_01.gz", *members)
    for job in (filled.verify(name), filled.restore(name, from_env="unknown")):
        assert words in do(filled, job, 3).errors


def test_links_in_an_old_archive_are_passed_over_and_told(filled: BlobVictim) -> None:
    (filled.server.data_dir / "link").symlink_to("/etc/passwd")
    old_archive(filled, "blobdb_daily_2026_08_22.tar.gz", "/opt/data/blobdb")
    outcome = do(filled, filled.restore("blobdb_daily_2026_08_22.tar.gz", from_env="unknown"))
    assert "are not restored" in outcome.warnings
    assert not (filled.server.data_dir / "link").is_symlink()


def test_an_archive_that_is_cut_short_is_refused(filled: BlobVictim) -> None:
    made = old_archive(filled, "blobdb_daily_2026_08_22.tar.gz", "/opt/data/blobdb")
    made.write_bytes(made.read_bytes()[:-2000])
    do(filled, filled.verify(made.name), 3)
