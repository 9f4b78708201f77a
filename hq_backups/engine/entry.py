"""Where a job becomes a run: called by the app in its own process, or as a script by the bridge.

As a script (``python -I <this file>``): the job is the first line of standard input, events are lines of
standard output. A later line ``{"cancel": true}`` cancels; the end of input without it means that the parent
is gone, and the run goes on to its end: a backup finishes, a restore finishes or rolls back.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any

if __name__ == "__main__":
    # -I leaves out the working directory and PYTHONPATH: the package is found from this file's own place.
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from hq_backups.engine import names
from hq_backups.engine.config import Config, Job, from_plain
from hq_backups.engine.errors import Cancelled, Exit, HQBackupsError, UsageError
from hq_backups.engine.events import Event, Events, Sink, utc_now
from hq_backups.engine.requests import (
    BackupRequest,
    CatalogRequest,
    CheckRequest,
    LoadRequest,
    PruneRequest,
    RestoreRequest,
    UndoRequest,
    UnpackRequest,
    UploadRequest,
    VerifyRequest,
)


def run_job(job: Job, sink: Sink) -> Exit:
    """Run a job; its last event is ``result``. Errors become events, never tracebacks; SIGINT passes through."""
    run = job.run or names.run_id(utc_now(), job.config.host, _store(job))
    events = Events(sink, run)
    began = time.monotonic()
    try:
        code = _dispatch(job, run, events)
    except HQBackupsError as error:
        code = events.error(error)
    except OSError as error:
        code = events.error(HQBackupsError(f"{error.strerror or error}: {error.filename or 'no file named'}"))
    except Exception as error:
        traceback.print_exc()
        why = f"{type(error).__name__}: {error}"
        code = events.error(HQBackupsError(why, hint="This is a fault of hq_backups: please report it."))
    except (KeyboardInterrupt, SystemExit):
        events.error(Cancelled(by="the operator"))
        code = Exit.ERROR
    seconds = round(time.monotonic() - began, 3)
    events.emit(
        "result", ok=code is Exit.OK, exit=int(code), verb=job.verb, store=_store(job), seconds=seconds
    )
    return code


def _store(job: Job) -> str:
    selection = job.request.get("selection") or {}
    return str(job.request.get("store") or selection.get("store") or "all")


def _dispatch(job: Job, run: str, events: Events) -> Exit:
    try:
        verb = _VERBS[job.verb]
    except KeyError:
        raise UsageError(f"the engine knows no verb {job.verb}") from None
    events.emit("started", verb=job.verb, store=_store(job), env=job.config.env, host=job.config.host)
    return verb(job.config, job.request, run, events)


# Imported when asked for: listing must not wait for what only a restore needs.


def _backup(config: Config, request: Any, run: str, events: Events) -> Exit:
    from hq_backups.engine.backup import back_up

    return back_up(config, from_plain(BackupRequest, request), run, events)


def _catalog(config: Config, request: Any, run: str, events: Events) -> Exit:
    from hq_backups.engine.catalog import entries
    from hq_backups.engine.stores import open_store

    wanted = from_plain(CatalogRequest, request)
    for name in wanted.stores or config.stores:
        for entry in entries(open_store(config, name), wanted, events):
            events.emit("entry", **entry.to_plain())
    return Exit.OK


def _restore(config: Config, request: Any, run: str, events: Events) -> Exit:
    from hq_backups.engine.restore import restore

    return restore(config, from_plain(RestoreRequest, request), run, events)


def _unpack(config: Config, request: Any, run: str, events: Events) -> Exit:
    from hq_backups.engine.unpack import unpack

    return unpack(config, from_plain(UnpackRequest, request), events)


def _load(config: Config, request: Any, run: str, events: Events) -> Exit:
    from hq_backups.engine.unpack import load

    return load(config, from_plain(LoadRequest, request), events)


def _undo(config: Config, request: Any, run: str, events: Events) -> Exit:
    from hq_backups.engine.restore import undo

    return undo(config, from_plain(UndoRequest, request), run, events)


def _verify(config: Config, request: Any, run: str, events: Events) -> Exit:
    from hq_backups.engine.verify import verify

    return verify(config, from_plain(VerifyRequest, request), run, events)


def _prune(config: Config, request: Any, run: str, events: Events) -> Exit:
    from hq_backups.engine.prune import prune_verb

    return prune_verb(config, from_plain(PruneRequest, request), run, events)


def _upload(config: Config, request: Any, run: str, events: Events) -> Exit:
    from hq_backups.engine.upload import upload

    return upload(config, from_plain(UploadRequest, request), run, events)


def _check(config: Config, request: Any, run: str, events: Events) -> Exit:
    from hq_backups.engine.check import check

    return check(config, from_plain(CheckRequest, request), run, events)


_VERBS: dict[str, Callable[[Config, Any, str, Events], Exit]] = {
    "backup": _backup,
    "catalog": _catalog,
    "restore": _restore,
    "unpack": _unpack,
    "load": _load,
    "undo": _undo,
    "verify": _verify,
    "prune": _prune,
    "upload": _upload,
    "check": _check,
}


def main() -> int:
    """Run the job on standard input."""
    sys.dont_write_bytecode = True
    signal.signal(signal.SIGTERM, _cancelled)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        job = Job.from_json(sys.stdin.readline())
    except HQBackupsError as error:
        events = Events(_write)
        code = events.error(error)
        events.emit("result", ok=False, exit=int(code), store=None, seconds=0.0)
        return int(code)
    watch = threading.Thread(target=_watch_input, args=(job.verb,), name="hqb-cancel", daemon=True)
    watch.start()
    return int(run_job(job, _write))


def _cancelled(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _watch_input(verb: str) -> None:
    for line in sys.stdin:
        if '"cancel"' in line:
            os.kill(os.getpid(), signal.SIGTERM)
    if verb == "unpack":
        # Its conductor is gone: what it makes nobody will use.
        os._exit(int(Exit.ERROR))


_output = threading.Lock()


def _write(event: Event) -> None:
    """Write one line; a reader that is gone does not stop the run."""
    with _output, contextlib.suppress(BrokenPipeError):
        os.write(1, event.to_json().encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main())
