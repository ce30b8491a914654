"""A stage lives no longer than the process it works for: `dvc`, or the first process of a distributed stage.

Killed, these can tell nobody: what they started would go on, beside what is started next.
"""

import os
import signal
import threading
import time
from collections.abc import Callable

import psutil

FIRST = "ATR_FIRST_PROCESS"
"""Variable that a stage's first process leaves its id in, for the ranks that it starts."""
POLL = 1.0
"""Seconds between two looks."""
GRACE = 10.0
"""Seconds to end in order; a collective operation that waits for a rank that is gone takes no signal."""


def follow(above: Callable[[], psutil.Process | None]) -> None:
    """End this process with SIGTERM, after GRACE by force, soon after the one it works for has ended.

    That is the stage's first process for the ranks it starts, and for itself what `above` finds, if anything.
    """
    first = int(os.environ.setdefault(FIRST, str(os.getpid())))
    followed = above() if first == os.getpid() else _parent(first)
    if followed:
        threading.Thread(target=_end_after, args=(followed,), daemon=True, name="lifetime").start()


def _parent(number: int) -> psutil.Process:
    """The process of that number above this one, or one that has ended, where it is above no more."""
    return next((process for process in psutil.Process().parents() if process.pid == number), None)


def _end_after(followed: psutil.Process) -> None:
    while _runs(followed):
        time.sleep(POLL)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(128 + signal.SIGTERM)


def _runs(process: psutil.Process) -> bool:
    """Whether it is not over; nobody may have asked for its exit code yet."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
