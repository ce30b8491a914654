"""`python -m atr.core.tracking`: sends to MLflow what stages could not log."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from atr.core.tracking import store, unlogged

if TYPE_CHECKING:
    from mlflow import MlflowClient


def main() -> None:
    """Exits with 1 and a line for each run where something could not be sent; it is kept then."""
    failed = False
    try:
        with store.log_errors():
            client, _ = store.connect()
        for home in unlogged.pending_folders():
            failed |= not _sent(client, home)
    except ValueError as error:
        sys.exit(str(error))
    sys.exit(failed)


def _sent(client: "MlflowClient", home: Path) -> bool:
    try:
        unlogged.send_calls(client, home)
    except Exception as error:  # of MLflow, or of any library that its stores stand on
        print(f"{home}: {store.one_line(error)}", file=sys.stderr)
        return False
    print(f"{home}: logged")
    return True


if __name__ == "__main__":
    main()
