"""Where a model type of transformers leaves the rule of `atr.vlm.families.rule`: one line each.

A type stands in the table once the equality checks of `atr.vlm.families.proof` hold for a tiny copy of it.
"""

from dataclasses import dataclass

from atr.vlm.families.grids import (
    Grids,
    Images,
    from_start,
    native_grids,
    run_per_image,
    until_end,
    until_tag,
)


@dataclass(frozen=True)
class Entry:
    """What cannot be asked of a model; the defaults are the rule."""

    grids: Grids = native_grids
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
    videos: bool = False
    """Whether videos beside the images are served; their tokens stay whole."""
    marked: bool = True
    """Whether token types are above 0 at an image's tokens; PaliGemma's tell a prompt from its answer."""
    whole: int = -1
    """Which of an image's tiles shows all of it: the last one, or 0, the first."""


_QWEN = Entry(videos=True)
_DEEP = Entry(levels="deepstack_features", videos=True)

TABLE = {
    "aya_vision": Entry(images=until_tag, tags="after"),
    "cohere2_vision": Entry(images=from_start, tags="before"),
    "ernie4_5_vl_moe": Entry(),
    "exaone4_5": Entry(positions=("contiguous",)),
    "gemma3": Entry(),
    "gemma4": Entry(),
    "glm46v": Entry(),
    "glm4v": Entry(),
    "glm_ocr": Entry(),
    "got_ocr2": Entry(),
    "hyperclovax_vision_v2": Entry(positions=("contiguous",)),
    "idefics3": Entry(images=until_tag, tags="after"),
    "internvl": Entry(),
    "kimi_k25": Entry(),
    "lfm2_vl": Entry(images=until_end, tags="after"),
    "lighton_ocr": Entry(),
    "minicpmv4_6": Entry(images=from_start, whole=0),
    "mistral3": Entry(tags="before"),
    "ovis2": Entry(images=from_start, tags="before", carried=("visual_indicator_features",), whole=0),
    "paddleocr_vl": Entry(),
    "paligemma": Entry(first=1, marked=False),
    "qwen2_5_vl": _QWEN,
    "qwen2_vl": _QWEN,
    "qwen3_5": _QWEN,
    "qwen3_5_moe": _QWEN,
    "qwen3_vl": _DEEP,
    "qwen3_vl_moe": _DEEP,
    "smolvlm": Entry(images=until_tag, tags="after"),
    "vipllava": Entry(),
}

CHECKED = Entry(levels="deepstack_features")
"""For a type outside the table that `atr check-family` has proven; the field need not be there."""
