"""A server of our own on a restored tree: private socket, our configuration, nothing that reaches outside."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from hq_backups.engine import names, process
from hq_backups.engine.child import Child
from hq_backups.engine.errors import CorruptBackup, DiskFull, ProducerFailed, ServiceError
from hq_backups.engine.postgres import controlfile, tablespaces
from hq_backups.engine.postgres.psql import LOGIN_TRIGGERS, Server
from hq_backups.engine.postgres.tools import Tools

PORT = 5432
"""Only names the socket file in a directory of its own: no TCP port is opened."""

HOME_PREFIX = "hqb-scratch-"

START_SECONDS = 24 * 3600
STOP_SECONDS = 3600

_LIMIT = re.compile(r"^(max_\w+) setting:\s+(\d+)$", re.MULTILINE)
_SPELT = {
    "max_prepared_xacts": "max_prepared_transactions",
    "max_locks_per_xact": "max_locks_per_transaction",
}
"""pg_controldata's words for two settings."""

# Each of these keeps the copy from acting as the original: archiving over its WAL, draining its
# subscriptions, answering at its address, loading modules that this host need not have.
_SETTINGS = {
    "listen_addresses": "",
    "archive_mode": "off",
    "archive_command": "",
    "restore_command": "",
    "primary_conninfo": "",
    "primary_slot_name": "",
    "recovery_target_timeline": "latest",
    "shared_preload_libraries": "",
    "max_logical_replication_workers": "0",
    "logging_collector": "off",
    "ssl": "off",
    "autovacuum": "off",
    "hot_standby": "on",
    "cluster_name": "hq_backups scratch",
    "external_pid_file": "",
}

# A server that pg_ctl started has no pipe of ours that would break when we are killed. It may be starting just then.
_TIED = """exec >/dev/null 2>&1
read -r _
home=$1; shift
for _ in 1 2 3 4 5; do
  "$@" && break
  sleep 1
done
rm -rf "$home\""""


@contextmanager
def _tied(data_dir: Path, pg_ctl: Path, home: Path) -> Iterator[None]:
    """Have the server stopped and its socket's directory removed if we are killed inside the block."""
    argv = ["/bin/sh", "-c", _TIED, "hqb-tied", str(home), *_stopping(data_dir, pg_ctl)]
    with Child(argv, stdin=subprocess.PIPE, env=None, user=None, cwd="/"):
        yield


@contextmanager
def running(
    data_dir: Path,
    major: int,
    tools: Tools,
    *,
    superuser: str,
    name: str,
    settings: Mapping[str, str] | None = None,
    keep: bool = False,
) -> Iterator[Server]:
    """Run the server of ``data_dir`` for as long as the block; raises CorruptBackup when it does not start.

    Must be called as the owner of ``data_dir``. postgresql.auto.conf and standby.signal are removed from it; a
    tree whose tablespaces lie elsewhere than beside it, in ``outer``, raises UnsafeArchive.
    With ``keep`` the tree is to be used afterwards: the server is shut down in order; raises ServiceError.
    """
    tablespaces.require_own(data_dir, [data_dir.parent / names.OUTER], name)
    pg_ctl = tools.own("pg_ctl", major).path
    controldata = tools.client("pg_controldata", major).path
    for stray in ("postgresql.auto.conf", "standby.signal", "recovery.signal", "postmaster.pid"):
        (data_dir / stray).unlink(missing_ok=True)
    # Socket paths are limited to 107 bytes: not below the data directory.
    home = Path(tempfile.mkdtemp(prefix=HOME_PREFIX))
    try:
        log = home / "log"
        config, hba = home / "postgresql.conf", home / "pg_hba.conf"
        wanted = {**_settings(data_dir, home, hba, controldata), **(settings or {})}
        if major >= LOGIN_TRIGGERS:
            wanted["event_triggers"] = "off"
        lines = [f"{key} = '{value}'" for key, value in wanted.items()]
        config.write_text("\n".join(lines) + "\n")
        hba.write_text("local all all trust\n")
        start = [str(pg_ctl), "start", "-w", "-t", str(START_SECONDS), "-D", str(data_dir), "-l", str(log)]
        with _tied(data_dir, pg_ctl, home):
            try:
                process.run(
                    [*start, "-o", f"-c config_file={config}"], timeout=START_SECONDS + 60, leaves_daemon=True
                )
            except ProducerFailed as error:
                if _is_full(log):
                    raise DiskFull(path=data_dir) from error
                raise CorruptBackup(f"the server does not start on it: {_tail(log)}", name=name) from error
            try:
                yield Server(host=str(home), port=PORT, user=superuser, major=major)
                if keep:
                    _shut_down(data_dir, pg_ctl, log)
            finally:
                stop(data_dir, pg_ctl)
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _shut_down(data_dir: Path, pg_ctl: Path, log: Path) -> None:
    argv = [str(pg_ctl), "stop", "-w", "-t", str(STOP_SECONDS), "-m", "fast", "-D", str(data_dir)]
    try:
        process.run(argv, timeout=STOP_SECONDS + 60, leaves_daemon=True)
    except ProducerFailed as error:
        if _is_full(log):
            raise DiskFull(path=data_dir) from error
        raise ServiceError(f"the server that loaded the backup did not shut down: {_tail(log)}") from error


def stop(data_dir: Path, pg_ctl: Path, user: str | None = None) -> None:
    """Stop a scratch server, at once if need be; one that is not running is fine."""
    if (data_dir / "postmaster.pid").exists():
        process.run(_stopping(data_dir, pg_ctl), user=user, check=False, timeout=90, leaves_daemon=True)


def _stopping(data_dir: Path, pg_ctl: Path) -> list[str]:
    return [str(pg_ctl), "stop", "-w", "-t", "60", "-m", "immediate", "-D", str(data_dir)]


def clean(data_dir: Path, pg_ctl: Path, user: str | None) -> None:
    """Stop the server that a killed run left on its scratch tree, and remove its socket's directory."""
    try:
        # postmaster.pid, fifth line: the socket directory (postgresql.org/docs, src/include/utils/pidfile.h).
        home: Path | None = Path((data_dir / "postmaster.pid").read_text().splitlines()[4])
    except (OSError, IndexError):
        home = None
    stop(data_dir, pg_ctl, user)
    if home is not None and home.name.startswith(HOME_PREFIX) and home.parent == Path(tempfile.gettempdir()):
        shutil.rmtree(home, ignore_errors=True)


def _settings(data_dir: Path, home: Path, hba: Path, pg_controldata: Path) -> dict[str, str]:
    settings = {**_SETTINGS, "data_directory": str(data_dir), "hba_file": str(hba), "ident_file": os.devnull}
    settings |= {"unix_socket_directories": str(home), "port": str(PORT), "unix_socket_permissions": "0700"}
    # Recovery of a copy may need no less than its primary had.
    settings |= {key: str(value) for key, value in recorded_limits(data_dir, pg_controldata).items()}
    return settings


def recorded_limits(data_dir: Path, pg_controldata: Path) -> dict[str, int]:
    """Return the limits that the control file records (``max_prepared_transactions`` guards recovery)."""
    said = controlfile.report(pg_controldata, data_dir)
    return {_SPELT.get(name, name): int(value) for name, value in _LIMIT.findall(said)}


def _is_full(log: Path) -> bool:
    """Tell whether a server found its disk full; its last words may be others."""
    with contextlib.suppress(OSError):
        return b"No space left on device" in log.read_bytes()
    return False


def _tail(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return "it left no log"
    fatal = [line for line in lines if "FATAL" in line or "PANIC" in line]
    return (fatal or lines or ["it left an empty log"])[-1][-500:]
