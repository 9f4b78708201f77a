from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from hq_backups.engine import journal, swap
from hq_backups.engine.errors import PreflightFailed, RestoreNeedsHands
from hq_backups.engine.journal import journal_path, read_journal
from hq_backups.engine.swap import Swap
from tests.testbed.system import tmpfs, tmpfs_unavailable

RUN = "20261122T000002Z-pg0-postgres"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
needs_tmpfs = pytest.mark.skipif(bool(tmpfs_unavailable()), reason=tmpfs_unavailable() or "tmpfs")


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sync", lambda: None)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return directory(tmp_path / "main", "old")


@pytest.fixture
def staging(tmp_path: Path) -> Path:
    return directory(tmp_path / "staging", "new")


def directory(path: Path, who: str) -> Path:
    path.mkdir()
    (path / "WHO").write_text(who)
    return path


def who(path: Path) -> str:
    return (path / "WHO").read_text()


def make(target: Path, staging: Path, run: str = RUN, **more: object) -> Swap:
    return Swap(target, staging, run, store="postgres", artifact="a.tar.gz", **more)  # type: ignore[arg-type]


def begun(target: Path, staging: Path, run: str = RUN, **more: object) -> Swap:
    made = make(target, staging, run, **more)
    made.begin()
    return made


class TestSwap:
    def test_old_goes_aside_and_new_comes_in(self, target: Path, staging: Path) -> None:
        done = begun(target, staging)
        done.swap_in()
        assert (who(target), who(done.journal.old), staging.exists()) == ("new", "old", False)
        assert done.journal.old == target.parent / f"main.before-{RUN}"
        assert done.is_in()

    def test_and_back(self, target: Path, staging: Path) -> None:
        done = begun(target, staging)
        done.swap_in()
        done.put_back()
        assert (who(target), who(done.journal.failed), done.journal.old.exists()) == ("old", "new", False)
        done.put_back()
        assert who(target) == "old"

    def test_a_target_that_was_not_there_is_not_there_after(self, tmp_path: Path, staging: Path) -> None:
        done = begun(tmp_path / "main", staging)
        done.swap_in()
        assert who(tmp_path / "main") == "new"
        done.put_back()
        assert not (tmp_path / "main").exists()
        assert who(done.journal.failed) == "new"

    def test_a_symbolic_link_is_swapped_where_it_points(
        self, tmp_path: Path, target: Path, staging: Path
    ) -> None:
        link = tmp_path / "link"
        link.symlink_to(target)
        done = begun(link, staging)
        done.swap_in()
        assert link.is_symlink()
        assert who(link) == "new"
        assert journal_path(target).exists()
        Swap.load(link).put_back()
        assert who(link) == "old"

    @needs_root
    def test_owner_and_mode_are_the_old_ones(self, target: Path, staging: Path) -> None:
        os.chown(target, 12, 34)
        target.chmod(0o2750)
        begun(target, staging).swap_in()
        now = target.stat()
        assert (now.st_uid, now.st_gid, now.st_mode & 0o7777) == (12, 34, 0o2750)

    @needs_root
    def test_owner_and_mode_may_be_given(self, tmp_path: Path, staging: Path) -> None:
        begun(tmp_path / "main", staging, owner=(56, 78), mode=0o700).swap_in()
        now = (tmp_path / "main").stat()
        assert (now.st_uid, now.st_gid, now.st_mode & 0o7777) == (56, 78, 0o700)

    def test_the_new_data_are_brought_to_disk_first(
        self, target: Path, staging: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[bool] = []
        monkeypatch.setattr(os, "sync", lambda: calls.append(journal_path(target).exists()))
        begun(target, staging)
        assert calls == [False]

    def test_an_empty_directory_that_appears_is_not_replaced(self, target: Path, staging: Path) -> None:
        done = begun(target, staging)
        done.journal.old.mkdir()
        with pytest.raises(FileExistsError, match="is already there"):
            done.swap_in()
        assert (who(target), who(staging)) == ("old", "new")

    def test_a_directory_exchanged_behind_our_back_is_not_renamed(self, target: Path, staging: Path) -> None:
        done = begun(target, staging)
        target.rename(target.parent / "elsewhere")
        directory(target, "somebody's")
        with pytest.raises(PreflightFailed, match="another directory than it was"):
            done.swap_in()
        assert who(target) == "somebody's"


class TestRefusals:
    def refused(self, target: Path, staging: Path, match: str) -> PreflightFailed:
        before = sorted(os.listdir(target.parent)) if target.parent.exists() else None
        with pytest.raises(PreflightFailed, match=match) as caught:
            begun(target, staging)
        assert caught.value.exit_code == 5
        if before is not None:
            assert sorted(os.listdir(target.parent)) == before
        return caught.value

    @needs_tmpfs
    def test_a_mount_point(self, staging: Path) -> None:
        with tmpfs("4m") as mount:
            error = self.refused(mount, staging, "is a mount point: it cannot be renamed")
            assert "--target-dir" in error.hint

    @needs_tmpfs
    def test_another_filesystem(self, target: Path) -> None:
        with tmpfs("4m") as mount:
            error = self.refused(target, directory(mount / "staging", "new"), "on another filesystem")
            assert "--staging-dir" in error.hint

    def test_missing_staging(self, target: Path, tmp_path: Path) -> None:
        self.refused(target, tmp_path / "nothing", "is not a directory")

    def test_staging_that_is_a_link(self, target: Path, staging: Path, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(staging)
        self.refused(target, tmp_path / "link", "is not a directory")

    def test_a_target_that_is_a_file(self, tmp_path: Path, staging: Path) -> None:
        (tmp_path / "file").touch()
        self.refused(tmp_path / "file", staging, "is not a directory")

    def test_one_within_the_other(self, target: Path, tmp_path: Path) -> None:
        self.refused(target, directory(target / "inner", "new"), "one within the other")
        self.refused(target, target, "one within the other")
        self.refused(target, tmp_path, "one within the other")

    def test_no_parent(self, tmp_path: Path, staging: Path) -> None:
        self.refused(tmp_path / "no" / "main", staging, "does not exist")

    @pytest.mark.parametrize("name", ["before", "failed"])
    def test_a_name_that_is_taken(self, target: Path, staging: Path, name: str) -> None:
        (target.parent / f"main.{name}-{RUN}").mkdir()
        self.refused(target, staging, "is already there")

    @pytest.mark.parametrize("phase", journal.OPEN)
    def test_an_unfinished_restore(self, target: Path, staging: Path, phase: str) -> None:
        begun(target, staging, "earlier").mark(phase)
        error = self.refused(target, staging, f"restore earlier of .* was interrupted \\({phase}\\)")
        assert error.hint == "Put the old data back first: restore_backup postgres --undo"

    @pytest.mark.parametrize("phase", [*journal.UNTOUCHED, *journal.CLOSED])
    def test_but_not_a_finished_one(self, target: Path, staging: Path, phase: str) -> None:
        begun(target, staging, "earlier").mark(phase)
        assert begun(target, staging).journal.run == RUN


class TestPuttingBack:
    def test_new_data_of_somebody_else_are_not_touched(self, target: Path, staging: Path) -> None:
        done = begun(target, staging)
        done.swap_in()
        target.rename(target.parent / "kept")
        directory(target, "restored by hand since")
        with pytest.raises(RestoreNeedsHands, match="neither the old nor the restored data") as caught:
            done.put_back()
        assert caught.value.exit_code == 9
        assert str(done.journal.old) in str(caught.value)
        assert who(target) == "restored by hand since"
        assert who(done.journal.old) == "old"

    def test_an_empty_directory_in_the_way_is_set_aside(self, target: Path, staging: Path) -> None:
        done = begun(target, staging)
        target.rename(done.journal.old)
        target.mkdir()
        done.put_back()
        assert who(target) == "old"
        assert list(done.journal.failed.iterdir()) == []

    def test_two_failures_of_one_run_get_two_names(self, target: Path, staging: Path) -> None:
        done = begun(target, staging)
        done.journal.failed.mkdir()
        done.swap_in()
        done.put_back()
        assert who(target) == "old"
        assert who(Path(f"{done.journal.failed}.2")) == "new"
        assert str(done.journal.failed) + ".2" in done.where()

    @pytest.mark.parametrize("replaced", [False, True])
    def test_old_data_that_are_gone_or_others_are_told_before_anything_moves(
        self, target: Path, staging: Path, replaced: bool
    ) -> None:
        done = begun(target, staging)
        done.swap_in()
        done.journal.old.rename(target.parent / "elsewhere")
        if replaced:
            directory(done.journal.old, "impostor")
        with pytest.raises(RestoreNeedsHands, match=r"not where they were put.*Old data: not found"):
            done.put_back()
        assert who(target) == "new"

    def test_a_rename_that_fails_leaves_the_way_back(
        self, target: Path, staging: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        done, real = begun(target, staging), os.rename

        def exdev(source: Path, destination: Path) -> None:
            if Path(source) == staging:
                raise OSError(errno.EXDEV, "Invalid cross-device link")
            real(source, destination)

        monkeypatch.setattr(os, "rename", exdev)
        with pytest.raises(OSError, match="cross-device"):
            done.swap_in()
        done.put_back()
        assert (who(target), who(staging)) == ("old", "new")


class TestJournal:
    def test_is_private_and_tells_everything(self, target: Path, staging: Path) -> None:
        made = make(target, staging)
        made.begin(service={"start": ["systemctl", "start", "x"]}, was_running=True, watched=("postgresql",))
        path = journal_path(target)
        assert path == target.parent / ".main.hq_backups-restore.json"
        assert path.stat().st_mode & 0o777 == 0o600
        told = json.loads(path.read_text())
        assert told["phase"] == "planned"
        assert told["artifact"] == "a.tar.gz"
        assert told["old_inode"] == target.stat().st_ino
        assert told["new_inode"] == staging.stat().st_ino
        assert Swap.load(target).journal == made.journal

    def test_there_is_none_to_undo(self, target: Path) -> None:
        with pytest.raises(PreflightFailed, match=r"no restore of .* to undo"):
            Swap.load(target)

    @pytest.mark.parametrize(
        "content",
        [
            "", "{", "[]", "null", '{"run": 1}', "[" * 100_000,
            '{"run":"../x","store":"s","artifact":"a","target":"TARGET","staging":"/x","old_inode":1,"new_inode":2}',
            '{"run":"r","store":"s","artifact":"a","target":"/other","staging":"/x","old_inode":1,"new_inode":2}',
            '{"run":"r","store":"s","artifact":"a","target":"TARGET","staging":"/x","old_inode":1,"new_inode":2,'
            '"phase":"odd"}',
            '{"run":"r","store":"s","artifact":"a","target":"TARGET","staging":"/x","old_inode":1,"new_inode":2,'
            '"version":2}',
        ],
    )  # fmt: skip
    def test_one_that_makes_no_sense_is_refused(self, target: Path, content: str) -> None:
        journal_path(target).write_text(content.replace("TARGET", str(target)))
        with pytest.raises(PreflightFailed, match="cannot be used"):
            read_journal(target)

    def test_one_that_others_may_write_is_refused(self, target: Path, staging: Path) -> None:
        begun(target, staging)
        journal_path(target).chmod(0o620)
        with pytest.raises(PreflightFailed, match="others could have written it"):
            read_journal(target)

    @needs_root
    def test_one_of_another_user_is_refused(self, target: Path, staging: Path) -> None:
        begun(target, staging)
        os.chown(journal_path(target), 12, 34)
        with pytest.raises(PreflightFailed, match="it belongs to user id 12"):
            read_journal(target)

    def test_a_link_is_refused(self, target: Path, staging: Path) -> None:
        begun(target, staging)
        path = journal_path(target)
        path.rename(path.with_name("real"))
        path.symlink_to("real")
        with pytest.raises(PreflightFailed, match="cannot be used"):
            read_journal(target)

    def test_a_write_that_fails_leaves_the_old_one(
        self, target: Path, staging: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        done = begun(target, staging)

        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(OSError, match="No space"):
                done.mark("stopping")
        assert done.journal.phase == "planned"
        assert Swap.load(target).journal == done.journal
        assert sorted(os.listdir(target.parent)) == [journal_path(target).name, "main", "staging"]

    def test_earlier_restores_are_known(self, target: Path, staging: Path) -> None:
        directory(target.parent / "main.before-x", "older")
        done = begun(target, staging)
        done.swap_in()
        assert done.earlier() == [target.parent / "main.before-x"]


def test_an_inode_is_of_the_link_itself(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    assert swap.inode(tmp_path / "link") is not None
    assert swap.inode(tmp_path / "nothing") is None
