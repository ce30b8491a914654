"""`python -m atr.core.tracking`: sends to MLflow what stages could not log."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from atr.core.tracking import store, unlogged

if TYPE_CHECKING:
    from mlflow import MlflowClient


def main() -> None:
    """Send the saved calls of all runs; if any run fails, print a line for each and exit with 1."""
    failed = False
    try:
        with store.log_errors():
            client, _ = store.connect()
        for folder in unlogged.pending_folders():
            failed |= not _send(client, folder)
    except ValueError as error:
        sys.exit(str(error))
    sys.exit(failed)


def _send(client: "MlflowClient", folder: Path) -> bool:
    """Send the calls of one run; False if that failed."""
    try:
        unlogged.send_calls(client, folder)
    except Exception as error:  # raised by MLflow or by a library of its stores
        print(f"{folder}: {store.one_line(error)}", file=sys.stderr)
        return False
    print(f"{folder}: logged")
    return True


if __name__ == "__main__":
    main()
