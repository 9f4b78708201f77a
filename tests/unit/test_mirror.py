"""What a copy's failure means, by what rsync and ssh said; which of them ends first is a race."""

from __future__ import annotations

import pytest

from hq_backups.engine.errors import ProducerFailed
from hq_backups.engine.mirror import _meaning

_RSYNC = (
    "rsync: connection unexpectedly closed (0 bytes received so far) [sender]\n"
    "rsync error: error in rsync protocol data stream (code 12) at io.c(228) [sender=3.2.7]\n"
)
_UNREACHED = "h cannot be reached by ssh without a password"


@pytest.mark.parametrize("status", [12, 255])
@pytest.mark.parametrize(
    "ssh",
    [
        "ssh: connect to host 127.0.0.1 port 22: Connection refused\r\n",
        "ssh: connect to host 127.0.0.1 port 22: No route to host\r\n",
        "ssh: Could not resolve hostname h: Name or service not known\r\n",
        "Host key verification failed.\r\n",
        "couchdb@h: Permission denied (publickey,password).\r\n",
        "Connection timed out during banner exchange\r\nConnection to 127.0.0.1 port 22 timed out\r\n",
    ],
)
def test_a_host_that_ssh_does_not_reach_is_told_whoever_ends_first(status: int, ssh: str) -> None:
    cause, command = _meaning(_failed(status, ssh + _RSYNC), "h", "/b")
    assert cause.startswith(f"{_UNREACHED} ({ssh.split()[0]}")
    assert command.endswith("ssh h true")


@pytest.mark.parametrize(
    ("status", "said", "cause", "command"),
    [
        (255, "", f"{_UNREACHED} (it said nothing)", "ssh h true"),
        (
            12,
            "bash: line 1: rsync: command not found\n" + _RSYNC,
            "rsync is not installed on h",
            "install rsync",
        ),
        (
            12,
            'rsync: [sender] mkdir "/b" failed: No such file (2)\n',
            "the directory cannot be written there",
            "'/a b'",
        ),
        (
            23,
            'rsync: mkstemp "/b/x" failed: Permission denied (13)\n',
            "the directory cannot be",
            "mkdir -p '/a b'",
        ),
        (
            12,
            'rsync: write failed on "/b/x": No space left on device (28)\n',
            "the disk there is full",
            "df -h '/a b'",
        ),
        (11, _RSYNC, "the disk there is full, or broken", "df -h '/a b'"),
        (
            12,
            "Timeout, server h not responding.\r\n" + _RSYNC,
            "Timeout, server h not responding.",
            "ls -la '/a b'",
        ),
        (30, "{host} said {0}\n" + _RSYNC, "{host} said {0}", "ls -la '/a b'"),
    ],
)
def test_other_failures_are_told_by_their_words(status: int, said: str, cause: str, command: str) -> None:
    found, advice = _meaning(_failed(status, said), "h", "/a b")
    assert found.startswith(cause)
    assert advice.endswith(command)


def _failed(status: int, stderr: str) -> ProducerFailed:
    return ProducerFailed(program="rsync", status=status, tail=stderr[-100:], stderr=stderr)
