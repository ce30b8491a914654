"""One module per DVC stage: the only place that knows the disk layout, the parameters and tracking."""

import os
import signal
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, Never

from atr import config
from atr.core import catalog, lifetime
from atr.core.files import digest, folder_digest, sha256

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
UNFINISHED = Path("experiments/unfinished")
"""Outside of all outputs, which DVC removes before it runs a stage, and of what other stages depend on."""
INTRINSIC = Path("experiments/intrinsic")
LATENCY = Path("experiments/latency")
ROBUSTNESS = Path("experiments/robustness")
REPORT = Path("experiments/report")


def weights_of(reducer: str) -> Path:
    """Folder of the selector that a reducer of this name is made of, if it is made of one."""
    return DISTILLED if reducer in catalog.trained("distill") else SELECTOR


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
    if reducer in catalog.trained():
        read.append(weights_of(reducer))
    return UNFINISHED / reducer / digest(**known, **depends_on(params, *read))


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


def _leave(stage: str, stop: BaseException) -> Never:
    """Exit as the shell would name the signal; Lightning turns Ctrl-C into an exit code of 1."""
    if isinstance(stop, SystemExit) and not isinstance(stop.__context__, KeyboardInterrupt):
        raise stop
    name, code = ("terminated", 143) if isinstance(stop, Terminated) else ("interrupted", 130)
    print(f"atr {stage}: {name}, what was not finished is left out", file=sys.stderr)
    sys.exit(code)
