"""The engine's entry, with a fault armed in it: ``python -I engine_driver.py PLAN`` and the job on standard input.

The plan is JSON: ``kill`` (die by -9 right before the n-th call that changes something), ``log`` (write the
calls down instead), ``s3`` (an operation, and die ``before`` or ``after`` it), ``patience`` (seconds that S3 is
tried for), ``clock`` (seconds to add to the clock), ``reader`` (the program that reads blobs), ``hold`` (plain bytes
of a backup after which it stands still, the file that it makes then, and the one that lets it go on).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

CALLS = (
    "open",
    "rename",
    "replace",
    "unlink",
    "fsync",
    "write",
    "writev",
    "mkdir",
    "chmod",
    "chown",
    "rmdir",
    "sync",
)


class Steps:
    """Counts the calls that change something; events and plain reads are passed over."""

    def __init__(self, kill: int | None, log: str | None) -> None:
        self.count = 0
        self.kill = kill
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666) if log else None
        self.lock = threading.Lock()
        self.write = os.write

    def arm(self) -> None:
        for name in CALLS:
            setattr(os, name, self._counted(name, getattr(os, name)))

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if self._matters(name, args):
                with self.lock:
                    self.count += 1
                    if self.count == self.kill:
                        os.kill(os.getpid(), signal.SIGKILL)
                    if self.log is not None:
                        self.write(self.log, f"{name} {args[0] if args else ''}\n".encode())
            return call(*args, **kwargs)

        return counted

    @staticmethod
    def _matters(name: str, args: tuple[Any, ...]) -> bool:
        if name in ("write", "writev"):
            return bool(args[0] > 2)
        return name != "open" or bool(len(args) > 1 and args[1] & (os.O_WRONLY | os.O_RDWR))


def kill_at_request(operation: str, moment: str) -> None:
    """Die right before or after one request to S3."""
    from botocore.client import BaseClient

    real: Any = BaseClient._make_api_call  # type: ignore[attr-defined]

    def call(self: Any, name: str, arguments: Any) -> Any:
        if name == operation and arguments.get("Key", "").startswith(".hq_backups-probe"):
            return real(self, name, arguments)
        if name == operation and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        answer = real(self, name, arguments)
        if name == operation and moment == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return answer

    BaseClient._make_api_call = call  # type: ignore[attr-defined]


def hold_after(size: int, reached: str, go: str) -> None:
    """Stand still before the bytes that make it so many are written into an artifact; its upload goes on."""
    from hq_backups.engine.streams import ArtifactWriter

    real, passed = ArtifactWriter.put, 0

    def put(self: ArtifactWriter, buffer: bytearray, length: int) -> None:
        nonlocal passed
        if passed < size <= passed + length:
            Path(reached).touch()
            while not Path(go).exists():
                time.sleep(0.02)
        real(self, buffer, length)
        passed += length

    ArtifactWriter.put = put  # type: ignore[method-assign]


def hand_on(plan: dict[str, Any]) -> None:
    """Let the child that does a restore's data work be as impatient as we are."""
    from hq_backups.engine import as_user

    script = Path(tempfile.gettempdir(), f"child-{os.getpid()}.py")
    arguments = [__file__, json.dumps(plan)]
    script.write_text(
        f"import runpy, sys\nsys.argv = {arguments!r}\nrunpy.run_path({__file__!r}, run_name='__main__')\n"
    )
    script.chmod(0o644)
    as_user.ENTRY = script


def arm(plan: dict[str, Any]) -> None:
    """Put the plan's faults in place."""
    if "s3" in plan:
        kill_at_request(*plan["s3"])
    if "hold" in plan:
        hold_after(*plan["hold"])
    if "reader" in plan:
        from hq_backups.engine.blobs import stream

        stream.PROGRAM = (plan["reader"],)
    if "patience" in plan:
        from hq_backups.engine.repository import s3_client

        seconds = float(plan["patience"])
        quick = s3_client.Network(connect=seconds, read=seconds, attempts=1, patience=seconds, commit=seconds)
        s3_client.Network.__init__.__defaults__ = (  # type: ignore[misc]
            quick.connect, quick.read, quick.attempts, quick.patience, quick.commit,
        )  # fmt: skip
        if "child" in plan:
            hand_on({"patience": seconds})
    if "clock" in plan:
        from hq_backups.engine import backup, entry, events, prune

        def moved() -> Any:
            return real() + timedelta(seconds=plan["clock"])

        real = events.utc_now
        for module in (events, entry, backup, prune):
            module.utc_now = moved  # type: ignore[attr-defined]
    if "kill" in plan or "log" in plan:
        Steps(plan.get("kill"), plan.get("log")).arm()


if __name__ == "__main__":
    arm(json.loads(sys.argv[1]))
    from hq_backups.engine.entry import main

    sys.exit(main())
