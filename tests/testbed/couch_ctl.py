"""Stop and start a node from outside the test's process, as a service manager would.

    python tests/testbed/couch_ctl.py {start|stop} STATE.json

The state names the command, its environment, user and log; it is written by tests.testbed.couch.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.testbed.process import ServiceError, alive, as_user, listening, tail, wait_until


def read_pid(state: dict[str, Any]) -> int | None:
    """Return the process that serves the state's data directory now."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        pid = int(Path(state["pid_file"]).read_text())
        if alive(pid) and state["data_dir"] in Path(f"/proc/{pid}/cmdline").read_text(errors="replace"):
            return pid
    return None


def start(state: dict[str, Any]) -> None:
    """Start the node, which outlives us, and return when it answers."""
    if read_pid(state):
        return
    with Path(state["log"]).open("ab") as log:
        process = subprocess.Popen(
            state["argv"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=state["workdir"],
            env=state["environment"],
            start_new_session=True,
            **as_user(state["os_user"]),
        )
    Path(state["pid_file"]).write_text(str(process.pid))
    wait_until(lambda: process.poll() is not None or listening(state["port"]), what="the node to answer")
    if process.poll() is not None:
        msg = f"the node ended at once:\n{tail(Path(state['log']))}"
        raise ServiceError(msg)


def stop(state: dict[str, Any]) -> None:
    """End the node and return when it is gone."""
    pid = read_pid(state)
    if pid is not None:
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not alive(pid), what="the node to end")


def main(arguments: list[str]) -> int:
    """Do what was asked for; 0 when it is done."""
    verb, path = arguments
    state = json.loads(Path(path).read_text())
    try:
        {"start": start, "stop": stop}[verb](state)
    except ServiceError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
