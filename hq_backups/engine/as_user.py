"""A part of a run done as another user: a restore's conductor is root, its data work is the store's user's."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from hq_backups.engine.config import Job
from hq_backups.engine.errors import HQBackupsError, rebuild
from hq_backups.engine.events import Event, Events
from hq_backups.engine.process import Producer

ENTRY = Path(__file__).resolve().with_name("entry.py")


def run_as(job: Job, user: str, events: Events, fds: Sequence[int] = ()) -> None:
    """Run ``job`` in a child as ``user``, pass its events on; raises the error that ended it.

    ``fds`` are open in the child too, under their numbers.
    """
    failure: HQBackupsError | None = None
    ended = False
    with Producer([sys.executable, "-I", ENTRY], user=user, feed=True, fds=fds) as child:
        child.stdin.write(job.to_json().encode() + b"\n")
        try:
            for line in _lines(child):
                event = Event.from_json(line)
                if event.kind == "error":
                    data = event.data
                    failure = rebuild(str(data["code"]), str(data["message"]), str(data["hint"]))
                elif event.kind == "result":
                    ended = True
                elif event.kind == "warning":
                    events.warning(str(event.data["code"]), str(event.data["message"]))
                elif event.kind != "started":
                    events.emit(event.kind, **event.data)
        except HQBackupsError:
            # Its exit status says again what its error event said.
            if failure is None:
                raise
    if failure is not None:
        raise failure
    if not ended:
        raise HQBackupsError(f"the part of the run that user {user} does ended without a result")


def _lines(child: Producer) -> Iterator[str]:
    rest = b""
    while data := child.read(1 << 16):
        *whole, rest = (rest + data).split(b"\n")
        for line in whole:
            yield line.decode()
