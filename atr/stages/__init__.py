"""One module per DVC stage: the only place that knows the disk layout, the parameters and tracking."""

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
from atr.core.files import digest, folder_digest, sha256

ENCODER_FOLDER = Path("data/encoders")
BENCHMARK_FILES = Path("data/benchmarks")
"""One small file for each benchmark that is evaluated: it changes when the code of the benchmark does."""
MODELS = Path("data/models")
"""The presets of the encoder and of the model: they change when the chosen preset does."""
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
"""Beside the features of each split: two photographs and the principal components of their features."""
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
"""Training images that measure the mean and deviation of the features."""


def weights_of(reducer: str) -> Path:
    """Folder of the selector that a reducer needs; `experiments/pretrain/selector` if it needs none."""
    return DISTILLED if catalog.reducer_traits(reducer).weights == "distill" else SELECTOR


def depends_on(params: config.Params, *read: Path | str) -> dict[str, Any]:
    """Everything a stage's results depend on; it names unfinished work, so that stale work is never resumed.

    Parameters, the files and folders it reads, libraries, and our code: DVC reruns a stage for uncommitted
    changes too, and what the former code computed must not pass for the result of the new one.
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
    """Path, without suffix, of the answers of a stopped evaluation; they stay until another one ends.

    The name is a hash of everything an answer depends on: `known` of commits and of the machine, and
    `depends_on`.
    """
    manifests = [folder / "manifest.json" for folder in (EVALUATE_IMAGES, EVALUATE_FEATURES)]
    read = [file for file in (EVALUATE_IMAGES / "questions.jsonl", *manifests) if file.is_file()]
    if catalog.reducer_traits(reducer).weights:
        read.append(weights_of(reducer))
    return UNFINISHED / reducer / digest(**known, **depends_on(params, *read))


NO_BUDGET = "takes no budget"
"""Why a reducer is left out of what is measured at given budgets."""


class Terminated(BaseException):
    """SIGTERM reached the stage; passes through every `except Exception` on its way out."""


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise Terminated


def entry(
    stage: str,
    main: Callable[[Any], None],
    load_or_exit: Callable[[str], config.Params] = config.load_or_exit,
) -> None:
    """Run one stage as a process: validated parameters in, an exit code DVC can trust out.

    2 wrong parameters, 1 wrong input or a failed write, 130 Ctrl-C, 143 SIGTERM or the end of the dvc that
    started it. An unexpected exception keeps its traceback.
    """
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


def entry_of_reducer(stage: str, main: Callable[[config.Params, str], None]) -> None:
    """As `entry`, of a stage with a cell for each reducer: its name is the argument of the process."""
    parser = ArgumentParser(prog=f"atr.stages.{stage}")
    parser.add_argument("reducer", type=_known, help="a reducer of ours, or your own file without .py")
    reducer = parser.parse_args().reducer
    entry(stage, lambda params: main(params, reducer))


def _known(reducer: str) -> str:
    if catalog.reducer_file(reducer).is_file():
        return reducer
    allowed = f"{', '.join(catalog.reducers())}, or the path of your own file without .py"
    raise ArgumentTypeError(f"{reducer!r} is unknown, allowed: {allowed}")


def _leave(stage: str, stop: BaseException) -> Never:
    """Exit as the shell would name the signal; Lightning turns Ctrl-C into an exit code of 1."""
    if isinstance(stop, SystemExit) and not isinstance(stop.__context__, KeyboardInterrupt):
        raise stop
    name, code = ("terminated", 143) if isinstance(stop, Terminated) else ("interrupted", 130)
    print(f"atr {stage}: {name}, what was not finished is left out", file=sys.stderr)
    sys.exit(code)
