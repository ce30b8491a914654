"""`python -m atr.tracking`: makes the MLflow log where there is none, and sends what stages could not log."""

import sys

from atr.tracking import reason, store, unlogged


def main() -> None:
    """Exits with 1 where something could not be sent; it is kept then."""
    try:
        client, _ = store.connect()
    except Exception as error:
        sys.exit(f"the MLflow log {store.shown()} cannot be used: {reason(error)}")
    failed = False
    for home in unlogged.folders():
        try:
            unlogged.send(client, home)
            print(f"{home.name}: logged")
        except Exception as error:
            failed = True
            print(f"{home}: {reason(error)}", file=sys.stderr)
    sys.exit(failed)


if __name__ == "__main__":
    main()
