"""`python -m atr` is the command `atr`."""

from atr.cli.main import main

main()
