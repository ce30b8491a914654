"""The parameters of the pipeline: one frozen dataclass for each section of params.yaml, each in its own file.

`load` checks the whole file before any heavy import. Code of the package imports a section's dataclass from
its own file, so that a stage depends on no other section; names such as `atr.config.Evaluate` are for
interactive use and tests.
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
    """Look up a section's class (`Extract` in extract.py), or a name of the modules presets or stages."""
    file = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
    own = [file] if name[:1].isupper() and find_spec(f"{__name__}.{file}") else []
    for name_of_module in (*own, *(() if name.startswith("_") else ("presets", "stages"))):
        if hasattr(module := import_module(f"{__name__}.{name_of_module}"), name):
            return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
