"""Logging to MLflow: every execution of a stage is one run, nested under the run of its pipeline.

MLflow is only a log: no stage reads it, DVC owns the outputs of the stages, and no result is lost if logging
fails. Only this package imports mlflow, and only when it connects, as import and connection take two seconds.
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

LONG_SECONDS = 60
"""A cell that takes longer sends its log at its end; connecting to MLflow takes two or three seconds."""


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

    A pipeline has dozens of cells, and most are short beside the import of MLflow: unless a cell fails or
    takes over a minute, its calls are only saved, and the next execution that is no cell sends them at its
    end.

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
        if not self._failed:
            _send_saved(self._client)
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


class _Later:
    """Saves the calls of a cell when it ends, to be sent together with those of others."""

    def __init__(self, begun: dict[str, Any]) -> None:
        self._id = begun["id"]
        self._name = begun["name"]
        self._started = begun["started"]
        self._calls: list[unlogged.LogCall] = [{"run": self._id, "begin": begun}]

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        now, named = _now(), {f"{self._name}/{key}": value for key, value in values.items()}
        runs = {self._id: values} | ({unlogged.pipeline_of(self._id): named} if step is None else {})
        for run_id, metrics in runs.items():
            points = [(key, float(value), now, step or 0) for key, value in metrics.items()]
            self._calls.append({"run": run_id, "metrics": points})

    def artifact(self, path: Path | str, folder: str | None = None) -> None:
        self._calls.append({"run": self._id, "artifact": str(path), "folder": folder})

    def logger(self) -> "Logger":
        from atr.core.tracking.training_logger import TrainingLogger

        return TrainingLogger(self._id, self.metrics)

    def end(self, status: str) -> None:
        ended = _now()
        for run_id in (self._id, unlogged.pipeline_of(self._id)):
            self._calls.append({"run": run_id, "status": status, "ended": ended})
        try:
            unlogged.save_run(unlogged.run_folder(self._id), self._calls)
        except OSError as error:
            print(f"atr {self._name}: its log is not saved: {error}", file=sys.stderr)
        if status != "FINISHED" or ended - self._started > 1000 * LONG_SECONDS:
            try:
                with store.log_errors():
                    client, _ = store.connect()
                _send_saved(client)
            except ValueError as error:
                print(
                    f"atr {self._name}: {error}; `python -m atr.core.tracking` sends the log", file=sys.stderr
                )


def _send_saved(client: "MlflowClient") -> None:
    """Send the saved calls of all runs of the project; what fails stays saved, and a line says so."""
    for folder in unlogged.pending_folders():
        try:
            unlogged.send_calls(client, folder)
        except Exception as error:  # raised by MLflow or by a library of its stores
            print(f"atr: {folder} could not be logged: {store.one_line(error)}", file=sys.stderr)


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


def _start(stage: str, params: config.Params, part: str) -> "_Tracked | _Later":
    tags = {"pipeline": _pipeline_id(), "stage": stage, **params.labels(), **_git_tags()}
    begun: dict[str, Any] = {"name": f"{stage}/{part}" if part else stage, "tags": tags, "started": _now()}
    begun |= {"params": _texts(params.flat()), "whole_file": _texts(params.whole_file())}
    if part:
        return _Later(begun | {"id": uuid4().hex})
    with store.log_errors():
        client, experiment = store.connect()
        return _Tracked(client, *store.begin_run(client, experiment, begun), begun["name"])


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(value) for key, value in values.items()}


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
