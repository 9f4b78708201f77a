"""Run another host's ssh server: on loopback, with one directory that it sees elsewhere than we do."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from tests.testbed.places import IS_ROOT, tool
from tests.testbed.process import LOOPBACK, ChildService, ServiceError, give, listening, run_here

SSH_CONFIG = Path("/etc/ssh/ssh_config.d")


class OtherHost(ChildService):
    """A host that every user of this machine reaches as ``host``, logged in as ``os_user``.

    It is this machine, but where we have the directory ``place`` it has ``disk``: it runs in a mount namespace.
    """

    name = "sshd"

    def __init__(self, workdir: Path, os_user: str, place: Path, disk: Path) -> None:
        """Describe it; its keys, and that of whom it lets in, are made when it starts."""
        super().__init__(workdir)
        self.os_user = None  # it becomes that user by itself, after the mount
        self.login, self.place, self.disk = os_user, place, disk
        self.host = f"hqb-{os.getpid()}-{secrets.token_hex(4)}"
        self._client = SSH_CONFIG / f"{self.host}.conf"

    @staticmethod
    def unavailable() -> str:
        """Say why none can be run here; empty when it can."""
        if not IS_ROOT:
            return "only root can mount, and tell every user's ssh of a host"
        if missing := [name for name in ("sshd", "ssh", "ssh-keygen", "rsync") if tool(name) is None]:
            return f"not installed: {', '.join(missing)} (make testbed)"
        if not SSH_CONFIG.is_dir():
            return f"{SSH_CONFIG} is not there"
        try:
            run_here("unshare", "--mount", "true")
        except ServiceError as error:
            return str(error)
        return ""

    def argv(self) -> Sequence[str | Path]:
        """Return the command: mount, become the user, serve."""
        script = 'mount --bind "$1" "$2" && shift 2 && exec "$@"'
        become = ["setpriv", f"--reuid={self.login}", f"--regid={self.login}", "--init-groups"]
        config = self.workdir / "sshd_config"
        config.write_text(
            f"ListenAddress {LOOPBACK}\nPort {self.port}\nHostKey {self.workdir}/host_key\nPidFile none\n"
            f"AuthorizedKeysFile {self.workdir}/user_key.pub\nPasswordAuthentication no\n"
            "KbdInteractiveAuthentication no\nUsePAM no\nStrictModes no\n"
        )
        self._tell()
        sshd = [str(tool("sshd")), "-D", "-e", "-f", str(config)]
        return ["unshare", "--mount", "--", "sh", "-c", script, "sh", self.disk, self.place, *become, *sshd]

    def ready(self) -> bool:
        """Tell whether it listens."""
        return listening(self.port)

    def start(self) -> None:
        """Make the keys first."""
        self.workdir.mkdir(exist_ok=True)
        self.workdir.chmod(0o755)
        for key in ("host_key", "user_key"):
            if not (self.workdir / key).exists():
                run_here("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.workdir / key)
            give(self.workdir / key, self.login)
        super().start()

    def stop(self, timeout: float = 20.0) -> None:
        """End it, and forget it."""
        super().stop(timeout)
        self._client.unlink(missing_ok=True)

    def _tell(self) -> None:
        """Make the host known to everybody's ssh, and its key."""
        kind, key = (self.workdir / "host_key.pub").read_text().split()[:2]
        known = self.workdir / "known_hosts"
        known.write_text(f"{self.host} {kind} {key}\n")
        known.chmod(0o644)
        self._client.write_text(
            f"Host {self.host}\n  HostName {LOOPBACK}\n  Port {self.port}\n  User {self.login}\n"
            f"  HostKeyAlias {self.host}\n  UserKnownHostsFile {known}\n  IdentityFile {self.workdir}/user_key\n"
        )

    def forget_key(self) -> None:
        """Let nobody here know its key any more."""
        (self.workdir / "known_hosts").write_text("")

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self.stop()
        shutil.rmtree(self.workdir, ignore_errors=True)

    def __enter__(self) -> Self:
        """Start."""
        self.start()
        return self
