"""The command `atr`."""
