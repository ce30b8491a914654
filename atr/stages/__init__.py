"""One module per DVC stage; only this package knows the disk layout, the parameters and tracking."""

import atexit
import gc
import os
import signal
import sys
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, Never

from atr import config
from atr.core import catalog, lifetime
from atr.core.files import digest, folder_digest, sha256, write_json

ENCODER_FOLDER = Path("data/encoders")
BENCHMARK_FILES = Path("data/benchmarks")
"""One small file per evaluated benchmark; it changes when the benchmark's code does."""
MODELS = Path("data/models")
"""The chosen presets of the encoder and of the vision-language model, as JSON."""
PRETRAIN_IMAGES = Path("data/prepared/pretrain")
EVALUATE_IMAGES = Path("data/prepared/evaluate")
PRETRAIN_FEATURES = Path("data/features/pretrain")
EVALUATE_FEATURES = Path("data/features/evaluate")
SPLITS = {
    "pretrain": (PRETRAIN_IMAGES, PRETRAIN_FEATURES),
    "evaluate": (EVALUATE_IMAGES, EVALUATE_FEATURES),
}
STORE = PRETRAIN_FEATURES / "manifest.json"
COMPONENTS = "components.png"
"""Picture beside the features of each split: two photographs, and a PCA of their features."""
PRETRAIN = Path("experiments/pretrain")
SELECTOR = PRETRAIN / "selector"
AUTOENCODER = PRETRAIN / "autoencoder"
DISTILL = Path("experiments/distill")
DISTILLED = DISTILL / "selector"
RECONSTRUCTOR = Path("experiments/reconstructor")
RANDOM_MASKS = RECONSTRUCTOR / "weights" / "random_masks"
"""The autoencoder whose reconstructor was trained on random masks."""
EVALUATE = Path("experiments/evaluate")
UNFINISHED = Path("experiments/unfinished")
"""Outside all outputs, because DVC removes those before it runs a stage."""
INTRINSIC = Path("experiments/intrinsic")
LATENCY = Path("experiments/latency")
PREFILL = LATENCY / "prefill"
ROBUSTNESS = Path("experiments/robustness")
REPORT = Path("experiments/report")

STATISTICS = 1024
"""Number of training images from which the features' mean and standard deviation are estimated."""


def weights_of(reducer: str) -> Path:
    """Folder of the selector that a reducer needs; `experiments/pretrain/selector` if it needs none."""
    return DISTILLED if catalog.reducer_traits(reducer).weights == "distill" else SELECTOR


def depends_on(params: config.Params, *read: Path | str) -> dict[str, Any]:
    """Everything a stage's results depend on; it names unfinished work, so that stale work is never resumed.

    These are its parameters, the files and folders that it `read`s, library versions and the package's code:
    DVC reruns a stage for uncommitted changes too, and results of older code must not pass for new ones.
    """
    return {
        "params": params.raw(),
        "read": {
            str(path): sha256(path) if path.is_file() else folder_digest(path) for path in map(Path, read)
        },
        "versions": [version(library) for library in ("torch", "transformers", "lightning")],
        "code": folder_digest(catalog.PACKAGE, "*.py"),
    }


def unfinished(params: config.Params, reducer: str, **known: Any) -> Path:
    """Path, without suffix, of the answers of an interrupted evaluation; kept until another one ends.

    Its name is a hash of everything an answer depends on: `known` (commits, hardware, the reducer's file) and
    `depends_on`.
    """
    manifests = [folder / "manifest.json" for folder in (EVALUATE_IMAGES, EVALUATE_FEATURES)]
    read = [file for file in (EVALUATE_IMAGES / "questions.jsonl", *manifests) if file.is_file()]
    if catalog.reducer_traits(reducer).weights:
        read.append(weights_of(reducer))
    return UNFINISHED / reducer / digest(**known, **depends_on(params, *read))


NO_BUDGET = "takes no budget"
"""Recorded reason for leaving a reducer out of measurements at given budgets."""


def write_results(
    folder: Path, params: config.Params, provenance: dict[str, Any], reducer: str, **measured: Any
) -> dict[str, Any]:
    """Write the metrics.json of a reducer, with the parameters and the provenance; returns its content."""
    results = {"reducer": reducer, **measured, "parameters": params.raw(), "provenance": provenance}
    write_json(folder / reducer / "metrics.json", results)
    return results


class Terminated(BaseException):
    """The stage received SIGTERM; a BaseException, so that no `except Exception` catches it."""


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise Terminated


def entry(
    stage: str,
    main: Callable[[Any], None],
    load_or_exit: Callable[[str], config.Params] = config.load_or_exit,
) -> None:
    """Run one stage as a process on validated parameters, and exit with a code that DVC can rely on.

    Exit codes: 2 for invalid parameters, 1 for invalid input or a failed write, 130 for Ctrl-C, 143 for
    SIGTERM or the end of the dvc process that started the stage. An unexpected exception keeps its traceback.
    """
    _collect_rarely()
    params = load_or_exit(stage)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        lifetime.end_with_parent()
        main(params)
    except (ValueError, OSError) as error:
        if os.environ.get("ATR_TRACEBACK"):
            raise
        sys.exit(f"atr {stage}: {' '.join(str(error).split())}")
    except (KeyboardInterrupt, Terminated, SystemExit) as stop:
        _leave(stage, stop)


def _collect_rarely() -> None:
    """Collect cyclic garbage a hundred times less often, and not at the end of the process.

    Importing torch and transformers creates a million objects that stay: with Python's defaults, walking over
    them again and again takes a quarter of a short stage's time.
    """
    gc.set_threshold(100_000, 20, 20)
    atexit.register(gc.freeze)


def entry_of_reducer(stage: str, main: Callable[[config.Params, str], None]) -> None:
    """Like `entry`, for a stage with one cell per reducer; the reducer is the command-line argument."""
    parser = ArgumentParser(prog=f"atr.stages.{stage}")
    parser.add_argument(
        "reducer", type=_known, help="a built-in reducer, or your own file's path without .py"
    )
    reducer = parser.parse_args().reducer
    entry(stage, lambda params: main(params, reducer))


def _known(reducer: str) -> str:
    if catalog.reducer_file(reducer).is_file():
        return reducer
    allowed = f"{', '.join(catalog.reducers())}, or the path of your own file without .py"
    raise ArgumentTypeError(f"{reducer!r} is unknown, allowed: {allowed}")


def _leave(stage: str, stop: BaseException) -> Never:
    """Exit with the shell's code for the signal; Lightning would turn Ctrl-C into 1."""
    if isinstance(stop, SystemExit) and not isinstance(stop.__context__, KeyboardInterrupt):
        raise stop
    name, code = ("terminated", 143) if isinstance(stop, Terminated) else ("interrupted", 130)
    print(f"atr {stage}: {name}; unfinished outputs were not written", file=sys.stderr)
    sys.exit(code)
