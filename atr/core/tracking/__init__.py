"""Logging to MLflow: every execution of a stage is one run, nested under the run of its pipeline.

MLflow is only a log: no stage reads it, DVC owns the outputs of the stages, and no result is lost if logging
fails. Only this package imports mlflow, and only when a run starts, as the import takes over a second.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from uuid import uuid4

import atr
from atr import config
from atr.core import lifetime
from atr.core.tracking import store, unlogged

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger
    from mlflow import MlflowClient


class Run(Protocol):
    """Log of one execution of a stage."""

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers; without a step they are results, which are also logged to the pipeline's run."""

    def artifact(self, path: Path | str, folder: str | None = None) -> None:
        """Log a file, or all files of a folder, to a folder of the run's artifacts."""

    def logger(self) -> "Logger":
        """A Lightning logger that writes to this run."""


@contextmanager
def run(stage: str, params: config.Params, part: str = "") -> Iterator[Run]:
    """Log one execution of a stage; `part` names its cell if the stage is a DVC matrix.

    The run ends as FINISHED, as FAILED after an exception, or as KILLED after Ctrl-C or SIGTERM. Only the
    first process of a distributed stage logs. Raises ValueError if the log cannot be written at the start. If
    it fails later, one line on stderr says so, and everything unlogged is saved to be sent later.
    """
    if not is_first_process():
        yield _Silent()
        return
    tracked = _start(stage, params, part)
    status = "KILLED"
    try:
        yield tracked
        status = "FINISHED"
    except Exception:
        status = "FAILED"
        raise
    finally:
        tracked.end(status)


def current_provenance() -> dict[str, Any]:
    """Git commit and library versions, for the record of a result; equal for all executions at one commit."""
    libraries = ("torch", "transformers", "lightning")
    versions = {"atr": atr.__version__} | {name: version(name) for name in libraries}
    return {"commit": _git("rev-parse", "HEAD"), "versions": versions}


class _Tracked:
    """The MLflow run of a stage, and of the pipeline it belongs to."""

    def __init__(self, client: "MlflowClient", run_id: str, parent_id: str, name: str) -> None:
        self._client = client
        self._run_id = run_id
        self._parent_id = parent_id
        self._name = name
        self._unlogged = unlogged.run_folder(run_id)
        self._failed = False

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        self._log(self._run_id, values, step or 0)
        if step is None:
            self._log(self._parent_id, {f"{self._name}/{key}": value for key, value in values.items()}, 0)

    def _log(self, run_id: str, values: Mapping[str, float], step: int) -> None:
        now = _now()
        points = [(key, float(value), now, step) for key, value in values.items()]
        self._send(f"the metrics {', '.join(values)}", {"run": run_id, "metrics": points})

    def artifact(self, path: Path | str, folder: str | None = None) -> None:
        self._send(str(path), {"run": self._run_id, "artifact": str(path), "folder": folder})

    def logger(self) -> "Logger":
        from atr.core.tracking.training_logger import TrainingLogger

        return TrainingLogger(self._run_id, self.metrics)

    def end(self, status: str) -> None:
        for run_id in (self._run_id, self._parent_id):
            self._send("the end of the run", {"run": run_id, "status": status, "ended": _now()})
        if self._failed and status == "FINISHED":
            self._send_again()

    def _send(self, what: str, call: unlogged.LogCall) -> None:
        """Log a call; after a failure only save calls, as waiting for a dead server would take hours."""
        if not self._failed:
            try:
                return unlogged.log_call(self._client, call)
            except Exception as error:  # raised by MLflow or by a library of its stores
                self._failed = True
                self._print(
                    f"{what} could not be logged ({store.one_line(error)}); this and everything after it is "
                    f"saved in {self._unlogged}; `python -m atr.core.tracking` sends it"
                )
        try:
            unlogged.save_call(self._unlogged, call)
        except OSError as error:
            self._print(f"{what} is neither logged nor saved: {error}")

    def _send_again(self) -> None:
        """Send the saved calls, as the failure may have been temporary; otherwise they stay saved."""
        with suppress(Exception):
            store.check_server()
            unlogged.send_calls(self._client, self._unlogged)
            self._print("everything is logged now")

    def _print(self, text: str) -> None:
        print(f"atr {self._name}: {text}", file=sys.stderr)


class _Silent:
    """Logs nothing, for all but the first process of a distributed stage."""

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        pass

    def artifact(self, path: Path | str, folder: str | None = None) -> None:
        pass

    def logger(self) -> "Logger":
        from lightning.pytorch.loggers.logger import DummyLogger

        return DummyLogger()


def is_first_process() -> bool:
    """Whether every rank set by a launcher (Lightning, torchrun, Slurm) is 0."""
    ranks = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
    return all(os.environ.get(rank, "0") == "0" for rank in ranks)


def _now() -> int:
    """Milliseconds since the epoch, MLflow's unit."""
    return int(time.time() * 1000)


def _start(stage: str, params: config.Params, part: str) -> _Tracked:
    name = f"{stage}/{part}" if part else stage
    tags = {"pipeline": _pipeline_id(), **params.labels(), **_git_tags()}
    with store.log_errors():
        client, experiment = store.connect()
        parent = _find_or_create_parent(client, experiment, tags, params)
        tags |= {"stage": stage, "mlflow.parentRunId": parent}
        run_id = _create_run(client, experiment, name, tags, params.flat())
    return _Tracked(client, run_id, parent, name)


def _find_or_create_parent(
    client: "MlflowClient", experiment: str, tags: dict[str, str], params: config.Params
) -> str:
    """Id of the pipeline's run: the one an earlier stage created, or a new one with all parameters."""
    pipeline = tags["pipeline"]
    parents = client.search_runs([experiment], f"tags.pipeline = '{pipeline}' and tags.stage = 'pipeline'")
    if parents:
        run_id = str(parents[0].info.run_id)
        client.update_run(run_id, status="RUNNING")
        return run_id
    return _create_run(
        client, experiment, f"pipeline-{pipeline}", tags | {"stage": "pipeline"}, params.whole_file()
    )


def _create_run(
    client: "MlflowClient", experiment: str, name: str, tags: dict[str, str], params: dict[str, Any]
) -> str:
    from mlflow.entities import Param

    # An explicit name: under Lightning's seed_everything MLflow's random names are all the same.
    run_id = str(client.create_run(experiment, tags=tags, run_name=name).info.run_id)
    client.log_batch(run_id, params=[Param(key, str(value)) for key, value in params.items()])
    return run_id


def _pipeline_id() -> str:
    """Id shared by all stages of one `dvc repro`: ATR_PIPELINE, a hash of the dvc process, or random."""
    if pipeline := os.environ.get("ATR_PIPELINE"):
        return pipeline
    if process := lifetime.find_dvc():
        # In minutes: the reported start time moves by a second when the system clock is adjusted.
        start = int(process.create_time() // 60)
        return sha256(f"{socket.gethostname()} {process.pid} {start}".encode()).hexdigest()[:10]
    return uuid4().hex[:10]


def _git_tags() -> dict[str, str]:
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return {}
    # dvc.lock and experiments change while stages run, which does not make the tree dirty.
    changed = _git("status", "--porcelain", "--", ".", ":!dvc.lock", ":!experiments")
    return {"git_commit": commit, "git_dirty": str(bool(changed)).lower()}


def _git(*arguments: str) -> str | None:
    """Output of git; None outside a repository, before its first commit, or without git."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
