"""The parameters of the pipeline: one frozen dataclass for each section of params.yaml, each in its own file.

`load` checks the whole file before any heavy import. Code of atr/ imports a section's dataclass from its own
file, so that a stage depends on no other; `atr.config.Evaluate` and the like are looked up for interactive
use and tests.
"""

import re
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from atr.config.errors import ConfigError
from atr.config.loader import Params, flat, load, load_or_exit
from atr.config.reading import parse, read

__all__ = ["ConfigError", "Params", "flat", "load", "load_or_exit", "parse", "read"]


def __getattr__(name: str) -> Any:
    """A section by its class (`SelectorTraining` of selector_training.py), a preset, or a table of stages."""
    file = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
    own = [file] if name[:1].isupper() and find_spec(f"{__name__}.{file}") else []
    for module in (*own, *(() if name.startswith("_") else ("presets", "stages"))):
        if hasattr(found := import_module(f"{__name__}.{module}"), name):
            return getattr(found, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
