"""Whether a restored node would find the node that its backup is from, and join it.

A node that still knows the other's name connects to it, and with the same cookie they are one cluster: what is then
changed here is changed there (seen on real nodes). Erlang's nodes find each other by the mapper of ports of the
other's host only (erlang.org, erl_dist_protocol, EPMD): where that does not name it, it cannot be found.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
from collections.abc import Iterable

from hq_backups.engine.errors import PreflightFailed

EPMD_PORT = 4369
_NAMES_REQUEST = b"\x00\x01n"
_SECONDS = 3.0
_MOST_ANSWER = 1 << 20


def epmd_port() -> int:
    """Return the port of Erlang's mapper of ports; ERL_EPMD_PORT is Erlang's own variable for another one."""
    given = os.environ.get("ERL_EPMD_PORT", "")
    return int(given) if given.isdigit() else EPMD_PORT


def require_apart(sources: Iterable[str], ours: str | None) -> None:
    """Refuse a restore whose node would find one of ``sources``; this very node may be one. Raises PreflightFailed."""
    for source in sorted(set(sources)):
        if source == ours or not is_there(source, ours):
            continue
        host = source.rpartition("@")[2]
        raise PreflightFailed(
            f"the node that the backup is from, {source}, runs and can be reached from here: the restored node could "
            "join it, and what is changed on the copy would be changed there",
            hint=f"Keep this host from finding it while the copy serves, such as: iptables -A OUTPUT -p tcp -d {host} "
            f"--dport {epmd_port()} -j REJECT. Or stop {source}. Or unpack only: --target-dir DIR.",
        )


def is_there(node: str, ours: str | None) -> bool:
    """Tell whether the mapper of ports on a node's host names it, and means another than ours."""
    name, _, host = node.rpartition("@")
    if ours is not None and ours.rpartition("@")[0] == name and _is_here(host):
        # One mapper of ports knows a name once: the one of this host means us.
        return False
    return name in names(host)


def names(host: str) -> list[str]:
    """Return the nodes that the mapper of ports of a host knows; none when it does not answer."""
    with contextlib.suppress(OSError, UnicodeError):
        with socket.create_connection((host, epmd_port()), timeout=_SECONDS) as connection:
            connection.sendall(_NAMES_REQUEST)
            told = bytearray()
            while len(told) < _MOST_ANSWER and (data := connection.recv(4096)):
                told += data
        # Four bytes of port, then lines: `name couchdb at port 9100`.
        lines = (line.split() for line in told[4:].decode("utf-8", "replace").splitlines())
        return [words[1] for words in lines if len(words) >= 2 and words[0] == "name"]
    return []


def _is_here(host: str) -> bool:
    """Tell whether an address is one of this host's: only such a one can be bound to."""
    with contextlib.suppress(OSError, UnicodeError):
        for family, kind, protocol, _, address in socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM):
            if ipaddress.ip_address(address[0]).is_loopback:
                return True
            with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.bind(address)
                return True
    return False
