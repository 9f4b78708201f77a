"""A node of our own on an unpacked tree: on loopback, in no cluster, with nothing that reaches outside.

Erlang's nodes meet through a mapper of ports and a common cookie (erlang.org, Distributed Erlang; epmd(1)). This one
has a mapper of its own on a port of its own, a cookie that nobody else can read, a name that nobody has, and never
connects to another by itself. The release's own settings are left alone: of them only default.ini is read, then ours.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hq_backups.engine.child import Child
from hq_backups.engine.couch import proc
from hq_backups.engine.couch.node import Node
from hq_backups.engine.couch.release import Release
from hq_backups.engine.errors import DiskFull, HQBackupsError, ServiceError

HOME = "node"
"""Beside the tree: what the node has of its own. It is the home of all its processes, by which they are known."""

START_SECONDS = 120.0
ANSWER_SECONDS = 120.0
"""How long one answer may take."""
_PROBE_SECONDS = 3.0
"""Who took the port before the node did may never answer."""
_STARTS = 3
_POLL_SECONDS = 0.1
_LOOPBACK = "127.0.0.1"
_ADMIN = "hq_backups"
_FULL = (b"no space left on device", b"enospc")
_TAKEN = (b"eaddrinuse", b"address already in use")

# Replications that the copy has written down would run into the same targets as the original's; an index or a
# compaction that nobody asked for takes time and disk.
_INI = """[couchdb]
database_dir = {tree}
view_index_dir = {tree}
uuid = {uuid}

[chttpd]
bind_address = {loopback}
port = {port}

[httpd]
enable = false
bind_address = {loopback}
port = 0

[log]
writer = stderr
level = warning

[replicator]
max_jobs = 0

[smoosh]
db_channels = ,
view_channels = ,

[admins]
{admin} = {password}
"""

_ARGS = """-name {name}
-start_epmd false
-kernel inet_dist_use_interface {{127,0,0,1}}
-kernel dist_auto_connect never
-kernel error_logger silent
-sasl sasl_error_logger false
+Bd -noinput
"""

# A node does not read its standard input, so no pipe of ours would end it when we are killed: a watcher beside it
# does, and ends the whole group.
_TIED = """exec 3<&0 </dev/null
{ read -r _ <&3; kill -KILL 0; } &
exec 3<&- "$@"
"""


@dataclass(frozen=True)
class ScratchNode:
    """A running one."""

    name: str
    client: Node
    process: Child
    log: Path

    def why(self, error: ServiceError) -> HQBackupsError:
        """Return an error of the node's with what it says itself: that its process ended, and its last words."""
        if _says(self.log, _FULL):
            return DiskFull(path=self.log.parent)
        ended = "the node that was started on the copy has ended: " if self.process.wait(0) else ""
        return ServiceError(f"{ended}{error.message}; its log ends: {_tail(self.log)}", hint=error.hint)


@contextmanager
def running(tree: Path, release: Release) -> Iterator[ScratchNode]:
    """Run a node on ``tree`` for as long as the block; raises ServiceError when it does not start.

    Must be called as the owner of ``tree``, beside which it makes a directory of its own.
    """
    home = tree.parent / HOME
    stop(home)
    home.mkdir(mode=0o700)
    # Node-local replications of CouchDB 1's time would be resumed.
    (tree / "_replicator.couch").unlink(missing_ok=True)
    _write(home / ".erlang.cookie", secrets.token_hex(32), 0o400)
    log = home / "log"
    # One for all starts: a node that failed may have written down that it is a member.
    name = f"hqb-{secrets.token_hex(8)}@{_LOOPBACK}"
    try:
        with contextlib.ExitStack() as stack:
            for left in reversed(range(_STARTS)):
                try:
                    node = stack.enter_context(_started(tree, home, release, name))
                    break
                except ServiceError:
                    # Somebody may have taken a free port before the node did.
                    if not left or not _says(log, _TAKEN):
                        raise
            yield node
    finally:
        stop(home)


def stop(home: Path) -> None:
    """End every process that has ``home``, at once: what it works on is thrown away."""
    proc.end_all_of(home)


@contextmanager
def _started(tree: Path, home: Path, release: Release, name: str) -> Iterator[ScratchNode]:
    log = home / "log"
    mapper, port = _free_ports(2)
    password = secrets.token_hex(24)
    ini = _INI.format(
        tree=tree, uuid=secrets.token_hex(16), loopback=_LOOPBACK, port=port, admin=_ADMIN, password=password
    )
    _write(home / "local.ini", ini, 0o600)
    _write(home / "vm.args", _ARGS.format(name=name), 0o600)
    environment = {
        "HOME": str(home),
        "COUCHDB_ARGS_FILE": str(home / "vm.args"),
        "ERL_EPMD_ADDRESS": _LOOPBACK,
        "ERL_EPMD_PORT": str(mapper),
        "ERL_CRASH_DUMP_SECONDS": "0",
    }
    url = f"http://{_LOOPBACK}:{port}"
    probe = Node(url, _ADMIN, password, _PROBE_SECONDS)
    epmd: list[str | Path] = [release.epmd, "-address", _LOOPBACK, "-port", str(mapper)]
    couchdb: list[str | Path] = [release.program, "-couch_ini", release.defaults, home / "local.ini"]
    log.unlink(missing_ok=True)
    with _tied(epmd, environment, home, log) as ports:
        _await(ports, log, "Erlang's mapper of ports", lambda: _listens(mapper))
        with _tied(couchdb, environment, home, log) as process:
            _await(process, log, f"CouchDB {release.version}", lambda: _answers(probe, name))
            yield ScratchNode(name, Node(url, _ADMIN, password, ANSWER_SECONDS), process, log)


@contextmanager
def _tied(argv: Sequence[str | Path], env: Mapping[str, str], home: Path, log: Path) -> Iterator[Child]:
    """Run a program that ends with the block, and with us."""
    with log.open("ab+") as said:
        words = ["/bin/sh", "-c", _TIED, "hqb-tied", *argv]
        with Child(
            words, stdin=subprocess.PIPE, stdout=said, stderr=said, env=env, user=None, cwd=home
        ) as child:
            yield child


def _await(child: Child, log: Path, what: str, ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not ready():
        ended = child.wait(0)
        if not ended and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            continue
        if _says(log, _FULL):
            raise DiskFull(path=log.parent)
        why = "ended at once" if ended else f"did not answer within {START_SECONDS:g} seconds"
        raise ServiceError(
            f"{what}, started on the unpacked copy, {why}: {_tail(log)}",
            hint="This says nothing against the backup: all of its documents were read. Mend what the log says or set "
            "couchdb_release_dir to another release, then repeat; without a node: unset couchdb_release_dir.",
        )


def _answers(client: Node, name: str) -> bool:
    """Tell whether our own node answers, not somebody who took its port."""
    with contextlib.suppress(ServiceError):
        return client.name() == name
    return False


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((_LOOPBACK, port)) == 0


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((_LOOPBACK, 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def _write(path: Path, text: str, mode: int) -> None:
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
        file.write(text)


def _says(log: Path, words: Sequence[bytes]) -> bool:
    with contextlib.suppress(OSError):
        said = log.read_bytes().lower()
        return any(word in said for word in words)
    return False


def _tail(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").split("\n")
    except OSError:
        return "it left no log"
    return "; ".join(line.strip() for line in lines if line.strip())[-500:] or "it left an empty log"
