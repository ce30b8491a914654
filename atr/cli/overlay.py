"""Writes the values of an experiment file into params.yaml, keeping comments and order.

`dvc repro` and `dvc exp run` then rerun the stages that declare a changed value.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml as pyyaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import RoundTripRepresenter
from ruamel.yaml.scalarstring import SingleQuotedScalarString

from atr import config
from atr.core.files import whole_file

Changes = dict[str, tuple[Any, Any]]
"""Values before and after by dotted key."""


class _Representer(RoundTripRepresenter):
    """Writes `null`, where ruamel writes nothing."""

    def represent_none(self, data: None) -> ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:null", "null")


_Representer.add_representer(type(None), _Representer.represent_none)


def apply(overlay: str | Path, settings: Sequence[str] = (), path: str | Path = "params.yaml") -> Changes:
    """Write the values of `overlay`, and of `settings` ("section.key=value", which win), into `path`.

    Returns the changed values. Raises ConfigError, one line with key, value and what is allowed, if the
    result is not a valid parameter file. After any failure `path` is unchanged.
    """
    before = config.flat(path)
    changes = _merged(config.read(overlay), settings)
    yaml = _round_trip()
    tree = yaml.load(Path(path).read_text())
    _write_values(tree, changes)
    with whole_file(Path(path)) as temporary:
        with open(temporary, "w") as file:
            yaml.dump(tree, file)
        after = config.flat(temporary)
    return {key: (before[key], value) for key, value in after.items() if before[key] != value}


def _merged(overlay: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    merged = OmegaConf.create(dict(overlay))
    for setting in settings:
        key, separator, text = setting.partition("=")
        if not separator or not re.fullmatch(r"[a-z_]\w*(\.\w+)?", key):
            raise config.ConfigError(f"--set: {setting!r} is not allowed, allowed: section.key=value")
        (value,) = config.parse(f"{key}: {text}", "--set").values()
        try:
            OmegaConf.update(merged, key, value, force_add=True)
        except OmegaConfBaseException as error:
            reason = " ".join(str(error).split())
            raise config.ConfigError(f"--set: {reason}, allowed: section.key=value") from None
    tree: Any = OmegaConf.to_container(merged, resolve=False)
    return {str(key): value for key, value in tree.items()}


def _round_trip() -> YAML:
    """A parser whose trees keep comments; it never folds lines."""
    yaml = YAML()
    yaml.Representer = _Representer
    yaml.preserve_quotes = True
    yaml.width = 2**16
    return yaml


def _write_values(section: CommentedMap, changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        old = section.get(key)
        if isinstance(value, dict) and isinstance(old, CommentedMap):
            _write_values(old, value)
        elif key not in section or old != value:
            section[key] = _styled(value, old)
            _move_comment(section, key)


def _styled(value: Any, old: Any) -> Any:
    """The value in YAML style: text quoted if needed, a list styled as the old one with its last comment."""
    if isinstance(value, str):
        return _quoted(value)
    if not isinstance(value, list):
        return value
    new = CommentedSeq(_styled(item, None) for item in value)
    if isinstance(old, CommentedSeq) and not old.fa.flow_style():
        if new and len(old) - 1 in old.ca.items:
            new.ca.items[len(new) - 1] = old.ca.items[len(old) - 1]
    else:
        new.fa.set_flow_style()
    return new


def _quoted(text: str) -> str:
    """The text, in quotes if YAML 1.1 would read it as another type (`yes`); ruamel writes YAML 1.2."""
    return SingleQuotedScalarString(text) if pyyaml.safe_dump(text).startswith("'") else text


def _move_comment(section: CommentedMap, key: str) -> None:
    """Put the comment two spaces after the new value; ruamel would keep its column."""
    *_, beside, _ = section.ca.items.get(key) or (None, None)
    if beside is not None and beside.value.startswith("#"):
        beside.start_mark.column = 0  # ruamel's minimum is one space
        beside.value = f" {beside.value}"
