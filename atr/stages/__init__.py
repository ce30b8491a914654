"""One module per DVC stage: the only place that knows the disk layout, the parameters and tracking."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Never

from atr import config
from atr.files import digest, sha256

ENCODERS = Path("data/encoders")
PRETRAIN_IMAGES = Path("data/prepared/pretrain")
EVALUATE_IMAGES = Path("data/prepared/evaluate")
PRETRAIN_FEATURES = Path("data/features/pretrain")
EVALUATE_FEATURES = Path("data/features/evaluate")
SPLITS = {
    "pretrain": (PRETRAIN_IMAGES, PRETRAIN_FEATURES),
    "evaluate": (EVALUATE_IMAGES, EVALUATE_FEATURES),
}
COMPONENTS = "components.png"
"""Beside the features of each split: what their encoder tells apart in two photographs."""
PRETRAIN = Path("experiments/pretrain")
SELECTOR = PRETRAIN / "selector"
DISTILL = Path("experiments/distill")
DISTILLED = DISTILL / "selector"
EVALUATE = Path("experiments/evaluate")
MEASURE = Path("experiments/measure")
COST = Path("experiments/cost")
ROBUSTNESS = Path("experiments/robustness")
REPORT = Path("experiments/report")


def weights_of(reducer: str) -> Path:
    """Folder of the selector that a reducer of this name is made of, if it is made of one."""
    return DISTILLED if reducer in config.DISTILLED else SELECTOR


def unfinished(params: config.Params, reducer: str, provenance: dict[str, Any]) -> Path:
    """Where the answers of a stopped evaluation lie, without suffix; gone as soon as there are results."""
    read = [EVALUATE_IMAGES / "questions.jsonl", EVALUATE_FEATURES / "manifest.json"]
    read += [*weights_of(reducer).glob("*"), Path(params.vlm.path, "model.safetensors")]
    hashes = [sha256(file) for file in read if file.is_file()]
    name = digest(params=params.raw(), provenance=provenance, read=hashes)
    return EVALUATE / reducer / "unfinished" / name


class Terminated(BaseException):
    """SIGTERM reached the stage; passes through every `except Exception` on its way out."""


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise Terminated


def entry(stage: str, main: Callable[[config.Params], None]) -> None:
    """Run one stage as a process: validated parameters in, an exit code DVC can trust out.

    2 wrong parameters, 1 wrong input or a failed write, 130 Ctrl-C, 143 SIGTERM. An unexpected exception
    keeps its traceback.
    """
    params = config.load_or_exit(stage)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        main(params)
    except (ValueError, OSError) as error:
        if os.environ.get("ATR_TRACEBACK"):
            raise
        sys.exit(f"atr {stage}: {' '.join(str(error).split())}")
    except (KeyboardInterrupt, Terminated, SystemExit) as stop:
        _leave(stage, stop)


def _leave(stage: str, stop: BaseException) -> Never:
    """Exit as the shell would name the signal; Lightning turns Ctrl-C into an exit code of 1."""
    if isinstance(stop, SystemExit) and not isinstance(stop.__context__, KeyboardInterrupt):
        raise stop
    name, code = ("terminated", 143) if isinstance(stop, Terminated) else ("interrupted", 130)
    print(f"atr {stage}: {name}, what was not finished is left out", file=sys.stderr)
    sys.exit(code)
