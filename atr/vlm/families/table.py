"""Where a model type of transformers leaves the rule of `atr.vlm.families.rule`: one line each.

A type stands in the table once the equality checks of `atr.vlm.families.proof` hold for a tiny copy of it.
"""

from dataclasses import dataclass

from atr.vlm.families.grids import (
    Grids,
    Images,
    last_tag,
    packed_grids,
    run_per_image,
    sized_grids,
    square_grids,
)


@dataclass(frozen=True)
class Entry:
    """What cannot be asked of a model; the defaults are the rule."""

    grids: Grids = square_grids
    """The grid of tokens of each tile, in the order of the placeholders."""
    images: Images = run_per_image
    """How many tiles each image has, from the runs of its placeholders."""
    levels: str = ""
    """Field of the encoder's output with further features of each token, one list of images per layer."""
    carried: tuple[str, ...] = ()
    """Fields of the encoder's output that go on unchanged."""
    first: int = 0
    """Number of the first position."""
    tags: str = ""
    """Tokens between two runs of placeholders of an image belong to the run "before" or "after" them."""
    positions: tuple[str, ...] = ("original", "contiguous")
    """Position ids that the model respects."""


_PACKED = Entry(grids=packed_grids)
_DEEP = Entry(grids=packed_grids, levels="deepstack_features")

TABLE = {
    "gemma3": Entry(),
    "internvl": Entry(),
    "mistral3": Entry(grids=sized_grids, tags="before"),
    "paligemma": Entry(first=1),
    "qwen2_5_vl": _PACKED,
    "qwen2_vl": _PACKED,
    "qwen3_vl": _DEEP,
    "qwen3_vl_moe": _DEEP,
    "smolvlm": Entry(images=last_tag, tags="after"),
    "vipllava": Entry(),
}
