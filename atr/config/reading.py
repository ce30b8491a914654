"""Reads parameter files in YAML as DVC does."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from atr.config.errors import ConfigError, abridge

_ALLOWED = "a YAML file of parameters, e.g. params.yaml"


def read(path: str | Path) -> dict[str, Any]:
    """The content of a parameter file, or of an overlay; its keys and values are not checked.

    Raises ConfigError, one line that names the file, if it is not a YAML mapping, and as `parse` does.
    """
    try:
        tree = parse(Path(path).read_text(encoding="utf-8"), path)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file, allowed: {_ALLOWED}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}, allowed: {_ALLOWED}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: {abridge(tree)} is not a mapping, allowed: {_ALLOWED}")
    return {str(key): value for key, value in tree.items()}


def parse(text: str, source: str | Path) -> Any:
    """Parse YAML 1.2, the version that DVC reads, so that a stage runs with the values that DVC records.

    Raises ConfigError, one line: for invalid YAML, naming the source; for a value that YAML 1.1 reads
    differently, naming its key (`010` is ten in YAML 1.2 and eight in YAML 1.1).
    """
    try:
        tree = YAML(typ="safe").load(text)
        # OmegaConf reads YAML 1.1, except that `3e-4` is a number as in YAML 1.2.
        other = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=False)
    except (OSError, ValueError, RecursionError, YAMLError, yaml.YAMLError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{source}: {reason}, allowed: {_ALLOWED}") from None
    for key, value, misread in _ambiguous(tree, other) if isinstance(tree, dict) else ():
        raise ConfigError(
            f"{key}: {abridge(value)} in YAML 1.2, which DVC reads, is {abridge(misread)} in YAML 1.1, "
            "allowed: what both read alike, or text in quotes"
        )
    return tree


def _ambiguous(value: Any, other: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Values that the two versions read differently, by dotted key, except `off`, an allowed choice."""
    if isinstance(value, dict) and isinstance(other, dict):
        for name, item in value.items():
            yield from _ambiguous(item, other.get(name), f"{key}.{name}".lstrip("."))
    elif isinstance(value, list) and isinstance(other, list):
        for item, twin in zip(value, other, strict=True):
            yield from _ambiguous(item, twin, key)
    elif repr(value) != repr(other) and value != "off":
        yield key, value, other
