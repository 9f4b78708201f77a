"""The copy of the backup directory on another host, by a real rsync through a real sshd."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hq_backups.engine import child, mirror
from hq_backups.engine.errors import Exit
from hq_backups.engine.requests import BackupRequest
from tests.conftest import require_service
from tests.integration.couch_helpers import OTHER, CouchHost
from tests.integration.pg_helpers import Outcome
from tests.testbed.couch import CouchNode
from tests.testbed.couch_data import make_data_dir
from tests.testbed.process import LOOPBACK, give, short_directory
from tests.testbed.sshd import OtherHost
from tests.testbed.system import tmpfs, tmpfs_unavailable

pytestmark = pytest.mark.root
Make = Callable[..., CouchNode]


@pytest.fixture(autouse=True)
def no_epmd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERL_EPMD_PORT", "9")


@pytest.fixture
def host(couch_node: Make) -> CouchHost:
    """Return a host with a few documents, whose node is down."""
    node = couch_node(start=False)
    docs = [{"_id": f"doc-{n}", "text": os.urandom(20_000).hex()} for n in range(8)]
    make_data_dir(node.data_dir, {"commcarehq": docs}, os_user=node.os_user)
    return CouchHost(node)


@pytest.fixture
def other(host: CouchHost) -> Iterator[OtherHost]:
    """Yield another host, whose backup directory, of the same path, is another and empty."""
    reason = OtherHost.unavailable()
    require_service("sshd", not reason, reason)
    user = str(host.couch.os_user)
    with short_directory(user) as workdir:
        disk = workdir / "disk"
        disk.mkdir()
        give(disk, user)
        with OtherHost(workdir / "sshd", user, host.backups, disk) as service:
            yield service


def mirrored(host: CouchHost, other: OtherHost, place: str = "") -> CouchHost:
    return host.but(store={"mirror": f"{other.host}{place}"})


def backup(host: CouchHost, type_: str = "daily", **request: object) -> Outcome:
    return host.run_as_owner("backup", BackupRequest("couch", type_, **request))  # type: ignore[arg-type]


def content(directory: Path) -> dict[str, bytes]:
    """Return what of a backup directory is to be on another host."""
    return {
        path.name: path.read_bytes()
        for path in directory.iterdir()
        if path.name.startswith(("couchdb_", ".couchdb_"))
    }


def assert_only_warned(done: Outcome, *words: str) -> None:
    """A copy that fails is a warning with cause and next command, never a failed run."""
    assert done.code is Exit.OK, done
    (message,) = [data["message"] for data in done.of("warning") if data["code"] == "mirror-failed"]
    for word in ("the backup is good", *words):
        assert word in message, message
    assert not [check for check in done.of("check") if check["name"] == "mirror"]


def test_the_directory_is_the_same_there_and_restores_from_there(
    host: CouchHost, other: OtherHost, couch_node: Make
) -> None:
    host = mirrored(host, other)
    (host.backups / ".20260101T000000Z-couch0-couch.partial").write_bytes(b"of a run that is not done")
    (host.backups / "notes.txt").write_bytes(b"not ours")
    done = backup(host)
    assert done.code is Exit.OK, done
    assert done.warnings == {"node-silent"}
    assert [check["ok"] for check in done.of("check") if check["name"] == "mirror"] == [True]
    name = done.manifest["name"]
    assert content(other.disk) == content(host.backups)
    assert set(os.listdir(other.disk)) == {name, f".{name}.json"}
    target = CouchHost(couch_node(node_name=OTHER))
    restored = target.restore(str(other.disk / name), new_node=OTHER)
    assert restored.code is Exit.OK, restored
    assert "no-manifest" not in restored.warnings
    assert target.node.counts("commcarehq") == (8, 0)


def test_what_retention_removes_here_is_removed_there_and_nothing_else(
    host: CouchHost, other: OtherHost
) -> None:
    host = mirrored(host, other)
    first = backup(host, "manual").manifest["name"]
    (other.disk / "somebody-elses").write_bytes(b"x")
    # What a copy that broke off left there.
    (other.disk / ".~tmp~").mkdir()
    (other.disk / ".~tmp~" / "couchdb_daily_2020_01_01.tar.gz").write_bytes(b"x" * 1000)
    give(other.disk / ".~tmp~", other.login)
    for path in list(host.backups.iterdir()):
        if first in path.name:
            path.unlink()
    second = backup(host, "weekly")
    assert second.code is Exit.OK, second
    assert content(other.disk) == content(host.backups)
    name = second.manifest["name"]
    assert set(os.listdir(other.disk)) == {name, f".{name}.json", "somebody-elses"}


def test_another_directory_there_can_be_named(host: CouchHost, other: OtherHost) -> None:
    place = other.disk / "a node's"
    done = backup(mirrored(host, other, f":{place}"))
    assert done.code is Exit.OK, done
    assert content(place) == content(host.backups)


def test_it_is_copied_neither_without_upload_nor_on_a_dry_run(host: CouchHost, other: OtherHost) -> None:
    host = mirrored(host, other)
    assert backup(host, upload=False).code is Exit.OK
    assert backup(host, dry_run=True).code is Exit.OK
    assert not os.listdir(other.disk)


def test_no_secret_and_no_shell_s_words_are_in_what_is_run(host: CouchHost) -> None:
    argv = mirror._argv("couch", Path("/opt/backups"), "couchdb@backup0", "/a place/$(id)")
    assert host.couch.password not in " ".join(argv)
    (shell,) = [word for word in argv if word.startswith("--rsh=")]
    assert "-oBatchMode=yes" in shell, "or it would wait for a password where there is a terminal"
    assert argv[-3:] == ["--", "/opt/backups/", "couchdb@backup0:/a place/$(id)/"]


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("backup0", ("backup0", "/here")),
        ("couchdb@backup0", ("couchdb@backup0", "/here")),
        ("backup0:/srv/x", ("backup0", "/srv/x")),
        ("couchdb@[fd00::1]", ("couchdb@[fd00::1]", "/here")),
        ("[fd00::1]:/srv/x", ("[fd00::1]", "/srv/x")),
    ],
)
def test_a_destination_is_host_and_directory(given: str, found: tuple[str, str]) -> None:
    assert mirror.destination(given, Path("/here")) == found


# Failures


def test_a_host_that_is_down_is_a_warning(host: CouchHost, other: OtherHost) -> None:
    host = mirrored(host, other)
    other.kill()
    assert_only_warned(backup(host), "cannot be reached", "Connection refused", f"ssh {other.host} true")
    assert host.verify().code is Exit.OK


def test_a_host_without_a_name_is_a_warning(host: CouchHost) -> None:
    host = host.but(store={"mirror": "nowhere.invalid"})
    assert_only_warned(backup(host), "cannot be reached", "resolve hostname")


def test_a_host_whose_key_is_not_known_is_a_warning_and_is_never_asked_about(
    host: CouchHost, other: OtherHost
) -> None:
    host = mirrored(host, other)
    other.forget_key()
    assert_only_warned(backup(host), "Host key verification failed", f"ssh {other.host} true")


def test_a_missing_rsync_is_a_warning(
    host: CouchHost, other: OtherHost, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(child, "PATH", str(tmp_path))
    done = mirrored(host, other).run("backup", BackupRequest("couch", "daily"))
    assert_only_warned(done, "rsync is not installed here", "apt-get install rsync")


def test_a_missing_rsync_there_is_a_warning(host: CouchHost, other: OtherHost) -> None:
    config = other.workdir / "sshd_config"
    other.stop()
    argv = other.argv

    def without() -> object:
        words = argv()
        config.write_text(config.read_text() + "SetEnv PATH=/nonexistent\n")
        return words

    other.argv = without  # type: ignore[method-assign, assignment]
    other.start()
    done = backup(mirrored(host, other))
    assert_only_warned(done, f"rsync is not installed on {other.host}")


def test_a_full_disk_there_is_a_warning_and_loses_nothing(host: CouchHost) -> None:
    reason = OtherHost.unavailable() or tmpfs_unavailable()
    require_service("sshd and tmpfs", not reason, reason)
    user = str(host.couch.os_user)
    with tmpfs("128k") as disk, short_directory(user) as workdir:
        give(disk, user)
        old = disk / "couchdb_daily_2020_01_01.tar.gz"
        old.write_bytes(b"x" * 50_000)
        with OtherHost(workdir / "sshd", user, host.backups, disk) as other:
            done = backup(mirrored(host, other))
            assert_only_warned(done, "the disk there is full", f"ssh {other.host} df -h {host.backups}")
        assert old.stat().st_size == 50_000
        assert not [name for name in os.listdir(disk) if name.startswith(".couchdb_")], (
            "no manifest without it"
        )
    assert host.verify().code is Exit.OK


def test_a_directory_that_cannot_be_written_there_is_a_warning(host: CouchHost, other: OtherHost) -> None:
    done = backup(mirrored(host, other, ":/proc/nowhere/mirror"))
    assert_only_warned(
        done, "the directory cannot be written there", f"ssh {other.host} mkdir -p /proc/nowhere/mirror"
    )


def test_a_host_that_says_nothing_is_given_up(
    host: CouchHost, other: OtherHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = mirrored(host, other)
    port = other.port
    other.kill()
    with socket.create_server((LOOPBACK, port)):
        monkeypatch.setattr(mirror, "CONNECT_SECONDS", 1)
        done = host.run("backup", BackupRequest("couch", "manual"))
        assert_only_warned(done, "cannot be reached", "timed out")
        # The bound is ssh's own wait, not a machine's speed: a busy one may take long for the backup itself.
        monkeypatch.setattr(mirror, "CONNECT_SECONDS", 600)
        monkeypatch.setattr(mirror, "PATIENCE_SECONDS", 1)
        shutil.rmtree(host.backups)
        host.backups.mkdir()
        began = time.monotonic()
        done = host.run("backup", BackupRequest("couch", "daily"))
        assert_only_warned(done, "no progress for 1 seconds")
        assert time.monotonic() - began < 150
