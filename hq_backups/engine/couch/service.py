"""How a node is stopped and started: as configured, else by systemd."""

from __future__ import annotations

from pathlib import Path

from hq_backups.engine.control import Argv, CommandService, Monit, Service
from hq_backups.engine.couch import proc
from hq_backups.engine.errors import ConfigurationError, PreflightFailed

SYSTEMD = Path("/run/systemd/system")
MONIT_NAMES = r"couchdb2?([-_.@].*)?"


def find_couch_service(
    data_dir: Path,
    unit: str,
    *,
    stop_command: Argv | None = None,
    start_command: Argv | None = None,
    systemd: Path = SYSTEMD,
) -> Service:
    """Return how the node of ``data_dir``, which need not exist, is controlled; raises PreflightFailed."""
    if bool(stop_command) != bool(start_command):
        raise ConfigurationError(
            "couchdb_stop_command and couchdb_start_command must be set together",
            hint="Set both as lists of words, or neither.",
        )
    if not (stop_command and start_command):
        if not systemd.is_dir():
            raise PreflightFailed(
                f"it is not known how the CouchDB of {data_dir} is stopped and started: systemd does not run here",
                hint="Set couchdb_stop_command and couchdb_start_command.",
            )
        stop_command, start_command = ("systemctl", "stop", unit), ("systemctl", "start", unit)
    return CommandService(
        "CouchDB",
        (stop_command,),
        start_command,
        running=lambda: proc.is_held(data_dir),
        monit=Monit.find(MONIT_NAMES),
    )
