"""The log of executions: every stage that runs is one MLflow run under the run of its pipeline.

MLflow is a log and nothing else: no stage reads it, DVC owns what the stages produce, and a log that fails
costs no result. This is the only package that imports mlflow, and only once a run starts: the import takes
more than a second.
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
    """The log of one stage execution."""

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers; without a step they are results, and the pipeline's run gets them too."""

    def artifact(self, path: Path | str, folder: str | None = None) -> None:
        """Log a file, or all files of a folder, into a folder of the run's artifacts."""

    def logger(self) -> "Logger":
        """A Lightning logger that writes into this run."""


@contextmanager
def run(stage: str, params: config.Params, part: str = "") -> Iterator[Run]:
    """Log one execution of a stage; `part` tells the executions of a stage's DVC matrix apart.

    The run ends as FINISHED, FAILED after an exception, or KILLED after Ctrl-C or SIGTERM. Only the
    first process of a distributed stage logs. Raises ValueError, before anything is computed, when the log
    cannot be written; when it fails later, one line says so, and what is not logged is kept to be sent.
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


def provenance() -> dict[str, Any]:
    """Commit and versions that made a result; nothing that differs between two executions at one commit."""
    libraries = ("torch", "transformers", "lightning")
    versions = {"atr": atr.__version__} | {name: version(name) for name in libraries}
    return {"commit": _git("rev-parse", "HEAD"), "versions": versions}


class _Tracked:
    """A stage's run and the pipeline's run it belongs to."""

    def __init__(self, client: "MlflowClient", run_id: str, parent_id: str, name: str) -> None:
        self._client = client
        self._run_id = run_id
        self._parent_id = parent_id
        self._name = name
        self._kept = unlogged.folder(run_id)
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

    def _send(self, what: str, call: unlogged.Call) -> None:
        """Log it; once the log has failed, only keep it: a dead server asked at each step takes hours."""
        if not self._failed:
            try:
                return unlogged.perform(self._client, call)
            except Exception as error:  # of MLflow, or of any library that its stores stand on
                self._failed = True
                self._say(
                    f"{what} could not be logged ({store.reason(error)}); this and all that follows is kept "
                    f"in {self._kept}, `python -m atr.core.tracking` sends it"
                )
        try:
            unlogged.keep(self._kept, call)
        except OSError as error:
            self._say(f"{what} is not logged, and could not be kept: {error}")

    def _send_again(self) -> None:
        """What failed for a moment needs nobody's hand; for all else the line that was printed stands."""
        with suppress(Exception):
            store.check_answer()
            unlogged.send(self._client, self._kept)
            self._say("all of it is logged after all")

    def _say(self, text: str) -> None:
        print(f"atr {self._name}: {text}", file=sys.stderr)


class _Silent:
    """What the other processes of a distributed stage get instead of a run."""

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        pass

    def artifact(self, path: Path | str, folder: str | None = None) -> None:
        pass

    def logger(self) -> "Logger":
        from lightning.pytorch.loggers.logger import DummyLogger

        return DummyLogger()


def is_first_process() -> bool:
    """Whether no launcher (Lightning, torchrun, Slurm) says that this process is a later one."""
    ranks = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
    return all(os.environ.get(rank, "0") == "0" for rank in ranks)


def _now() -> int:
    """Milliseconds, as MLflow counts."""
    return int(time.time() * 1000)


def _start(stage: str, params: config.Params, part: str) -> _Tracked:
    name = f"{stage}/{part}" if part else stage
    tags = {"pipeline": _pipeline_id(), **params.labels(), **_git_tags()}
    with store.usable():
        client, experiment = store.connect()
        parent = _parent(client, experiment, tags, params)
        tags |= {"stage": stage, "mlflow.parentRunId": parent}
        run_id = _create(client, experiment, name, tags, params.flat())
    return _Tracked(client, run_id, parent, name)


def _parent(client: "MlflowClient", experiment: str, tags: dict[str, str], params: config.Params) -> str:
    """Id of the pipeline's run: the one that an earlier stage made, or a new one with all parameters."""
    pipeline = tags["pipeline"]
    found = client.search_runs([experiment], f"tags.pipeline = '{pipeline}' and tags.stage = 'pipeline'")
    if found:
        run_id = str(found[0].info.run_id)
        client.update_run(run_id, status="RUNNING")
        return run_id
    return _create(
        client, experiment, f"pipeline-{pipeline}", tags | {"stage": "pipeline"}, params.whole_file()
    )


def _create(
    client: "MlflowClient", experiment: str, name: str, tags: dict[str, str], params: dict[str, Any]
) -> str:
    from mlflow.entities import Param

    # A name of our own: MLflow's random ones come out equal under Lightning's seed_everything.
    run_id = str(client.create_run(experiment, tags=tags, run_name=name).info.run_id)
    client.log_batch(run_id, params=[Param(key, str(value)) for key, value in params.items()])
    return run_id


def _pipeline_id() -> str:
    """The same for all stages of one `dvc repro`: ATR_PIPELINE, or a digest of the dvc process above us."""
    given = os.environ.get("ATR_PIPELINE")
    if given:
        return given
    if process := lifetime.dvc_above():
        # By the minute: the start that the system reports moves by a second when its clock is set.
        start = int(process.create_time() // 60)
        return sha256(f"{socket.gethostname()} {process.pid} {start}".encode()).hexdigest()[:10]
    return uuid4().hex[:10]


def _git_tags() -> dict[str, str]:
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return {}
    # What stages write while they run is not what makes a working tree dirty.
    changed = _git("status", "--porcelain", "--", ".", ":!dvc.lock", ":!experiments")
    return {"git_commit": commit, "git_dirty": str(bool(changed)).lower()}


def _git(*arguments: str) -> str | None:
    """What git prints, or None outside a repository, before its first commit, and without git."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
