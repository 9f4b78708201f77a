"""A host as HQ's deployment leaves it: Debian's PostgreSQL, users, sudo rule, a Django project, a terminal."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import hq_backups
from tests.conftest import require_service
from tests.testbed.debian import DebianCluster
from tests.testbed.places import python_reachable
from tests.testbed.process import alive, as_user, give, short_directory, wait_until
from tests.testbed.s3 import S3Service
from tests.testbed.system import SudoRules

CODE = Path(hq_backups.__file__).parent.parent
ENV = "monolith"
PASSWORD = "pw-of-commcarehq-4711"
LOCAL = """\
SERVER_ENVIRONMENT = {env!r}
DATABASES = {{"default": {{"ENGINE": "django.db.backends.postgresql", "HOST": "127.0.0.1", "PORT": {port},
    "NAME": "commcarehq", "USER": "commcarehq", "PASSWORD": {password!r}, "OPTIONS": {{"connect_timeout": 5}}}}}}
S3_ACCESS_KEY = {access_key!r}
S3_SECRET_KEY = {secret_key!r}
HQ_BACKUPS = {backups!r}
EMAIL_HOST, EMAIL_PORT, DEFAULT_FROM_EMAIL = "127.0.0.1", {mail_port}, "hq@example.com"
"""
SETTINGS = """\
SECRET_KEY = "made-up"
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
INSTALLED_APPS = ["hq_backups"]
from localsettings import *
"""
MANAGE = """\
import os, sys
from django.core.management import execute_from_command_line
os.environ["DJANGO_SETTINGS_MODULE"] = "settings"
execute_from_command_line(sys.argv)
"""
HBA = """\
local all postgres peer
local replication postgres peer
host all all 127.0.0.1/32 scram-sha-256
"""


def unavailable() -> str:
    """Say why such a host cannot be made here; empty when it can."""
    reason = DebianCluster.unavailable() or SudoRules.unavailable()
    return reason or ("" if python_reachable() else f"{sys.executable} lies where other users cannot go")


class HqHost:
    """HQ on one host; commands run as HQ's user in HQ's directory, as django-manage runs them."""

    def __init__(self, root: Path, server: DebianCluster, s3: S3Service, bucket: str | None) -> None:
        self.root, self.server, self.s3, self.bucket = root, server, s3, bucket
        self.backups = root / "opt/data/backups/postgresql"
        self.current = root / "home/cchq/www" / ENV / "current"
        self.python = self.current / "python_env/bin/python"
        self.settings: dict[str, Any] = {
            "backup_postgres": "plain",
            "backup_host_name": "pg0",
            "encrypted_root": str(root / "opt/data"),
            "backup_state_dir": str(root / "state"),
            "postgresql_version": "15",
            "postgresql_port": server.port,
            "postgresql_data_dir": str(server.data_dir),
            "virtualenv_home": str(self.current / "python_env"),
        }
        if bucket is not None:
            self.settings |= {
                "postgres_s3": True,
                "postgres_snapshot_bucket": bucket,
                "aws_endpoint": s3.endpoint,
            }
        self.rules = SudoRules(self.python)
        self.stocked: tuple[str, ...] = ()
        self.mail_port = 1
        self._deploy()

    @property
    def data(self) -> Path:
        return self.server.data_dir

    def _deploy(self) -> None:
        """Lay out directories and code as commcare-cloud does."""
        self.server.hba_file.write_text(HBA)
        self.server.control("pg_ctlcluster", "--skip-systemctl-redirect", "15", self.server.name, "reload")
        self.backups.mkdir(parents=True, mode=0o700)
        self.backups.parent.chmod(0o755)
        give(self.backups, "postgres")
        self.backups.chmod(0o700)
        (self.root / "state").mkdir(mode=0o700)
        give(self.root / "state", "cchq")
        self.current.mkdir(parents=True)
        (self.current / "python_env").symlink_to(Path(sys.executable).parent.parent)
        (self.current / "manage.py").write_text(MANAGE)
        (self.current / "settings.py").write_text(SETTINGS)
        for path in (self.root / "home/cchq", *(self.root / "home/cchq").rglob("*")):
            if not path.is_symlink():
                give(path, "cchq")
        self.configure()
        self.server.psql(f"CREATE ROLE commcarehq LOGIN CREATEDB PASSWORD '{PASSWORD}'")
        self.server.psql("CREATE DATABASE commcarehq OWNER commcarehq")

    def configure(self, **changes: Any) -> None:
        """Write localsettings.py, which only cchq may read."""
        self.settings |= changes
        text = LOCAL.format(
            env=ENV,
            port=self.server.port,
            password=PASSWORD,
            access_key=self.s3.access_key,
            secret_key=self.s3.secret_key,
            mail_port=self.mail_port,
            backups={key: value for key, value in self.settings.items() if value is not None},
        )
        path = self.current / "localsettings.py"
        path.write_text(text)
        path.chmod(0o600)
        give(path, "cchq")

    @property
    def secrets(self) -> tuple[str, ...]:
        return (PASSWORD, self.s3.secret_key)

    def argv(self, *words: str) -> list[str]:
        return [str(self.python), "manage.py", *words]

    def environment(self, user: str) -> dict[str, str]:
        home = {"cchq": "/home/cchq", "postgres": "/var/lib/postgresql", "root": "/root"}[user]
        path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        return {
            "HOME": home,
            "USER": user,
            "LOGNAME": user,
            "PATH": path,
            "LANG": "C.UTF-8",
            "TERM": "xterm",
            # The checkout under test, whatever the environment has installed.
            "PYTHONPATH": str(CODE),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONWARNINGS": "ignore",
        }

    def start(self, *words: str, user: str = "cchq", **more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.argv(*words),
            cwd=self.current,
            env={**self.environment(user), **more},
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            **as_user(user),
        )

    def run(self, *words: str, user: str = "cchq", timeout: float = 120, **more: str) -> Ended:
        """Run a command without a terminal."""
        process = self.start(*words, user=user, **more)
        out, err = process.communicate(timeout=timeout)
        return Ended(process.returncode, out, err)

    def good(self, *words: str, user: str = "cchq", **more: str) -> Ended:
        """Run a command that must succeed."""
        ended = self.run(*words, user=user, **more)
        assert ended.code == 0, f"{words}: {ended}"
        return ended

    def standalone(self, *words: str, user: str) -> Ended:
        """Run ``hq-backups`` as a user who may not read HQ's settings; its own come by the environment."""
        variables = {f"HQ_BACKUPS_{key.upper()}": str(value) for key, value in self.settings.items()}
        variables |= {
            "HQ_BACKUPS_DEPLOY_ENV": ENV,
            "HQ_BACKUPS_AMAZON_S3_ACCESS_KEY": self.s3.access_key,
            "HQ_BACKUPS_AMAZON_S3_SECRET_KEY": self.s3.secret_key,
        }
        done = subprocess.run(
            [self.python, "-m", "hq_backups.standalone", *words],
            cwd="/",
            env={**self.environment(user), **variables},
            text=True,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=120,
            check=False,
            **as_user(user),
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    def screen(self, *words: str, user: str = "cchq", columns: int = 80) -> Screen:
        """Run a command at a terminal of its own, as through ``ssh -t``."""
        return Screen(self.argv(*words), self.current, self.environment(user), user, columns)

    def catalog(self, *words: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.good("list_backups", "--json", *words).out)
        return found

    def fill(self, megabytes: int = 1) -> None:
        """Make a table whose contents can be compared."""
        self.server.psql(
            "CREATE TABLE kept AS SELECT n, repeat(md5(n::text), 31) AS x "
            f"FROM generate_series(1, {megabytes * 1000}) n"
        )

    def contents(self) -> tuple[str, ...]:
        """Return what must be the same after a restore."""
        sql = (
            "SELECT md5(string_agg(x, ',' ORDER BY n)), count(*) FROM kept",
            "SELECT string_agg(rolname, ',' ORDER BY rolname) FROM pg_authid WHERE rolname !~ '^pg_'",
            "SELECT string_agg(datname, ',' ORDER BY datname) FROM pg_database",
            "SELECT system_identifier FROM pg_control_system()",
        )
        return tuple(self.server.psql(each) for each in sql)

    def stock(self) -> tuple[str, ...]:
        """Have one daily backup on the disk, made once and put back after; return what it holds."""
        kept = self.root / "stock"
        if not kept.exists():
            self.good("run_backup", "postgres", "--type=daily", "--no-upload")
            self.stocked = self.contents()
            subprocess.run(["cp", "-a", self.backups, kept], check=True)
        else:
            subprocess.run(["cp", "-a", f"{kept}/.", self.backups], check=True)
        return self.stocked

    def clear(self) -> None:
        """Leave no backups, no old data and no journal; the server runs."""
        assert self.engines() == []
        self.server.start()
        for path in self.backups.iterdir():
            path.unlink()
        for path in self.data.parent.iterdir():
            if path.name != self.data.name:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if self.bucket is not None:
            client = self.s3.client()
            for page in client.get_paginator("list_object_versions").paginate(Bucket=self.bucket):
                for item in [*page.get("Versions", ()), *page.get("DeleteMarkers", ())]:
                    client.delete_object(Bucket=self.bucket, Key=item["Key"], VersionId=item["VersionId"])

    def lose_everything(self) -> None:
        """Let the machine be rebuilt: a killed server, no data, no backups, no state; /etc is deployed anew."""
        self.server.kill()
        for path in (self.data, self.backups.parent):
            shutil.rmtree(path)
        for path in self.data.parent.iterdir():
            path.unlink()

    def beside(self) -> list[str]:
        """Return what lies beside the data directory, but for locks and journals."""
        return sorted(p.name for p in self.data.parent.iterdir() if not p.name.startswith("."))

    def engines(self) -> list[int]:
        """Return the engine processes of this host's backups, whoever runs them."""
        return [pid for pid, argv in command_lines() if str(self.python) in argv and "entry.py" in argv]


class Ended:
    """How a command ended and what it said."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    def __repr__(self) -> str:
        return f"exit {self.code}\n--- out\n{self.out}\n--- err\n{self.err}"


def command_lines() -> Iterator[tuple[int, str]]:
    """Yield every process's id and command line."""
    for each in Path("/proc").iterdir():
        if each.name.isdigit():
            with contextlib.suppress(OSError):
                yield (
                    int(each.name),
                    (each / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"),
                )


class Screen:
    """A program at a terminal that is its own: what it writes is kept raw, and can be drawn."""

    def __init__(
        self, argv: Sequence[str], cwd: Path, env: Mapping[str, str], user: str, columns: int
    ) -> None:
        master, slave = os.openpty()
        give(Path(os.ttyname(slave)), user)
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.columns, self.raw = columns, b""
        self.process = subprocess.Popen(
            ["setsid", "--ctty", *argv],
            cwd=cwd,
            env=dict(env),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            **as_user(user),
        )
        os.close(slave)
        self._master: int | None = master
        self._reader = threading.Thread(target=self._read, args=(master,), daemon=True)
        self._reader.start()

    def _read(self, master: int) -> None:
        with contextlib.suppress(OSError):  # EIO: nobody has the terminal any more
            while data := os.read(master, 1 << 16):
                self.raw += data

    def expect(self, text: str, timeout: float = 60) -> None:
        """Wait until ``text`` was written."""
        wait_until(
            lambda: text in self.text or self.process.poll() is not None, what=f"{text!r}", timeout=timeout
        )
        wait_until(
            lambda: text in self.text or not self._reader.is_alive(),
            what=f"{text!r} in {self.text}",
            timeout=10,
        )
        assert text in self.text, self.text

    def type(self, text: str) -> None:
        """Type a line."""
        self.press(text.encode() + b"\n")

    def press(self, keys: bytes) -> None:
        """Press keys, such as those of Ctrl-C."""
        assert self._master is not None
        os.write(self._master, keys)

    def hang_up(self) -> None:
        """Lose the connection: the kernel sends SIGHUP to the session."""
        assert self._master is not None
        # The reader holds it open while it reads; as sshd does, its end comes with the descriptor's.
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, self.columns, 0, 0))
        os.close(self._master)
        self._master = None

    def wait(self, timeout: float = 120) -> int:
        """Wait for the end; return the exit status."""
        code = self.process.wait(timeout)
        self._reader.join(10)
        return code

    @property
    def text(self) -> str:
        """Return all that was written, without colours and cursor movements."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.raw.decode(errors="replace")).replace("\r\n", "\n")

    @property
    def drawn(self) -> list[str]:
        """Return the lines as they stand in the end, drawn by a terminal of this width."""
        return draw(self.raw.decode(errors="replace"), self.columns)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        if self._master is not None:
            self._reader.join(1)
            os.close(self._master)
            self._master = None


def draw(raw: str, columns: int) -> list[str]:
    """Draw what a program wrote as a terminal without a bottom would; a wrapped line ends in ``⏎``."""
    lines: list[list[str]] = [[]]
    row = column = 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|.|\n", raw, re.DOTALL):
        if part == "\n":
            row += 1
        elif part == "\r":
            column = 0
        elif part.startswith("\x1b["):
            number = int(re.sub(r"\D", "", part) or 1) if part[-1] in "AB" else 0
            if part[-1] == "A":
                row = max(0, row - number)
            elif part[-1] == "B":
                row += number
            elif part.endswith("2K"):
                lines[row] = []
            elif part[-1] == "K":
                del lines[row][column:]
        else:
            if column >= columns:
                lines[row].append("⏎")
                row, column = row + 1, 0
            while len(lines) <= row:
                lines.append([])
            line = lines[row]
            line += " " * (column + 1 - len(line))
            line[column] = part
            column += 1
        while len(lines) <= row:
            lines.append([])
    return ["".join(line).rstrip() for line in lines]


@contextlib.contextmanager
def hq_host(s3: S3Service, bucket: str | None) -> Iterator[HqHost]:
    """Make a host, with HQ's sudo rule, and take it away."""
    reason = unavailable()
    require_service("a host like HQ's", not reason, reason)
    with short_directory() as root, DebianCluster(root) as server:
        host = HqHost(root, server, s3, bucket)
        host.good("migrate", "-v0")
        with host.rules:
            yield host


def killed(pid: int) -> None:
    """Kill as a power cut would."""
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not alive(pid), what="the end")
