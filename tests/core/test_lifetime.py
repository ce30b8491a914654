"""Real processes: a stage ends when its parent is killed."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
ABOVE = """
import subprocess, sys, time
stage = subprocess.Popen([sys.executable, *sys.argv[2:]])
time.sleep(60)
"""
STAGE = """
import os, subprocess, sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from atr.core import lifetime
from atr.stages import entry
lifetime.POLL_SECONDS, lifetime.GRACE_SECONDS = 0.05, {grace}

def main(params):
    is_first = os.environ[lifetime.FIRST_PROCESS] == str(os.getpid())
    if is_first and {ranks}:
        subprocess.Popen([sys.executable, __file__])
    Path("first" if is_first else "later").write_text(str(os.getpid()))
    try:
        {does}
    finally:
        Path("ended").write_text("in order")

entry("report", main)
"""


@pytest.fixture
def start(tmp_path):
    """Starts a stage under a parent process of a given name; kills all of them at the end."""
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    started = []

    def start(name="dvc", command="repro", grace=60.0, ranks=0, does="time.sleep(60)"):
        (tmp_path / name).write_text(ABOVE)
        script = STAGE.format(root=str(ROOT), grace=grace, ranks=ranks, does=does)
        (tmp_path / "stage.py").write_text(script)
        environment = {key: value for key, value in os.environ.items() if key != "ATR_FIRST_PROCESS"}
        words = [sys.executable, name, command, "stage.py"]
        above = subprocess.Popen(words, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
        started.append(psutil.Process(above.pid))
        for rank in ("first", "later")[: 1 + ranks]:
            until(lambda rank=rank: (tmp_path / rank).exists() and (tmp_path / rank).read_text())
            started.append(psutil.Process(int((tmp_path / rank).read_text())))
        return started

    yield start
    for process in started:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def until(holds):
    for _ in range(600):
        if holds():
            return
        time.sleep(0.05)
    raise AssertionError("nothing happened within 30 seconds")


def is_over(process):
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_stage_ends_gracefully_when_dvc_is_killed(start, tmp_path):
    dvc, stage = start()
    dvc.kill()  # becomes a zombie, as nobody waits for it
    until(lambda: is_over(stage))
    assert (tmp_path / "ended").read_text() == "in order"


def test_a_stage_that_ignores_sigterm_is_killed(start, tmp_path):
    dvc, stage = start(grace=0.2, does="import signal; signal.signal(15, signal.SIG_IGN); time.sleep(60)")
    dvc.kill()
    until(lambda: is_over(stage))
    assert not (tmp_path / "ended").exists()


def test_a_stage_outlives_a_parent_other_than_dvc(start):
    shell, stage = start(name="other")
    shell.kill()
    time.sleep(1)  # twenty polls
    assert not is_over(stage)


@pytest.mark.parametrize("killed", [0, 1], ids=["dvc", "first rank"])
def test_the_ranks_of_a_stage_end_with_its_first_process(start, killed):
    processes = start(ranks=1)
    os.kill(processes[killed].pid, signal.SIGKILL)
    for process in processes[killed:]:
        until(lambda process=process: is_over(process))


def test_a_rank_without_first_process_ends_at_once(start, tmp_path):
    (tmp_path / "stage.py").write_text(STAGE.format(root=str(ROOT), grace=60, ranks=0, does="time.sleep(60)"))
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    gone = subprocess.Popen(["true"])
    gone.wait()
    environment = {**os.environ, "ATR_FIRST_PROCESS": str(gone.pid)}
    done = subprocess.run([sys.executable, "stage.py"], cwd=tmp_path, env=environment, timeout=30)
    assert done.returncode == 128 + signal.SIGTERM


LAUNCHED = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from atr.stages import entry

def main(params):
    from lightning.fabric import Fabric
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    if fabric.global_rank:
        Path("later").write_text(str(os.getpid()))
        time.sleep(600)
    while not Path("later").exists() or not Path("later").read_text():
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGKILL)

entry("report", main)
"""


@pytest.mark.slow
def test_a_rank_launched_by_lightning_ends_with_the_first(tmp_path):
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    (tmp_path / "stage.py").write_text(LAUNCHED.format(root=str(ROOT)))
    environment = {key: value for key, value in os.environ.items() if key != "ATR_FIRST_PROCESS"}
    with subprocess.Popen(
        [sys.executable, "stage.py"], cwd=tmp_path, env=environment, start_new_session=True
    ) as process:
        try:
            assert process.wait() == -signal.SIGKILL
            rank = psutil.Process(int((tmp_path / "later").read_text()))
            until(lambda: is_over(rank))
        except psutil.NoSuchProcess:  # has already ended
            pass
        finally:  # if it is still there, do not leave it behind
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
