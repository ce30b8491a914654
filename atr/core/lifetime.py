"""A stage lives no longer than the process it works for: `dvc`, or the first process of a distributed stage.

A killed process cannot tell those that it started: they would go on, beside the next run.
"""

import os
import signal
import threading
import time
from pathlib import Path

import psutil

FIRST_PROCESS = "ATR_FIRST_PROCESS"
"""Environment variable with the id of a stage's first process, for the ranks that it starts."""
POLL_SECONDS = 1.0
"""Seconds between two looks."""
GRACE_SECONDS = 10.0
"""Seconds to end in order; a collective operation that waits for a rank that is gone takes no signal."""


def end_with_parent() -> None:
    """End this process with SIGTERM, after GRACE by force, soon after the one it works for has ended.

    A rank works for the stage's first process, which started it; that one works for the dvc above it, if any.
    """
    first = int(os.environ.setdefault(FIRST_PROCESS, str(os.getpid())))
    is_first = first == os.getpid()
    followed = find_dvc() if is_first else _parent(first)
    if followed or not is_first:
        threading.Thread(target=_end_after, args=(followed,), daemon=True, name="lifetime").start()


def find_dvc() -> psutil.Process | None:
    """The dvc process that this one works for, if there is one."""
    return next(filter(_is_dvc, psutil.Process().parents()), None)


def _is_dvc(process: psutil.Process) -> bool:
    """Whether it is `dvc repro`, `dvc exp run` or a worker of the queue, as a script or by `python -m`."""
    try:
        command = process.cmdline()
    except psutil.Error:  # a process of another user, or one that has just ended
        return False
    is_dvc = any(Path(word).name == "dvc" for word in command[:3])
    return is_dvc and not {"repro", "exp", "experiments", "queue"}.isdisjoint(command)


def _parent(pid: int) -> psutil.Process | None:
    """The process of that id above this one; None if it has ended already."""
    return next((process for process in psutil.Process().parents() if process.pid == pid), None)


def _end_after(followed: psutil.Process | None) -> None:
    while followed and _runs(followed):
        time.sleep(POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(128 + signal.SIGTERM)


def _runs(process: psutil.Process) -> bool:
    """Whether it is not over; nobody may have asked for its exit code yet."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
