"""The layout that HQ's servers have, from a backup as HQ's user to a lost machine that serves again."""

from __future__ import annotations

import pwd
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import require_service
from tests.integration.hq_host import ENV, HqHost, hq_host
from tests.testbed.debian import DebianCluster
from tests.testbed.process import ChildService, free_port, short_directory, wait_until
from tests.testbed.s3 import S3Service

pytestmark = [pytest.mark.root, pytest.mark.debian, pytest.mark.postgres15, pytest.mark.s3]
CONFIRMED = ("--noinput", f"--confirm-env={ENV}")


@pytest.fixture(scope="module")
def host(s3: S3Service) -> Iterator[HqHost]:
    bucket = s3.make_bucket(versioned=True)
    with hq_host(s3, bucket) as host:
        host.fill(2)
        yield host
    s3.remove_bucket(bucket)


@pytest.fixture
def hq(host: HqHost) -> HqHost:
    host.rules.install()
    host.clear()
    return host


@pytest.fixture
def doomed(s3: S3Service, versioned_bucket: str) -> Iterator[HqHost]:
    """Return a host that a test may ruin."""
    with hq_host(s3, versioned_bucket) as host:
        host.fill(2)
        yield host


def configuration(host: HqHost) -> dict[str, Any]:
    """Return the cluster's configuration in /etc: contents, owners, modes, times."""
    found = {}
    for path in (host.server.config_dir, *host.server.config_dir.rglob("*")):
        facts = path.lstat()
        content = path.read_bytes() if path.is_file() else b""
        found[str(path)] = (
            content,
            facts.st_uid,
            facts.st_gid,
            facts.st_mode,
            facts.st_mtime_ns,
            facts.st_ino,
        )
    return found


def owners_below(place: Path) -> set[tuple[str, int]]:
    """Return who owns what lies in a directory, and how open it is to others."""
    return {
        (pwd.getpwuid(facts.st_uid).pw_name, stat.S_IMODE(facts.st_mode) & 0o077)
        for path in (place, *place.rglob("*"))
        for facts in [path.lstat()]
    }


def cluster_status(host: HqHost) -> int:
    """Return what Debian's own tool says: 0 is running, 3 is down."""
    argv = ["pg_ctlcluster", "--skip-systemctl-redirect", "15", host.server.name, "status"]
    return subprocess.run(argv, capture_output=True, check=False).returncode


def test_a_lost_machine_serves_again_under_another_name(doomed: HqHost) -> None:
    hq = doomed
    made = hq.good("run_backup", "postgres", "--type=daily")
    run = made.out.splitlines()[-1].split("run=")[1].split()[0]
    assert made.out.splitlines()[-1] == f"RESULT ok run={run} exit=0"
    (artifact,) = hq.backups.glob("postgres_monolith_daily_*.tar.gz")
    for path in hq.backups.iterdir():
        if path.is_file():
            assert (path.owner(), stat.S_IMODE(path.stat().st_mode)) == ("postgres", 0o600), path
    (listed,) = hq.catalog()
    assert {place["kind"] for place in listed["locations"]} == {"local", "s3"}
    assert (listed["managed"], listed["run"], listed["host"]) == (True, run, "pg0")
    deep = hq.good("verify_backup", "latest", "--deep")
    assert "rows, each read" in deep.out
    assert hq.catalog()[0]["verified_at"]

    etc, contents = configuration(hq), hq.contents()
    hq.lose_everything()
    hq.configure(backup_host_name="pg-new")
    assert not artifact.exists()
    assert cluster_status(hq) != 0

    (found,) = hq.catalog()
    assert [place["kind"] for place in found["locations"]] == ["s3"]
    assert (found["host"], found["name"]) == ("pg0", artifact.name)
    with hq.screen("restore_backup", "postgres", "latest") as screen:
        screen.expect("Type the environment's name (monolith) to go on: ")
        # Nothing may be done before that: not even a directory.
        assert hq.beside() == []
        screen.type("monolith")
        assert screen.wait() == 0, screen.text
        shown = screen.drawn
    assert [line for line in shown if line][-1].startswith("RESULT ok ")
    text = "\n".join(shown)
    assert "aside" not in text  # there was nothing to set aside
    assert "history cannot be written" in text  # HQ's database was gone: that is told and stops nothing
    assert text.count("downtime end") == 1

    assert hq.contents() == contents
    assert cluster_status(hq) == 0
    assert configuration(hq) == etc
    assert owners_below(hq.data) == {("postgres", 0)}
    assert stat.S_IMODE(hq.data.stat().st_mode) == 0o700
    for parent in (hq.data.parent.parent, hq.root / "opt/data", hq.root / "opt"):
        assert (parent.owner(), stat.S_IMODE(parent.stat().st_mode)) == ("root", 0o755)
    assert hq.beside() == [hq.data.name]

    # HQ works on it, and the history of before the loss is in it: the backup that ran while the data were
    # read is completed from its manifest.
    hq.good("list_backups", "--sync")
    assert hq.server.psql("SELECT count(*) FROM hq_backups_artifact", "commcarehq") == "1"
    runs = "SELECT string_agg(verb || ' ' || status, ',' ORDER BY id) FROM hq_backups_backuprun"
    assert hq.server.psql(runs, "commcarehq") == "backup ok,restore ok"

    # The directory of backups is gone, and postgres may not make one in /opt/data: the hint is the command.
    refused = hq.run("run_backup", "postgres", "--no-upload")
    assert refused.code == 5, refused
    (hint,) = (line.split("next: ")[1] for line in refused.err.splitlines() if "next: " in line)
    subprocess.run(["sh", "-c", hint], check=True)
    assert (hq.backups.owner(), stat.S_IMODE(hq.backups.stat().st_mode)) == ("postgres", 0o700)
    hq.good("run_backup", "postgres", "--no-upload")

    undone = hq.good("restore_backup", "postgres", "--undo", *CONFIRMED)
    assert "no data, and the server stays down" in undone.out
    assert "there are no data now, as before: restore_backup postgres latest" in undone.out
    assert cluster_status(hq) != 0
    assert not hq.data.exists()
    (failed,) = hq.beside()
    assert failed.startswith(f"{hq.data.name}.failed-")
    hq.good("restore_backup", "postgres", "latest", "--host=pg0", *CONFIRMED)
    assert hq.contents() == contents


def test_old_data_are_kept_and_come_back_by_undo(hq: HqHost) -> None:
    backed_up, etc = hq.stock(), configuration(hq)
    hq.server.psql("UPDATE kept SET x = 'newer'")
    newer, inode = hq.contents(), hq.data.stat().st_ino
    assert newer != backed_up

    denied = hq.run("restore_backup", "postgres", "latest", "--noinput")
    assert (denied.code, hq.contents()) == (4, newer)

    done = hq.good("restore_backup", "postgres", "latest", *CONFIRMED)
    assert hq.contents() == backed_up
    (old,) = hq.data.parent.glob(f"{hq.data.name}.before-*")
    assert old.stat().st_ino == inode
    assert f"delete the old data when you are sure: {old}" in " ".join(done.out.split())
    assert owners_below(hq.data) == owners_below(old) == {("postgres", 0)}

    hq.good("restore_backup", "postgres", "--undo", *CONFIRMED)
    assert hq.contents() == newer
    assert hq.data.stat().st_ino == inode
    assert cluster_status(hq) == 0
    assert configuration(hq) == etc
    again = hq.good("restore_backup", "postgres", "--undo", *CONFIRMED)
    assert "nothing to do" in again.out
    assert hq.contents() == newer


def test_root_does_all_of_it_directly(hq: HqHost) -> None:
    hq.rules.remove()
    hq.good("run_backup", "postgres", user="root")
    (artifact,) = hq.backups.glob("postgres_*.tar.gz")
    assert artifact.owner() == "postgres"
    hq.good("verify_backup", "latest", "--deep", user="root")
    assert artifact.name in hq.good("list_backups", user="root").out
    before = hq.contents()
    hq.server.psql("DROP TABLE kept")
    hq.good("restore_backup", "postgres", "latest", *CONFIRMED, user="root")
    assert hq.contents() == before
    assert owners_below(hq.data) == {("postgres", 0)}
    hq.good("restore_backup", "postgres", "--undo", *CONFIRMED, user="root")
    assert hq.server.psql("SELECT to_regclass('kept') IS NULL") == "t"
    hq.fill(2)


def test_the_servers_own_user_does_all_but_the_restore(hq: HqHost) -> None:
    hq.rules.remove()
    for words in (("run_backup", "postgres"), ("verify_backup", "latest", "--deep"), ("list_backups",)):
        ended = hq.standalone(*words, user="postgres")
        assert ended.code == 0, ended
    before, data = hq.contents(), hq.data.stat().st_ino
    refused = hq.standalone("restore_backup", "postgres", "latest", *CONFIRMED, user="postgres")
    assert refused.code == 5, refused
    assert "this must run as root" in refused.err
    command = f"sudo -u root {hq.python} -m hq_backups.standalone restore_backup postgres latest --noinput"
    assert command in refused.err
    assert (hq.contents(), hq.data.stat().st_ino) == (before, data)


class MonitDaemon(ChildService):
    """Debian's own monit, watching one cluster every second; the host's configuration is left alone."""

    name = "monit"

    def __init__(self, workdir: Path, server: DebianCluster) -> None:
        super().__init__(workdir)
        self.server = server
        self.config = workdir / "monitrc"
        self.port = free_port()
        tool = f"/usr/bin/pg_ctlcluster --skip-systemctl-redirect 15 {server.name}"
        self.workdir.mkdir()
        self.config.write_text(
            "set daemon 1\n"
            f"set log {workdir}/monit.out\nset pidfile {workdir}/pid\nset idfile {workdir}/id\n"
            f"set statefile {workdir}/state\n"
            f"set httpd port {self.port} and use address 127.0.0.1 allow 127.0.0.1\n"
            f"check process postgresql with pidfile {server.data_dir}/postmaster.pid\n"
            f'  start program = "{tool} start"\n  stop program = "{tool} stop"\n'
        )
        self.config.chmod(0o600)

    @property
    def said(self) -> str:
        return (self.workdir / "monit.out").read_text()

    def argv(self) -> list[str]:
        return ["monit", "-I", "-c", str(self.config)]

    def status(self) -> str:
        done = subprocess.run(
            ["monit", "-B", "-c", self.config, "summary"], capture_output=True, text=True, check=False
        )
        return next(
            (line.split(None, 1)[1] for line in done.stdout.splitlines() if " postgresql " in line), ""
        )

    def ready(self) -> bool:
        return self.status().startswith("OK")

    def before(self, *words: str) -> list[str]:
        """Return a command that sees this configuration as /etc/monit/monitrc, in a mount namespace of its own."""
        bind = f"mount --bind {self.config} /etc/monit/monitrc"
        become = "exec setpriv --reuid=cchq --regid=cchq --init-groups --"
        return [
            "unshare",
            "--mount",
            "--propagation=private",
            "sh",
            "-ec",
            f'{bind}; {become} "$@"',
            "sh",
            *words,
        ]


class TestMonit:
    @pytest.fixture
    def monit(self, hq: HqHost) -> Iterator[MonitDaemon]:
        require_service("monit", shutil.which("monit") is not None, "it is not installed (make testbed)")
        with short_directory() as place, MonitDaemon(place / "monit", hq.server) as daemon:
            yield daemon

    def restore(self, hq: HqHost, monit: MonitDaemon, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            monit.before(*hq.argv("restore_backup", "postgres", *words, *CONFIRMED)),
            cwd=hq.current,
            env=hq.environment("cchq"),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    def test_it_looks_away_during_a_restore_and_watches_after(self, hq: HqHost, monit: MonitDaemon) -> None:
        contents = hq.stock()
        hq.server.psql("UPDATE kept SET x = 'newer'")
        done = self.restore(hq, monit, "latest")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "monit paused    postgresql" in done.stdout
        assert hq.contents() == contents
        wait_until(lambda: monit.status().startswith("OK"), what=f"monit to watch again: {monit.said}")
        orders = [line for line in monit.said.splitlines() if "on user request" in line]
        assert ["unmonitor" in line for line in orders] == [True, False], monit.said
        assert "process is not running" not in monit.said
        assert "trying to" not in monit.said

        # It does watch: what goes down is started again.
        hq.server.kill()
        wait_until(lambda: hq.server.running, what=f"monit to start the server: {monit.said}")
        wait_until(lambda: monit.status().startswith("OK"), what="monit to be content")

        undone = self.restore(hq, monit, "--undo")
        assert undone.returncode == 0, undone.stdout + undone.stderr
        wait_until(lambda: monit.status().startswith("OK"), what="monit to watch after an undo")
        assert hq.server.psql("SELECT min(x) FROM kept") == "newer"

    def test_it_watches_again_after_a_restore_that_failed(self, hq: HqHost, monit: MonitDaemon) -> None:
        hq.good("run_backup", "postgres")
        hq.configure(
            postgresql_start_command=["/bin/false"], postgresql_stop_command=list(hq.server.stop_command)
        )
        done = self.restore(hq, monit, "latest")
        assert done.returncode == 9, done.stdout + done.stderr  # nor do the old data start
        hq.configure(postgresql_start_command=None, postgresql_stop_command=None)
        wait_until(lambda: hq.server.running, what=f"monit to start the server: {monit.said}")
        assert [p.name for p in hq.data.parent.iterdir() if ".failed-" in p.name] != []
