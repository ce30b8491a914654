"""What a stage's process does not pay for: imports that its work does not need, and garbage collection."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from atr import stages

ROOT = Path(__file__).parents[2]


def imported_by(*modules):
    """The libraries that a new process has imported, of those whose import takes seconds."""
    script = f"""
import sys, {", ".join(modules)}
print(*{{"torch", "transformers", "lightning", "mlflow", "pandas", "torchmetrics"}} & set(sys.modules))
"""
    done = subprocess.check_output([sys.executable, "-c", script], cwd=ROOT, text=True)
    return {*done.split()}


def test_a_reducer_that_needs_no_encoder_is_measured_with_torch_alone():
    measured = ("atr.features.signals", "atr.reduction.intrinsic", "atr.reduction.registry", "atr.datasets")
    assert imported_by("atr.stages.intrinsic", "atr.core.hardware", *measured) == {"torch"}


def test_the_stages_and_their_log_import_none_of_them():
    """So that a cell with nothing to do takes no more than a fraction of a second."""
    files = sorted((ROOT / "atr/stages").glob("[a-z]*.py"))
    names = [f"atr.stages.{file.stem}" for file in files]
    assert names and imported_by("atr.core.tracking", *names) == set()


@pytest.fixture
def collector(monkeypatch):
    """The functions that a stage registers for its end; the thresholds are restored."""
    registered, before = [], gc.get_threshold()
    monkeypatch.setattr("atexit.register", registered.append)
    monkeypatch.setattr(stages.lifetime, "end_with_parent", lambda: None)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    gc.set_threshold(700, 10, 10)
    yield registered
    gc.set_threshold(*before)


def test_a_stage_collects_garbage_rarely_and_none_at_its_end(collector):
    seen = []
    stages.entry("report", lambda params: seen.append(gc.get_threshold()), lambda stage: None)
    assert seen == [(100_000, 20, 20)] and collector == [gc.freeze]
