"""What is known of each supported model type, measured on its tiny copy, and which are not supported."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from atr.core.ragged import Grid
from atr.features.token_grids import patch_grids
from atr.vlm.families import family_of, supported_types
from atr.vlm.families.base import Tiling
from atr.vlm.families.checked import checked_types
from atr.vlm.families.exactness import why_not_exact
from atr.vlm.families.rule import Rule
from atr.vlm.families.tiny import load_config, tiny_config, tiny_model
from atr.vlm.families.tiny_inputs import tiny_inputs
from atr.vlm.families.tower import TowerFamily
from atr.vlm.families.videos import video_keys
from atr.vlm.sequence import has_axes, token_types
from atr.vlm.tiling import TileLayout

PROVEN_IN = "5.23.0"
"""The version of transformers with which the tests prove every built-in type."""
SIGNALS = {"attention_BN": "attention", "keys_BND": "keys", "pixels_BCHW": "pixels"}
"""Optional fields of EncoderOutput that a family may give, by their names in the table."""
_ROWS = ((0,), (1, 2))
_LONGEST = 1 << 60
"""Tokens of a prompt that is longer than any sliding window."""


@dataclass(frozen=True)
class Summary:
    """A supported model type.

    `patches` are merged into one token. `layout` says how images become grids of tokens, `needs` which token
    types the inputs must have, `scores` what a reducer can be given, `refused` what is refused by name,
    `removed` why removing a token is not masking it (empty if it is), `proven` in which version of
    transformers the equality checks hold. Of a type without a tiny copy only the name is known.
    """

    model_type: str
    proven: str
    patches: str = "?"
    layout: str = "?"
    needs: str = ""
    scores: str = ""
    refused: str = ""
    removed: str = "?"


@dataclass(frozen=True)
class Others:
    """Model types of transformers that are not supported: `untried` ones have the hook, `without` lack it."""

    untried: tuple[str, ...]
    without: tuple[str, ...]


def summarise_family(model_type: str) -> Summary:
    """What a supported type is, found by running its tiny copy."""
    proven = _proven(model_type)
    try:
        model = tiny_model(tiny_config(model_type))
        inputs = tiny_inputs(model, _ROWS)
    except ValueError:  # a user's own architecture
        return Summary(model_type, proven)
    family = family_of(model)
    tiling = family.tiling(model, inputs)
    return Summary(
        model_type,
        proven,
        _patches(model, inputs, tiling),
        _describe_layout(model, tiling),
        ", ".join(sorted(token_types(model))),
        ", ".join(_scores(model, inputs, tiling)),
        ", ".join(_refused(model)),
        _removed(model),
    )


def built_in_types() -> list[str]:
    """The supported types that are no entry points of other packages."""
    return [name for name in supported_types() if not entry_points(group="atr.families", name=name)]


def find_others(supported: Collection[str]) -> Others:
    """The vision-language models of transformers outside `supported`, by the source of their classes."""
    hooked = _classes_with_hook()
    others = {
        model_type: class_name in hooked
        for model_type, class_name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items()
        if model_type not in supported
    }
    return Others(*(tuple(sorted(key for key in others if others[key] == has)) for has in (True, False)))


def _classes_with_hook() -> set[str]:
    """Classes of transformers whose `forward` names `mm_encoder_outputs`; none is imported."""
    models = Path(transformers.__file__).parent / "models"
    return {
        part.partition("(")[0]
        for path in models.glob("*/modeling_*.py")
        for part in path.read_text(encoding="utf-8").split("\nclass ")[1:]
        if "mm_encoder_outputs:" in part
    }


def _proven(model_type: str) -> str:
    """The version of transformers with which a type is proven, and by whom, in words."""
    installed = version("transformers")
    if model_type in checked_types():
        return f"{installed}, by check-family"
    if model_type not in built_in_types():
        return "no"
    return PROVEN_IN if installed == PROVEN_IN else f"{PROVEN_IN}, not {installed}"


def _removed(model: Any) -> str:
    """Whether removing a token is masking it; windows are those of the type's default configuration."""
    if reason := why_not_exact(model, 0):
        kinds = reason.partition(" layers are ")[2].partition(",")[0]
        return f"no: {kinds} layers mix neighbouring tokens"
    default = SimpleNamespace(config=load_config(model.config.model_type))
    if reason := why_not_exact(default, _LONGEST):
        return f"in prompts within {reason.partition(' is ')[0]}"
    return "yes"


def _patches(model: Any, inputs: Mapping[str, Tensor], tiling: Tiling) -> str:
    """Patches of a token; a user's own family need not know them."""
    family = family_of(model)
    if isinstance(family, Rule):
        return str(_count(patch_grids(model, inputs)) // _count(tiling.grids))
    return "1" if isinstance(family, TowerFamily) else "?"


def _count(grids: Sequence[Grid]) -> int:
    return sum(rows * columns for rows, columns in grids)


def _describe_layout(model: Any, tiling: Tiling) -> str:
    layout, family = TileLayout(model, tiling), family_of(model)
    grid = "one square grid" if len(set(tiling.grids)) == 1 else "a grid of the image's shape"
    if max(tiling.tiles) > 1:
        grid = "square tiles" if len(set(tiling.grids)) == 1 else "tiles of the image's shape"
    parts = [grid]
    if layout.lengths != layout.sizes:
        parts.append("newlines")
    if isinstance(family, Rule) and family.entry.tags:
        parts.append(f"tags that go with the run {family.entry.tags} them")
    if has_axes(model):
        parts.append("positions by row and column")
    return ", ".join(parts)


@torch.no_grad()
def _scores(model: Any, inputs: Mapping[str, Tensor], tiling: Tiling) -> list[str]:
    """What the family gives to a reducer beside the features that the model reads."""
    family, found = family_of(model), []
    wanted: dict[str, dict[str, Any]] = {"layers": {"layer": 1}}
    wanted |= {name: {"needs": frozenset({field})} for field, name in SIGNALS.items()}
    for name, options in wanted.items():
        try:
            family.encode(model, inputs, tiling, **options)
        except ValueError:
            continue
        found.append(name)
    return found


def _refused(model: Any) -> list[str]:
    """What the family refuses by name."""
    family = family_of(model)
    refused = [] if video_keys(model) else ["videos"]
    if isinstance(family, Rule):
        refused += [] if "original" in family.entry.positions else ["original positions"]
        refused += ["merging reducers"] if family.entry.levels else []
    return refused
