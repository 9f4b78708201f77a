"""A copy of the backup directory on another host, by rsync(1) over ssh(1), after a good run.

Artifacts and their manifests only: what runs have not finished stays here, and files that are not ours are left alone
on both sides. A name appears there when all that is sent has arrived; what retention has removed here is then removed
there. A copy that fails is a warning: the backup is good without it.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from hq_backups.engine import accounts, names
from hq_backups.engine.child import NOT_STARTED
from hq_backups.engine.errors import ProducerFailed
from hq_backups.engine.events import Events
from hq_backups.engine.process import Producer
from hq_backups.engine.stores.base import Store

QUIET_SECONDS = 300
"""After so long without a byte rsync gives up, at either end; a little later so do we."""
CONNECT_SECONDS = 30
PATIENCE_SECONDS = QUIET_SECONDS + CONNECT_SECONDS + 30
_ARRIVING = ".~tmp~"
"""Where rsync collects what --delay-updates holds back; what a broken run left in it is removed with the rest."""
_NOT_THE_CAUSE = ("rsync error:", "rsync: connection unexpectedly", "Could not chdir to home directory")
_FAILURES = (
    (
        re.compile(r"command not found|status 127\b|rsync: not found"),
        127,
        "rsync is not installed on {host} ({last})",
        "{ssh} sudo apt-get install rsync",
    ),
    (
        # When rsync meets the closed pipe before ssh has ended, its status is its own: what ssh said is left.
        re.compile(
            r"^ssh: |^Host key verification failed|Permission denied \([a-z]|^Connection (?:timed out|to .* timed out)",
            re.M,
        ),
        255,
        "{host} cannot be reached by ssh without a password ({last})",
        "Try it: {ssh} true",
    ),
    (
        re.compile(r"mkdir|Permission denied"),
        None,
        "the directory cannot be written there ({last})",
        "{ssh} mkdir -p {place}",
    ),
    (
        # The words of the other side are lost at times, rsync's own status is not.
        re.compile(r"No space left on device|Disk quota exceeded"),
        11,
        "the disk there is full, or broken ({last})",
        "{ssh} df -h {place}",
    ),
)
"""What rsync and ssh said, what rsync exits with then (rsync(1), EXIT VALUES; ssh(1), EXIT STATUS), the cause, and what
to type. The first counts of which either fits."""


def copy(store: Store, directory: Path, events: Events) -> None:
    """Copy a store's backup directory to the host that its settings name, if they do; never raises for its failure."""
    if store.settings.mirror is None:
        return
    host, place = destination(store.settings.mirror, directory)
    events.step("mirror", f"copying {directory} to {host}:{place}")
    try:
        _send(_argv(store.name, directory, host, place))
    except ProducerFailed as error:
        cause, command = _meaning(error, host, place)
        events.warning(
            "mirror-failed",
            f"the backup is good, but its copy to {host}:{place} failed: {cause}. {command}. The next run sends all "
            "that is missing there",
        )
        return
    events.emit("check", name="mirror", ok=True, message=f"{host}:{place} has what {directory} has")


def destination(mirror: str, directory: Path) -> tuple[str, str]:
    """Return host and directory of ``[user@]host[:/directory]``; without one it is the same as here."""
    head, bracket, tail = mirror.rpartition("]")
    host, _, place = tail.partition(":")
    return head + bracket + host, place or str(directory)


def _argv(store: str, directory: Path, host: str, place: str) -> list[str]:
    prefix = names.PREFIX[store]
    ssh = ("ssh", "-oBatchMode=yes", f"-oConnectTimeout={CONNECT_SECONDS}", "-oServerAliveInterval=30")
    return [
        "rsync", "--archive", "--hard-links", "--whole-file", "--protect-args",
        # Later than all else, so that nothing there is lost to a run that fails.
        "--delay-updates", "--delete-after",
        f"--filter=R /{_ARRIVING}/***", f"--include=/{prefix}_*", f"--include=/.{prefix}_*.json", "--exclude=*",
        f"--timeout={QUIET_SECONDS}", "--info=progress2", "--outbuf=none",
        f"--rsh={shlex.join(ssh)}", "--", f"{directory}/", f"{host}:{place}/",
    ]  # fmt: skip


def _send(argv: list[str]) -> None:
    """Run rsync to its end; raises ProducerFailed, also when it has shown no progress for long."""
    with Producer(argv) as rsync:
        while rsync.readable(PATIENCE_SECONDS):
            if not rsync.read(1 << 16):
                return
        rsync.kill()
        raise rsync.failure(f"no progress for {PATIENCE_SECONDS:g} seconds")


def _meaning(error: ProducerFailed, host: str, place: str) -> tuple[str, str]:
    """Return what went wrong, and what to type."""
    status, said = error.facts.get("status"), str(error.facts.get("stderr") or error.facts.get("tail"))
    if status == NOT_STARTED and "could not be started" in said:
        return "rsync is not installed here", "apt-get install rsync"
    words = {
        "host": host,
        "last": _last_words(said),
        "ssh": f"sudo -u {accounts.me()} ssh {host}",
        "place": shlex.quote(place),
    }
    for said_so, exited_so, cause, command in _FAILURES:
        if status == exited_so or said_so.search(said):
            return cause.format_map(words), command.format_map(words)
    return words["last"], "Look there: {ssh} ls -la {place}".format_map(words)


def _last_words(said: str) -> str:
    """Return the line that tells the cause: rsync's own last one only says that there was an error."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    causes = [line for line in lines if not line.startswith(_NOT_THE_CAUSE)]
    return (causes or lines or ["it said nothing"])[-1][-300:]
