"""Starts the engine as another user: from root, or through sudo."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

import hq_backups
from hq_backups import identity
from hq_backups.child import EngineProcess
from hq_backups.engine.errors import ProducerFailed, WrongUser

PACKAGE = Path(os.path.abspath(hq_backups.__file__)).parent
KEPT_ENVIRONMENT = (
    "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy",
    "AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE",
)  # fmt: skip


def interpreter(python: Path | None) -> Path:
    """Return the interpreter as the sudo rule names it: not resolved, a virtual environment is its path."""
    if python is not None and os.access(python, os.X_OK):
        return python
    return Path(sys.executable)


def start(argv: list[str], user: str) -> EngineProcess:
    """Start the engine as ``user``; raises WrongUser when that cannot be."""
    if not identity.exists(user):
        raise WrongUser(
            f"this must run as {user}, and this host has no such user",
            hint="Name the right one in the settings: <store>_backup_os_user.",
        )
    return _as_root(argv, user) if os.geteuid() == 0 else _with_sudo(argv, user)


def _as_root(argv: list[str], user: str) -> EngineProcess:
    kept = {name: os.environ[name] for name in KEPT_ENVIRONMENT if name in os.environ}
    try:
        return EngineProcess(argv, user=user, env={**kept, "USER": user, "LOGNAME": user})
    except ProducerFailed as error:
        raise unreachable(argv, user) from error


def _with_sudo(argv: list[str], user: str) -> EngineProcess:
    sudo = shutil.which("sudo", path="/usr/bin:/usr/local/bin:/bin")
    if sudo is None:
        raise refused(argv, user, "sudo is not installed")
    if user == "root":
        identity.refuse_writable(identity.program_files(PACKAGE, Path(argv[0])))
    return EngineProcess([sudo, "-n", "-u", user, "--", *argv])


def unreachable(argv: list[str], user: str) -> WrongUser:
    """Return the error of an interpreter that lies where ``user`` may not go."""
    return WrongUser(
        f"{user} cannot run {argv[0]}",
        hint="Name a Python environment that every user can reach: virtualenv_home.",
    )


def refused(argv: list[str], user: str, reason: str) -> WrongUser:
    """Return the error that tells what sudo lacks: a rule, or an interpreter that can be reached."""
    if "unable to execute" in reason:
        return unreachable(argv, user)
    rule = f"{identity.me()} ALL=({user}) NOPASSWD: " + " ".join(_sudoers_word(word) for word in argv)
    again = shlex.join(["sudo", "-u", user, *sys.orig_argv])
    return WrongUser(
        f"this must run as {user}, and {identity.me()} cannot become {user}: {reason}",
        hint=f"Let it, by this line in /etc/sudoers.d/hq_backups:\n{rule}\nor run it as that user:\n{again}",
    )


def _sudoers_word(word: str) -> str:
    """Quote what sudoers(5) reads as more than itself."""
    return "".join(f"\\{c}" if c in ",:=\\ *?[]!()\"'#" else c for c in word)
