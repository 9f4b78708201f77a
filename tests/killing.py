"""Kill a piece of work with -9 at its n-th system call that matters, in a child of its own."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

CALLS = ("open", "rename", "replace", "unlink", "fsync", "write", "mkdir", "chmod", "chown", "rmdir")


def killed_at(work: Callable[[], Any], step: int) -> bool:
    """Run ``work`` in a forked child that is killed right before its ``step``-th call; tell whether it was."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            _arm(step)
            work()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, "the work itself failed"
    return False


def every_step(work: Callable[[], Any], prepare: Callable[[], None]) -> Iterator[int]:
    """Prepare and kill at step 1, 2, 3 … until the work ends before it is killed; yields after each kill."""
    step = 0
    while True:
        step += 1
        prepare()
        killed = killed_at(work, step)
        yield step
        if not killed:
            assert step > 1, "nothing was ever killed"
            return


def _arm(step: int) -> None:
    count = 0

    def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return counted

    for name in CALLS:
        setattr(os, name, wrap(getattr(os, name)))
