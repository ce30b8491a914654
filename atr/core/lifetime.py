"""A stage ends with the process that started it: `dvc`, or the first process of a distributed stage.

Without this, the children of a killed process would run on beside the next run.
"""

import os
import signal
import threading
import time
from pathlib import Path

import psutil

FIRST_PROCESS = "ATR_FIRST_PROCESS"
"""Environment variable with the process id of a stage's first process, inherited by the ranks it starts."""
POLL_SECONDS = 1.0
GRACE_SECONDS = 10.0
"""Seconds from SIGTERM to a forced exit: a collective operation waiting for a dead rank handles no signal."""


def end_with_parent() -> None:
    """End this process soon after its parent ends: by SIGTERM, and by force after GRACE_SECONDS.

    The parent of a rank is the stage's first process; the parent of the first process is dvc, if it runs
    under dvc.
    """
    first = int(os.environ.setdefault(FIRST_PROCESS, str(os.getpid())))
    is_first = first == os.getpid()
    parent = find_dvc() if is_first else _find_ancestor(first)
    if parent or not is_first:
        threading.Thread(target=_end_after, args=(parent,), daemon=True, name="lifetime").start()


def find_dvc() -> psutil.Process | None:
    """The dvc process that this process runs under; None if there is none."""
    return next(filter(_is_dvc, psutil.Process().parents()), None)


def _is_dvc(process: psutil.Process) -> bool:
    """Whether a process is `dvc repro`, `dvc exp run` or a queue worker, as a script or by `python -m`."""
    try:
        command = process.cmdline()
    except psutil.Error:  # another user's process, or one that has just ended
        return False
    is_dvc = any(Path(word).name == "dvc" for word in command[:3])
    return is_dvc and not {"repro", "exp", "experiments", "queue"}.isdisjoint(command)


def _find_ancestor(pid: int) -> psutil.Process | None:
    """The ancestor of this process with that id; None if it has ended."""
    return next((process for process in psutil.Process().parents() if process.pid == pid), None)


def _end_after(parent: psutil.Process | None) -> None:
    while parent and _is_running(parent):
        time.sleep(POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(128 + signal.SIGTERM)


def _is_running(process: psutil.Process) -> bool:
    """Whether a process still runs; a zombie does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
