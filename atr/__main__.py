"""`python -m atr` is the command `atr`."""

from atr.cli.main import main

if __name__ == "__main__":
    main()
