"""The MLflow store: its location and connection; one process at a time creates or repairs a database."""

import logging
import os
import re
import sqlite3
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

EXPERIMENT = "atr"
DATABASE = Path("experiments/mlflow.db")
_SQLITE = "sqlite:///"
_ARTIFACTS = "mlartifacts"
_PROBE_SECONDS = 10
_LOCK_SECONDS = 120
"""MLflow needs six seconds on an idle core to create its schema."""
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # With MLflow's defaults each call to a dead server blocks the stage for over four minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}


def project_folder() -> Path:
    """Folder of the user's project: the working directory, or the original if that is a copy made by DVC.

    `dvc exp run --temp` and `--queue` run the stages in a copy below `.dvc/tmp/exps`, which DVC then deletes.
    """
    here = Path.cwd()
    copies = (folder for folder in here.parents if folder.parts[-3:] == (".dvc", "tmp", "exps"))
    return next((folder.parents[2] for folder in copies), here)


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or the project's database; with an absolute path if it is a database."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"{_SQLITE}{DATABASE}"
    return f"{_SQLITE}{project_folder() / uri.removeprefix(_SQLITE)}" if uri.startswith(_SQLITE) else uri


def uri_without_password() -> str:
    """The tracking URI without credentials, for messages."""
    return re.sub(r"//[^/@]*@", "//", tracking_uri())


def one_line(error: Exception) -> str:
    """Message of an error on one line of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]} ..."


@contextmanager
def log_errors() -> Iterator[None]:
    """Turn any error of MLflow or of its stores' libraries into a ValueError that names the log."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            f"the MLflow log {uri_without_password()} cannot be used: {one_line(error)}"
        ) from error


def connect() -> tuple["MlflowClient", str]:
    """A client, and the id of the experiment EXPERIMENT; creates database and experiment if missing.

    Raises ValueError for a database that cannot be written or a server that does not answer, and any error of
    MLflow.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # alembic logs every step of a new schema; MLflow logs a traceback of each error that it raises.
    for name, level in (("alembic", logging.WARNING), ("mlflow.store.db.utils", logging.CRITICAL)):
        logging.getLogger(name).setLevel(level)
    if not tracking_uri().startswith(_SQLITE):
        check_server()
        return _open_experiment(None)
    database = Path(tracking_uri().removeprefix(_SQLITE))
    # Without an explicit location MLflow puts the artifacts of a file database into ./mlruns.
    location = (database.parent.resolve() / _ARTIFACTS).as_uri()
    with _locked(database):
        _check_writable(database)
        opened = _open_experiment(location)
        _relocate_artifacts(database, location)
    return opened


def _open_experiment(location: str | None) -> tuple["MlflowClient", str]:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client = MlflowClient(tracking_uri())
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        try:
            return client, client.create_experiment(EXPERIMENT, location)
        except MlflowException:
            # On a server, another pipeline may have created it meanwhile.
            experiment = client.get_experiment_by_name(EXPERIMENT)
            if experiment is None:
                raise
    if experiment.lifecycle_stage == "deleted":
        client.restore_experiment(experiment.experiment_id)
        print(
            f"atr: the MLflow experiment {EXPERIMENT} had been deleted; it is restored, with its runs",
            file=sys.stderr,
        )
    return client, experiment.experiment_id


def begin_run(client: "MlflowClient", experiment: str, begun: Mapping[str, Any]) -> tuple[str, str]:
    """Create the run of a stage that began, in the run of its pipeline; ids of both.

    `begun` has the `name` of the run, its `tags`, its `params`, those of the `whole_file`, and the
    milliseconds when it `started`. With an `id`, as runs that are sent later have it, a run is created once.
    """
    if begun.get("id") and (known := _with_tags(client, experiment, id=begun["id"])):
        return str(known.info.run_id), str(known.data.tags["mlflow.parentRunId"])
    tags, pipeline = begun["tags"], begun["tags"]["pipeline"]
    if parent := _with_tags(client, experiment, pipeline=pipeline, stage="pipeline"):
        parent_id = str(parent.info.run_id)
        client.update_run(parent_id, status="RUNNING")
    else:
        whole = {"name": f"pipeline-{pipeline}", "params": begun["whole_file"], "started": begun["started"]}
        parent_id = _create_run(client, experiment, tags | {"stage": "pipeline"}, **whole)
    own = {"mlflow.parentRunId": parent_id} | ({"id": begun["id"]} if begun.get("id") else {})
    run = {key: begun[key] for key in ("name", "params", "started")}
    return _create_run(client, experiment, tags | own, **run), parent_id


def _with_tags(client: "MlflowClient", experiment: str, **tags: str) -> "Run | None":
    """The latest run with these tags."""
    where = " and ".join(f"tags.{key} = '{value}'" for key, value in tags.items())
    return next(iter(client.search_runs([experiment], where, max_results=1)), None)


def _create_run(
    client: "MlflowClient",
    experiment: str,
    tags: dict[str, str],
    name: str,
    params: dict[str, str],
    started: int,
) -> str:
    from mlflow.entities import Param

    # An explicit name: under Lightning's seed_everything MLflow's random names are all the same.
    run_id = str(client.create_run(experiment, started, tags, name).info.run_id)
    client.log_batch(run_id, params=[Param(key, value) for key, value in params.items()])
    return run_id


def check_server() -> None:
    """Ask a server for its health, with a short timeout; raises ValueError if it does not answer."""
    from mlflow.exceptions import MlflowException
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    if not tracking_uri().startswith(("http://", "https://")):
        return
    try:
        host = get_default_host_creds(tracking_uri())  # type: ignore[no-untyped-call]
        http_request(host, "/health", "GET", timeout=_PROBE_SECONDS, max_retries=0)  # type: ignore[no-untyped-call]
    except MlflowException as error:
        raise ValueError(
            f"the MLflow server {uri_without_password()} does not answer; start it, or unset "
            f"MLFLOW_TRACKING_URI to log to {DATABASE}"
        ) from error


@contextmanager
def _locked(database: Path) -> Iterator[None]:
    """Lock the database against other stages: MLflow cannot create a schema in two processes at once."""
    lock = FileLock(f"{database}.lock", timeout=_LOCK_SECONDS)
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise ValueError(f"the MLflow file {database} cannot be written: {error}") from error
    try:
        yield
    finally:
        lock.release()


def _check_writable(database: Path) -> None:
    """Create a table and roll back: MLflow retries for minutes on a file that it cannot write."""
    try:
        with closing(sqlite3.connect(database, timeout=10, isolation_level=None)) as connection:
            for statement in ("BEGIN IMMEDIATE", "CREATE TABLE atr_can_write (a)", "ROLLBACK"):
                connection.execute(statement)
    except sqlite3.Error as error:
        raise ValueError(f"the MLflow file {database} cannot be written: {error}") from error


def _relocate_artifacts(database: Path, location: str) -> None:
    """Point the experiment and its runs to the artifacts beside the database.

    MLflow stores absolute locations and cannot change them: a copied project would log into the original's
    folder, and a moved one would lose its artifacts. A location that the user chose stays.
    """
    with closing(sqlite3.connect(database, timeout=10)) as connection, connection:
        (former,) = connection.execute(
            "SELECT artifact_location FROM experiments WHERE name = ?", (EXPERIMENT,)
        ).fetchone()
        if former == location or not re.fullmatch(f"file://.*/{_ARTIFACTS}", former):
            return
        values = {"new": location, "old": former, "name": EXPERIMENT}
        connection.execute("UPDATE experiments SET artifact_location = :new WHERE name = :name", values)
        connection.execute(
            "UPDATE runs SET artifact_uri = :new || substr(artifact_uri, length(:old) + 1)"
            " WHERE substr(artifact_uri, 1, length(:old) + 1) = :old || '/'",
            values,
        )
    print(f"atr: the MLflow log was copied or moved: its artifacts are now in {location}", file=sys.stderr)
