"""Finding out how a host stops and starts the PostgreSQL server of one data directory."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from hq_backups.engine.control import START_SECONDS, STOP_SECONDS, Argv, CommandService, Monit, Service
from hq_backups.engine.errors import ConfigurationError, HQBackupsError, PreflightFailed
from hq_backups.engine.journal import read_journal
from hq_backups.engine.postgres.tools import Tools

ETC = Path("/etc/postgresql")
SYSTEMD = Path("/run/systemd/system")
PROC = Path("/proc")
PROGRAMS = ("postgres", "postmaster")
MONIT_NAMES = r"postgres(ql)?([-_.@]?\d+([-_.].*)?)?"
LOG_NAME = "hq_backups_start.log"

_DATA_DIRECTORY = re.compile(
    r"\s*data_directory\s*(?:=\s*|\s)(?:'((?:[^'\\]|''|\\.)*)'|([^\s'#]+))", re.IGNORECASE
)


@dataclass(frozen=True)
class DebianCluster:
    """A cluster that Debian's tools know."""

    version: str
    name: str


def find_postgres_service(
    data_dir: Path,
    *,
    version: int | None,
    os_user: str,
    tools: Tools | None = None,
    stop_command: Argv | None = None,
    start_command: Argv | None = None,
    etc: Path = ETC,
    systemd: Path = SYSTEMD,
) -> Service:
    """Return how the server of ``data_dir`` is controlled: as configured, by Debian, or by pg_ctl.

    ``data_dir`` may be missing; an unknown ``version`` is then that of the data which a restore set aside.
    """
    base = CommandService(
        "PostgreSQL", (), (), running=lambda: is_running(data_dir), monit=Monit.find(MONIT_NAMES)
    )
    if stop_command or start_command:
        if not (stop_command and start_command):
            raise ConfigurationError(
                "postgresql_stop_command and postgresql_start_command must be set together",
                hint="Set both as lists of words, or neither.",
            )
        return replace(base, stop_commands=(stop_command,), start_command=start_command)
    cluster = find_debian_cluster(data_dir, etc)
    if cluster is not None:
        return _debian(base, cluster, systemd)
    if version is None:
        version, os_user = _set_aside(data_dir, os_user)
    return _pg_ctl(base, data_dir, version, os_user, tools or Tools())


def _debian(base: CommandService, cluster: DebianCluster, systemd: Path) -> Service:
    """Control a cluster through systemd where that is the init, else directly."""
    tool = ("pg_ctlcluster", "--skip-systemctl-redirect", cluster.version, cluster.name)
    stop = (*tool, "stop", "-m", "fast", "--", "-t", f"{STOP_SECONDS:.0f}")
    if systemd.is_dir():
        unit = f"postgresql@{cluster.version}-{cluster.name}"
        # systemd does not stop what was started behind its back: the tool does.
        commands = (("systemctl", "stop", unit), stop)
        return replace(base, name=unit, stop_commands=commands, start_command=("systemctl", "start", unit))
    start = (*tool, "start", "--", "-t", f"{START_SECONDS:.0f}")
    name = f"PostgreSQL cluster {cluster.version} {cluster.name}"
    return replace(base, name=name, stop_commands=(stop,), start_command=start)


def _pg_ctl(base: CommandService, data_dir: Path, version: int | None, os_user: str, tools: Tools) -> Service:
    """Control a server as its own user with the pg_ctl of its version."""
    try:
        if version is None:
            raise PreflightFailed("its version is unknown")
        pg_ctl = tools.own("pg_ctl", version).path
    except HQBackupsError as error:
        raise PreflightFailed(
            f"it is not known how the server of {data_dir} is stopped and started: no cluster of {ETC} "
            f"has this data directory, and {error}",
            hint="Set postgresql_stop_command and postgresql_start_command, or postgresql_bin_dir.",
        ) from error
    log = data_dir / LOG_NAME
    control = (str(pg_ctl), "-D", str(data_dir), "-w")
    return replace(
        base,
        name=f"PostgreSQL in {data_dir}",
        stop_commands=((*control, "-t", f"{STOP_SECONDS:.0f}", "-m", "fast", "stop"),),
        start_command=(*control, "-t", f"{START_SECONDS:.0f}", "-l", str(log), "start"),
        user=os_user,
        log=log,
    )


def _set_aside(data_dir: Path, os_user: str) -> tuple[int | None, str]:
    """Return version and owner of the data that a restore, killed between its renames, set aside."""
    journal = read_journal(data_dir.resolve())
    if journal is not None:
        with contextlib.suppress(OSError, ValueError, KeyError):
            version = int((journal.old / "PG_VERSION").read_text().split(".")[0])
            return version, pwd.getpwuid(journal.old.stat().st_uid).pw_name
    return None, os_user


def find_debian_cluster(data_dir: Path, etc: Path = ETC) -> DebianCluster | None:
    """Return the cluster whose configuration names ``data_dir``, which need not exist."""
    wanted = data_dir.resolve()
    for conf in sorted(etc.glob("*/*/postgresql.conf")):
        named = _data_directory(conf)
        if named is not None and Path(named).resolve() == wanted:
            return DebianCluster(conf.parts[-3], conf.parts[-2])
    return None


def is_running(data_dir: Path, proc: Path = PROC) -> bool:
    """Tell whether a postmaster or any of its children works in ``data_dir``.

    A server's processes have the data directory as their working directory. The pid file alone proves
    nothing: it outlives a kill, and its pid may be another program's by now.
    """
    pid = _recorded_pid(data_dir)
    return any(_works_in(proc / entry, data_dir, believed=int(entry) == pid) for entry in _pids(proc))


def _works_in(entry: Path, data_dir: Path, *, believed: bool) -> bool:
    try:
        if entry.joinpath("comm").read_text().strip() not in PROGRAMS:
            return False
        try:
            if os.path.samestat(os.stat(entry / "cwd"), os.stat(data_dir)):
                return True
        except FileNotFoundError:
            # The data directory is gone, or the process is a zombie and has none.
            return os.readlink(entry / "cwd") == f"{data_dir.resolve()} (deleted)"
        return False
    except PermissionError:
        return believed
    except (OSError, UnicodeDecodeError):
        return False


def _pids(proc: Path) -> Iterator[str]:
    return (name for name in os.listdir(proc) if name.isdigit())


def _recorded_pid(data_dir: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int((data_dir / "postmaster.pid").read_text(errors="replace").splitlines()[0])
    return None


def _data_directory(conf: Path) -> str | None:
    """Return the last data_directory of a configuration, files in conf.d after it as Debian includes them."""
    found = None
    for path in (conf, *sorted((conf.parent / "conf.d").glob("*.conf"))):
        try:
            lines = path.read_text(errors="replace").splitlines()
        except OSError:
            continue
        for line in lines:
            match = _DATA_DIRECTORY.match(line)
            if match is not None:
                quoted, bare = match.groups()
                found = bare if quoted is None else re.sub(r"''|\\(.)", lambda m: m.group(1) or "'", quoted)
    return found
