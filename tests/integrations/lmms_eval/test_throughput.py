"""benchmarks/throughput.py beside lmms-eval's own model class, run in its own environment."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
COMMAND = os.environ.get("ATR_LMMS_EVAL")


@pytest.mark.slow
@pytest.mark.skipif(
    COMMAND is None,
    reason="ATR_LMMS_EVAL is not set: the path of lmms-eval in an environment with atr[lmms-eval]",
)
def test_both_sides_give_the_same_answers():
    small = ["--per-image", "1", "3", "--questions", "3", "--rounds", "1", "--width", "64", "--layers", "2"]
    command = [Path(COMMAND).with_name("python"), "-m", "benchmarks.throughput", *small]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^ +(\d) per image: .*; (\d) of 3 answers equal$", done.stdout, flags=re.MULTILINE)
    assert rows == [("1", "3"), ("3", "3")] * 2, done.stdout
