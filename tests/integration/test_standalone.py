"""``hq-backups`` from the command line to a real server, as root, as the store's user, and through sudo."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import hq_backups
from tests.conftest import require_service
from tests.testbed.places import IS_ROOT, python_reachable, server_user
from tests.testbed.postgres import PostgresServer
from tests.testbed.process import as_user, give, short_directory
from tests.testbed.system import SudoRules

Run = Callable[..., "subprocess.CompletedProcess[str]"]
ROOT = Path(hq_backups.__file__).parent.parent


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """Return a Python environment (HQ's virtualenv_home) that every user can run."""
    if python_reachable():
        yield Path(sys.prefix)
        return
    system = f"/usr/bin/python3.{sys.version_info.minor}"
    require_service(
        "Python for other users", os.access(system, os.X_OK), f"{sys.executable} is out of their reach"
    )
    with short_directory() as place:
        subprocess.run([system, "-m", "venv", "--without-pip", place / "env"], check=True)
        (packages,) = (place / "env/lib").glob("python3*/site-packages")
        (packages / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
        yield place / "env"


class Host:
    """A host with a PostgreSQL server and nothing of HQ."""

    def __init__(self, server: PostgresServer, place: Path, home: Path) -> None:
        self.server, self.place, self.home = server, place, home
        self.backups = place / "backups"
        self.backups.mkdir(mode=0o700)
        give(self.backups, server.os_user)
        self.variables = {
            "PATH": "/usr/bin:/bin",
            "HOME": "/nonexistent",
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
            "HQ_BACKUPS_DEPLOY_ENV": "demo",
            "HQ_BACKUPS_BACKUP_POSTGRES": "plain",
            "HQ_BACKUPS_BACKUP_HOST_NAME": "pg0",
            "HQ_BACKUPS_BACKUP_STATE_DIR": str(place / "state"),
            "HQ_BACKUPS_POSTGRESQL_BACKUP_DIR": str(self.backups),
            "HQ_BACKUPS_POSTGRESQL_DATA_DIR": str(server.data_dir),
            "HQ_BACKUPS_POSTGRESQL_HOST": str(server.socket_dir),
            "HQ_BACKUPS_POSTGRESQL_PORT": str(server.port),
            "HQ_BACKUPS_VIRTUALENV_HOME": str(home),
        }

    def start(self, *words: str, user: str | None = None, **more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self.home / "bin/python", "-m", "hq_backups.standalone", *words],
            env={**self.variables, **more},
            cwd="/",
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            **as_user(user),
        )

    def run(self, *words: str, user: str | None = None, **more: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*words, user=user, **more)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def rows(self, sql: str) -> list[Any]:
        with sqlite3.connect(self.place / "state" / "history.sqlite3") as connection:
            found = connection.execute(sql).fetchall()
        connection.close()
        return found


@pytest.fixture
def host(fresh_pg: Any, home: Path) -> Iterator[Host]:
    with short_directory() as place:
        yield Host(fresh_pg(15), place, home)


def test_a_backup_is_made_listed_verified_and_recorded(host: Host) -> None:
    made = host.run("run_backup", "postgres", "--type=daily")
    assert made.returncode == 0, made.stderr + made.stdout
    assert made.stdout.splitlines()[-1].startswith("RESULT ok run=2")
    (artifact,) = host.backups.glob("postgres_demo_daily_*.tar.gz")
    assert artifact.owner() == server_user()

    (listed,) = json.loads(host.run("list_backups", "--json").stdout)
    assert set(listed) == {
        "store",
        "mode",
        "type",
        "env",
        "host",
        "taken_at",
        "name",
        "size",
        "sha256",
        "managed",
        "verified_at",
        "run",
        "locations",
    }
    assert (listed["name"], listed["host"], listed["managed"]) == (artifact.name, "pg0", True)
    assert artifact.name in host.run("list_backups").stdout

    assert host.run("verify_backup", "latest").returncode == 0
    assert host.run("prune_backups", "--dry-run").returncode == 0
    assert host.rows("select verb, status, exit_code from hq_backups_backuprun order by id") == [
        ("backup", "ok", 0),
        ("verify", "ok", 0),
        ("prune", "ok", 0),
    ]
    ((name, verified),) = host.rows("select name, verified_at from hq_backups_artifact")
    assert name == artifact.name
    assert verified

    (host.place / "state" / "history.sqlite3").unlink()
    synced = host.run("list_backups", "--sync")
    assert synced.returncode == 0, synced.stderr
    assert host.rows("select name, gone_at, size from hq_backups_artifact") == [
        (artifact.name, None, artifact.stat().st_size)
    ]


def test_a_damaged_backup_ends_verify_with_3(host: Host) -> None:
    assert host.run("run_backup", "postgres").returncode == 0
    (artifact,) = host.backups.glob("postgres_demo_manual_*.tar.gz")
    content = bytearray(artifact.read_bytes())
    content[len(content) // 2] ^= 0xFF
    artifact.write_bytes(content)
    ended = host.run("verify_backup", artifact.name)
    assert ended.returncode == 3, ended.stdout + ended.stderr
    assert ended.stdout.splitlines()[-1].endswith("exit=3")


def test_a_server_that_is_down_ends_in_an_error_with_a_hint_and_no_artifact(host: Host) -> None:
    host.server.stop()
    ended = host.run("run_backup", "postgres")
    assert ended.returncode not in (0, 2)
    assert "ERROR: " in ended.stderr
    assert ended.stdout.splitlines()[-1].startswith("RESULT failed")
    assert list(host.backups.glob("postgres_*")) == []


@pytest.mark.skipif(not IS_ROOT, reason="needs to become others")
class TestSudo:
    @pytest.fixture
    def rules(self, host: Host) -> Iterator[SudoRules]:
        reason = SudoRules.unavailable()
        require_service("sudo", not reason, reason)
        state = host.place / "state"
        state.mkdir(mode=0o700)
        give(state, "cchq")
        with SudoRules(host.home / "bin/python") as rules:
            yield rules

    def test_hqs_user_backs_up_through_hqs_own_rule(self, host: Host, rules: SudoRules) -> None:
        ended = host.run("run_backup", "postgres", user="cchq")
        assert ended.returncode == 0, ended.stderr + ended.stdout
        (artifact,) = host.backups.glob("postgres_demo_manual_*.tar.gz")
        assert artifact.owner() == server_user()
        assert host.rows("select status from hq_backups_backuprun") == [("ok",)]

    def test_without_a_rule_the_needed_one_is_told(self, host: Host, rules: SudoRules) -> None:
        rules.remove()
        ended = host.run("run_backup", "postgres", user="cchq")
        assert ended.returncode == 5, ended.stderr
        line = next(line for line in ended.stderr.splitlines() if "NOPASSWD" in line).strip()
        done = subprocess.run(
            ["visudo", "-c", "-f", "-"], input=line + "\n", text=True, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr
        rules.path.write_text(line + "\n")
        rules.path.chmod(0o440)
        assert host.run("run_backup", "postgres", user="cchq").returncode == 0

    def test_a_list_without_a_rule_warns_or_says_so(self, host: Host, rules: SudoRules) -> None:
        rules.remove()
        ended = host.run("list_backups", user="cchq")
        assert ended.returncode == 5
        assert "must run as postgres" in ended.stderr

    def test_nothing_is_run_as_root_that_others_could_have_changed(
        self, host: Host, rules: SudoRules
    ) -> None:
        package = host.place / "site" / "hq_backups"
        shutil.copytree(ROOT / "hq_backups", package, ignore=shutil.ignore_patterns("__pycache__"))
        (package / "engine" / "events.py").chmod(0o666)
        words = ("restore_backup", "postgres", "latest", "--noinput", "--confirm-env=demo")
        ended = host.run(*words, user="cchq", PYTHONPATH=str(package.parent))
        assert ended.returncode == 5, ended.stderr
        assert str(package / "engine" / "events.py") in ended.stderr

    def test_a_cancelled_backup_leaves_nothing_and_says_so(self, host: Host, rules: SudoRules) -> None:
        host.server.psql(
            "CREATE TABLE t AS SELECT repeat(md5(i::text), 20) x FROM generate_series(1, 400000) i"
        )
        process = host.start("run_backup", "postgres", user="cchq")
        deadline = time.monotonic() + 60
        while not list(host.backups.glob(".*.partial")) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 1, out + err
        assert "cancelled" in err
        assert out.splitlines()[-1].startswith("RESULT failed")
        assert [path.name for path in host.backups.iterdir() if "postgres" in path.name] == []


@pytest.mark.skipif(not IS_ROOT, reason="needs to become others")
def test_a_restore_puts_the_data_back_as_root(host: Host) -> None:
    host.server.psql("CREATE TABLE kept AS SELECT 42 AS answer")
    assert host.run("run_backup", "postgres").returncode == 0
    host.server.psql("DROP TABLE kept")
    planned = host.run("restore_backup", "postgres", "latest", "--dry-run")
    assert planned.returncode == 0, planned.stderr
    assert str(host.server.data_dir) in planned.stdout
    ended = host.run(
        "restore_backup", "postgres", "latest", "--noinput", "--confirm-env=demo", "--disconnect"
    )
    assert ended.returncode == 0, ended.stderr + ended.stdout
    assert "Next:" in ended.stdout
    assert host.server.psql("SELECT answer FROM kept") == "42"
    ((verb, status),) = host.rows("select verb, status from hq_backups_backuprun where verb = 'restore'")
    assert (verb, status) in [("restore", "ok"), ("restore", "warning")]
