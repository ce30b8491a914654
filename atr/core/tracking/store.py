"""Where the log lies, and how it is opened: a database is made or mended by one process at a time."""

import logging
import os
import re
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "atr"
DATABASE = Path("experiments/mlflow.db")
_SQLITE = "sqlite:///"
_ARTIFACTS = "mlartifacts"
_PROBE_SECONDS = 10
_LOCK_SECONDS = 120
"""MLflow makes its schema in six seconds on an idle core."""
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # MLflow's own values hold a stage for over four minutes at each call that nobody answers.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}


def project_folder() -> Path:
    """The folder of the user's project: the working folder, or what DVC copied it from.

    `dvc exp run --temp` and `--queue` run the stages in a folder below `.dvc/tmp/exps`, which DVC deletes.
    """
    here = Path.cwd()
    copies = (folder for folder in here.parents if folder.parts[-3:] == (".dvc", "tmp", "exps"))
    return next((folder.parents[2] for folder in copies), here)


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or the project's database; a database's path is absolute."""
    given = os.environ.get("MLFLOW_TRACKING_URI") or f"{_SQLITE}{DATABASE}"
    return (
        f"{_SQLITE}{project_folder() / given.removeprefix(_SQLITE)}" if given.startswith(_SQLITE) else given
    )


def uri_without_password() -> str:
    """The URI as a message may have it, without a password."""
    return re.sub(r"//[^/@]*@", "//", tracking_uri())


def one_line(error: Exception) -> str:
    """What an error says, in one line that is no page."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]} ..."


@contextmanager
def log_errors() -> Iterator[None]:
    """Raise a ValueError in place of what MLflow raises, or any library that its stores stand on."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            f"the MLflow log {uri_without_password()} cannot be used: {one_line(error)}"
        ) from error


def connect() -> tuple["MlflowClient", str]:
    """A client of the log and the id of our experiment in it; both are made where they are missing.

    Raises ValueError for a database that cannot be written or a server that does not answer, and whatever
    MLflow raises.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # alembic reports every step of a new schema, and MLflow prints a traceback of what it raises as well.
    for name, level in (("alembic", logging.WARNING), ("mlflow.store.db.utils", logging.CRITICAL)):
        logging.getLogger(name).setLevel(level)
    if not tracking_uri().startswith(_SQLITE):
        check_server()
        return _open(None)
    database = Path(tracking_uri().removeprefix(_SQLITE))
    # Without a location of ours a file database would get its artifacts in ./mlruns; a server knows its own.
    location = (database.parent.resolve() / _ARTIFACTS).as_uri()
    with _alone(database):
        _check_writable(database)
        opened = _open(location)
        _keep_beside(database, location)
    return opened


def _open(location: str | None) -> tuple["MlflowClient", str]:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client = MlflowClient(tracking_uri())
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        try:
            return client, client.create_experiment(EXPERIMENT, location)
        except MlflowException:
            # On a server, another pipeline may have been faster.
            found = client.get_experiment_by_name(EXPERIMENT)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
        print(
            f"atr: the MLflow experiment {EXPERIMENT} had been deleted; it is restored, with its runs",
            file=sys.stderr,
        )
    return client, found.experiment_id


def check_server() -> None:
    """One short request to a server, before others, which are given more time; raises ValueError."""
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
            f"the MLflow server {uri_without_password()} does not answer; start it, or unset MLFLOW_TRACKING_URI, and the "
            f"log is {DATABASE}"
        ) from error


@contextmanager
def _alone(database: Path) -> Iterator[None]:
    """Keep our other processes from opening it: MLflow cannot make a schema in two processes at once."""
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
    """Write a table and take it back: MLflow itself retries for minutes on a file it cannot write."""
    try:
        with closing(sqlite3.connect(database, timeout=10, isolation_level=None)) as connection:
            for statement in ("BEGIN IMMEDIATE", "CREATE TABLE atr_can_write (a)", "ROLLBACK"):
                connection.execute(statement)
    except sqlite3.Error as error:
        raise ValueError(f"the MLflow file {database} cannot be written: {error}") from error


def _keep_beside(database: Path, location: str) -> None:
    """Point the experiment and its runs to the artifacts beside the database, wherever it lies now.

    MLflow writes absolute locations and has no call to change them: a copied project would go on logging into
    the folder of the original, and a moved one would lose its artifacts. A location of the user's own stays.
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
    print(f"atr: the log was copied or moved: its artifacts are now those in {location}", file=sys.stderr)
