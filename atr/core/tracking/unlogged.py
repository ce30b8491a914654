"""Saves log calls in the project, to be sent later: those that failed, and those of short cells.

`experiments/unlogged/<run id>` holds `calls.jsonl`, one call per line, and numbered folders with copies of
the artifacts, as the originals may be changed or gone when they are sent.
"""

import json
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from atr.core.files import whole_folder
from atr.core.tracking import store

if TYPE_CHECKING:
    from mlflow import MlflowClient

UNLOGGED_FOLDER = Path("experiments/unlogged")
_CALLS = "calls.jsonl"
_BATCH = 1000
"""Maximum number of metrics that MLflow accepts in one call."""

LogCall = dict[str, Any]
"""The id `run`, with one of: `metrics`, a list of (key, value, milliseconds, step); `status` with the time
`ended` in milliseconds; `artifact`, the path of a file or folder, with its `folder` among the run's
artifacts; or `begin`, which creates a run that MLflow does not know yet, as `store.begin_run` takes it."""


def log_call(client: "MlflowClient", call: LogCall) -> None:
    """Send one call to MLflow; raises any error of MLflow and its stores' libraries."""
    from mlflow.entities import Metric

    if "metrics" in call:
        client.log_batch(call["run"], [Metric(*point) for point in call["metrics"]])
    elif "status" in call:
        client.set_terminated(call["run"], call["status"], call["ended"])
    else:
        log = client.log_artifacts if Path(call["artifact"]).is_dir() else client.log_artifact
        log(call["run"], call["artifact"], call["folder"])


def run_folder(run_id: str) -> Path:
    """Folder for the unlogged calls of a run."""
    return store.project_folder() / UNLOGGED_FOLDER / run_id


def pending_folders() -> list[Path]:
    """Folders of all runs of the project with unlogged calls."""
    return sorted(path.parent for path in (store.project_folder() / UNLOGGED_FOLDER).glob(f"*/{_CALLS}"))


def save_call(folder: Path, call: LogCall) -> None:
    """Append a call to the folder of its run, with a copy of its artifact; raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder):
        folder.mkdir(exist_ok=True)  # again: another process may have sent and removed it before the lock
        if "artifact" in call:
            call = call | {"artifact": _copy(Path(call["artifact"]), folder)}
        with open(folder / _CALLS, "a") as calls:
            # The newline comes first, so that a line cut off by a full disk does not spoil the next one.
            calls.write(f"\n{json.dumps(call)}")


def save_run(folder: Path, calls: Iterable[LogCall]) -> None:
    """Save all calls of a run at once, with copies of its artifacts; raises OSError."""
    with whole_folder(folder) as temporary:
        copied = [
            call | {"artifact": _copy(Path(call["artifact"]), temporary)} if "artifact" in call else call
            for call in calls
        ]
        (temporary / _CALLS).write_text("\n".join(json.dumps(call) for call in copied))


def pipeline_of(run_id: str) -> str:
    """Stands for the id of the pipeline's run in the calls of a run that MLflow does not know yet."""
    return f"pipeline of {run_id}"


def send_calls(client: "MlflowClient", folder: Path) -> None:
    """Send all calls saved in a run's folder, then remove it.

    Raises any error of MLflow and then keeps all calls: sending a call again has no further effect.
    """
    with _lock(folder):
        if not (folder / _CALLS).is_file():  # another process has just sent them
            return
        calls = list(_read(folder))
        ids = _begin(client, calls)
        for call in _in_order(calls):
            artifact = {"artifact": str(folder / call["artifact"])} if "artifact" in call else {}
            log_call(client, call | artifact | {"run": ids.get(call["run"], call["run"])})
        shutil.rmtree(folder)


def _begin(client: "MlflowClient", calls: Iterable[LogCall]) -> dict[str, str]:
    """Create the run that MLflow does not know yet; ids of it and its pipeline, by those in the calls."""
    begun = next((call["begin"] for call in calls if "begin" in call), None)
    if begun is None:
        return {}
    experiment = client.get_experiment_by_name(store.EXPERIMENT)
    assert experiment, "whoever sends is connected, which creates it"
    run_id, pipeline = store.begin_run(client, experiment.experiment_id, begun)
    return {begun["id"]: run_id, pipeline_of(begun["id"]): pipeline}


def _lock(folder: Path) -> FileLock:
    """A lock, so that no call is saved to a folder while it is sent and removed."""
    return FileLock(folder.parent / ".lock")


def _copy(path: Path, folder: Path) -> str:
    """Copy an artifact to the next numbered subfolder, and return the number."""
    number = str(sum(entry.is_dir() for entry in folder.iterdir()))
    if path.is_dir():
        shutil.copytree(path, folder / number)
    else:
        (folder / number).mkdir()
        shutil.copy(path, folder / number)
    return number


def _read(folder: Path) -> Iterator[LogCall]:
    for line in (folder / _CALLS).read_text().splitlines():
        try:
            yield json.loads(line or "{}")
        except json.JSONDecodeError:
            print(f"atr: {folder / _CALLS}: skipped a line cut off by a full disk", file=sys.stderr)


def _in_order(calls: Iterable[LogCall]) -> Iterator[LogCall]:
    """Metrics in large batches, then statuses, then artifacts, whose store may fail on its own."""
    points: dict[str, list[list[Any]]] = defaultdict(list)
    others = []
    for call in calls:
        if "metrics" in call:
            points[call["run"]] += call["metrics"]
        elif call and "begin" not in call:
            others.append(call)
    for run, values in points.items():
        for start in range(0, len(values), _BATCH):
            yield {"run": run, "metrics": values[start : start + _BATCH]}
    yield from sorted(others, key=lambda call: "artifact" in call)
