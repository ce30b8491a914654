"""What a run could not log: kept in the project, and sent later.

`experiments/unlogged/<id of the run>` holds `calls.jsonl`, one call a line, and numbered folders with copies
of the artifacts: by the time they are sent, the files themselves may be others, or gone.
"""

import json
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from atr.core.tracking import store

if TYPE_CHECKING:
    from mlflow import MlflowClient

UNLOGGED_FOLDER = Path("experiments/unlogged")
_CALLS = "calls.jsonl"
_BATCH = 1000
"""Metrics that MLflow takes at a time."""

LogCall = dict[str, Any]
"""`run` and one of: `metrics`, a list of (key, value, milliseconds, step); `status`, and when it `ended`, in
milliseconds; `artifact`, the path of a file or folder, and the `folder` of the run that it goes to."""


def log_call(client: "MlflowClient", call: LogCall) -> None:
    """Log it; raises whatever MLflow and the libraries of its stores raise."""
    from mlflow.entities import Metric

    if "metrics" in call:
        client.log_batch(call["run"], [Metric(*point) for point in call["metrics"]])
    elif "status" in call:
        client.set_terminated(call["run"], call["status"], call["ended"])
    else:
        log = client.log_artifacts if Path(call["artifact"]).is_dir() else client.log_artifact
        log(call["run"], call["artifact"], call["folder"])


def run_folder(run_id: str) -> Path:
    """Where the calls of a stage's run are kept."""
    return store.project_folder() / UNLOGGED_FOLDER / run_id


def pending_folders() -> list[Path]:
    """Those of all runs of the project that lack something."""
    return sorted(path.parent for path in (store.project_folder() / UNLOGGED_FOLDER).glob(f"*/{_CALLS}"))


def save_call(home: Path, call: LogCall) -> None:
    """Write a call down in the folder `home`, and copy what it would have logged; raises OSError."""
    home.mkdir(parents=True, exist_ok=True)
    with _lock(home):
        home.mkdir(exist_ok=True)  # again: what was there may have been sent meanwhile
        if "artifact" in call:
            call = call | {"artifact": _copy(Path(call["artifact"]), home)}
        with open(home / _CALLS, "a") as calls:
            # The line's end comes first: half a line, on a disk that was full, spoils no other.
            calls.write(f"\n{json.dumps(call)}")


def send_calls(client: "MlflowClient", home: Path) -> None:
    """Log all that is kept in the folder `home`, which is gone then.

    Raises what MLflow raises, and keeps all of it: MLflow takes what has arrived before as the same.
    """
    with _lock(home):
        for call in _in_order(_read(home)):
            artifact = {"artifact": str(home / call["artifact"])} if "artifact" in call else {}
            log_call(client, call | artifact)
        shutil.rmtree(home)


def _lock(home: Path) -> FileLock:
    """Nothing is kept while it is sent: it would be thrown away with the rest."""
    return FileLock(home.parent / ".lock")


def _copy(path: Path, home: Path) -> str:
    number = str(sum(entry.is_dir() for entry in home.iterdir()))
    if path.is_dir():
        shutil.copytree(path, home / number)
    else:
        (home / number).mkdir()
        shutil.copy(path, home / number)
    return number


def _read(home: Path) -> Iterator[LogCall]:
    for line in (home / _CALLS).read_text().splitlines():
        try:
            yield json.loads(line or "{}")
        except json.JSONDecodeError:
            print(f"atr: {home / _CALLS}: half a line is left out, the disk was full", file=sys.stderr)


def _in_order(calls: Iterator[LogCall]) -> Iterator[LogCall]:
    """First numbers, as many at a time as go, then how the runs ended, then files: their store is another."""
    points: dict[str, list[list[Any]]] = defaultdict(list)
    others = []
    for call in calls:
        if "metrics" in call:
            points[call["run"]] += call["metrics"]
        elif call:
            others.append(call)
    for run, values in points.items():
        for start in range(0, len(values), _BATCH):
            yield {"run": run, "metrics": values[start : start + _BATCH]}
    yield from sorted(others, key=lambda call: "artifact" in call)
