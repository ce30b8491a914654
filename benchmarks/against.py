"""Times the stages of this checkout and of another one, in turns, by their command lines alone.

Every stage is a process with PYTHONPATH at its checkout, in a folder with parameters and data of its own. A
stage's start-up takes seconds, so that rows which time one step or one image are differences of two
runs of different size. CPU time counts all threads of a stage, and its processes that have ended.
"""

import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Self

from omegaconf import OmegaConf

from benchmarks.timing import Seconds, alternate, ratio_text

ROOT = Path(__file__).parents[1]
IMAGES, QUESTIONS = 1280, 50
"""Pretraining images, and questions of each of the six benchmarks, in a prepared folder."""
STEP = 16
"""Images of a training step."""
TRAINING_IMAGES = round(0.95 * IMAGES)


@dataclass(frozen=True)
class Prepared:
    """A folder in which the stages of a checkout run; the shipped selector stands in for a pretrained one."""

    checkout: Path
    folder: Path

    @classmethod
    def make(cls, checkout: Path, folder: Path) -> Self:
        """Draw images and questions, and extract their features; raises ValueError as `run` does."""
        prepared = cls(checkout, folder)
        (folder / "data").mkdir(parents=True)
        (folder / "data/micro").symlink_to(checkout / "data/micro")
        prepared.run("prepare")
        for split in ("pretrain", "evaluate"):
            prepared.run("extract", split)
        return prepared

    def run(self, stage: str, *arguments: str, **settings: object) -> Seconds:
        """Run a stage with these settings of its section; raises ValueError with its error's last line."""
        self._write_params({stage: settings, "prepare": {"images": IMAGES, "questions": QUESTIONS}})
        self._forget_results()
        return run_timed(
            [sys.executable, "-m", f"atr.stages.{stage}", *arguments], self.folder, self.checkout
        )

    def _write_params(self, sections: Mapping[str, Mapping[str, object]]) -> None:
        params = OmegaConf.load(self.checkout / "params.yaml")
        for section, values in sections.items():
            for key, value in values.items():
                OmegaConf.update(params, f"{section}.{key}", value)
        OmegaConf.save(params, self.folder / "params.yaml")

    def _forget_results(self) -> None:
        """Remove checkpoints and unfinished answers, which a stage would resume; the log stays."""
        experiments = self.folder / "experiments"
        for path in experiments.glob("*/"):
            shutil.rmtree(path)
        shutil.copytree(ROOT / "data/micro/selectors/selector", experiments / "pretrain/selector")


def run_timed(command: Sequence[str], folder: Path, checkout: Path) -> Seconds:
    """Run a command that imports atr from a checkout; raises ValueError with the last line of its stderr."""
    before, start = _cpu_of_children(), time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment(checkout), capture_output=True, text=True)
    seconds = Seconds(time.perf_counter() - start, _cpu_of_children() - before)
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise ValueError(f"{checkout}: {' '.join(command[1:])}: exit code {done.returncode}: {last}")
    return seconds


def _cpu_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def environment(checkout: Path) -> dict[str, str]:
    """The variables of a process that runs a checkout's code under this interpreter."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {
        "PYTHONPATH": str(checkout), "PATH": path, "MLFLOW_DISABLE_TELEMETRY": "true", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip


def extract_image(prepared: Prepared) -> Seconds:
    """Seconds to encode and store one image."""
    larger, smaller = prepared.run("extract", "pretrain"), prepared.run("extract", "evaluate")
    return larger.per_unit(smaller, IMAGES - 6 * QUESTIONS)


def pretrain_step(prepared: Prepared) -> Seconds:
    """Seconds of one training step of the autoencoder, with its share of validation."""
    # So few steps do not teach it to drop, which would end the stage.
    larger, smaller = (prepared.run("pretrain", epochs=epochs, collapse_after=1.0) for epochs in (3, 1))
    return larger.per_unit(smaller, 2 * (TRAINING_IMAGES // STEP))


def distill_step(prepared: Prepared) -> Seconds:
    """Seconds of one step of distillation, with its share of the teacher's answers and of validation."""
    larger, smaller = prepared.run("distill", images=IMAGES), prepared.run("distill", images=IMAGES // 4)
    return larger.per_unit(smaller, 2 * 0.95 * (IMAGES - IMAGES // 4) / STEP)


def evaluate_answer(prepared: Prepared) -> Seconds:
    """Seconds of one answer at a further kept fraction, of questions about an image each."""
    keep = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    larger = prepared.run("evaluate", "selector", keep=keep)
    smaller = prepared.run("evaluate", "selector", keep=[0.5])
    return larger.per_unit(smaller, (len(keep) - 1) * 6 * QUESTIONS)


def import_library(checkout: Path) -> Seconds:
    """Seconds of `from atr import reduce` once all that it imports of torch and transformers is imported."""
    command = [sys.executable, "-c", _IMPORT]
    # The working directory comes before PYTHONPATH.
    options = {"cwd": checkout, "env": environment(checkout)}
    done = subprocess.run(command, **options, capture_output=True, text=True, check=True)
    return Seconds(*map(float, done.stdout.split()))


_IMPORT = """
import importlib, subprocess, sys, time
from contextlib import suppress

command = [sys.executable, "-c", "import sys; from atr import reduce; print(*sys.modules)"]
for name in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split():
    if name.split(".")[0] in ("torch", "transformers"):
        with suppress(ImportError):  # made by an import of another module
            importlib.import_module(name)
wall, cpu = time.perf_counter(), time.process_time()
from atr import reduce
print(time.perf_counter() - wall, time.process_time() - cpu)
"""


def reproduce(checkout: Path) -> Seconds:
    """Seconds of `make reproduce`, without its environment, in a new clone of the checkout's last commit."""
    with tempfile.TemporaryDirectory() as home:
        clone = Path(home) / "clone"
        subprocess.run(["git", "clone", "--quiet", str(checkout), str(clone)], check=True)
        # The stamp of an environment of its own is the only prerequisite.
        return run_timed(["make", "reproduce", "STAMP="], clone, clone)


PER_STAGE: dict[str, Callable[[Prepared], Seconds]] = {
    "extract": extract_image,
    "pretrain": pretrain_step,
    "distill": distill_step,
    "evaluate": evaluate_answer,
}
WHOLE: dict[str, Callable[[Path], Seconds]] = {"import": import_library, "reproduce": reproduce}
UNITS = {"extract": "image", "pretrain": "step", "distill": "step", "evaluate": "answer"}


def compare(rows: Sequence[str], other: Path, rounds: int) -> Iterator[str]:
    """A printed row for each of `rows`, this checkout relative to another one."""
    with prepared_folders(rows, (ROOT, other.resolve())) as sides:
        for name in rows:
            this, other_side = alternate([partial(measure, name, side) for side in sides], rounds)
            yield row(name, this, other_side)


@contextmanager
def prepared_folders(rows: Sequence[str], checkouts: Sequence[Path]) -> Iterator[list[Prepared]]:
    """Both checkouts with a folder each, prepared if one of the rows runs stages."""
    with tempfile.TemporaryDirectory() as home:
        make = Prepared.make if set(rows) & set(PER_STAGE) else Prepared
        yield [make(checkout, Path(home) / str(number)) for number, checkout in enumerate(checkouts)]


def measure(name: str, side: Prepared) -> Seconds:
    """One measurement of a row on one side."""
    return PER_STAGE[name](side) if name in PER_STAGE else WHOLE[name](side.checkout)


def row(name: str, this: Sequence[Seconds], other: Sequence[Seconds]) -> str:
    """Median wall times of this checkout and of the other, and the ratios."""
    times = " / ".join(f"{1000 * median(seconds.wall for seconds in side):.2f} ms" for side in (this, other))
    label = f"{name}, one {UNITS[name]}" if name in UNITS else name
    return f"{label:<22}{times} = {ratio_text(this, other)}"
