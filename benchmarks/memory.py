"""Peak memory of `reduce` and `generate` at a kept fraction, against the untouched `generate`'s.

Small models of random weights read one image of about 3,000 visual tokens. Counted are torch's allocations on
the CPU while the call runs, in the order in which the profiler saw them, so that a number does not depend on
the machine; weights and inputs are not in it. The passes of the vision tower are counted as well.

    python -m benchmarks.memory
"""

from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from atr import reduce
from atr.reduction import FeatureSelector, Reducer
from atr.reduction.registry import build_reducer
from atr.vlm.compatibility import is_ruled
from benchmarks.random_llava import make_random_llava

GRID = (54, 56)
"""Rows and columns of Qwen's tokens: 3,024."""
SIDE = 800
"""Side in pixels of the image that LLaVA-NeXT cuts into tiles: 2,928 tokens."""
_IMAGE = 4
ANSWER = 3
"""Tokens of an answer."""
LAYERS = 3
"""Of a selector, as params.yaml has them."""


@dataclass(frozen=True)
class Peaks:
    """Bytes of the untouched `generate` and of ours, and how often ours ran the tower."""

    untouched: int
    reduced: int
    passes: int

    @property
    def ratio(self) -> float:
        """Ours over the untouched."""
        return self.reduced / self.untouched


def make_qwen(width: int = 256, layers: int = 4) -> tuple[Any, dict[str, Tensor]]:
    """A Qwen2.5-VL of random weights and the processed prompt of one image; `width` is a multiple of 64."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 64, "hidden_size": width, "intermediate_size": width * 11 // 4,
            "num_hidden_layers": layers, "num_attention_heads": width // 64,
            "num_key_value_heads": width // 64, "rope_parameters": rope, "pad_token_id": 0,
            "bos_token_id": 1, "eos_token_id": 2,
        },
        vision_config={
            "depth": 4, "hidden_size": width // 2, "num_heads": width // 64, "intermediate_size": width,
            "out_hidden_size": width, "fullatt_block_indexes": [1, 3],
        },
        image_token_id=_IMAGE, vision_start_token_id=5, vision_end_token_id=6, video_token_id=7,
    )  # fmt: skip
    rows, columns = GRID
    ids = _prompt([5] + [_IMAGE] * rows * columns + [6])
    pixels = torch.randn(4 * rows * columns, 3 * 2 * config.vision_config.patch_size**2)
    return Qwen2_5_VLForConditionalGeneration(config).eval(), ids | {
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 2 * rows, 2 * columns]]),
        "mm_token_type_ids": (ids["input_ids"] == _IMAGE).long(),
    }


def make_llava_next(width: int = 256, layers: int = 4) -> tuple[Any, dict[str, Tensor]]:
    """A LLaVA-NeXT of random weights and the processed prompt of one image."""
    model = make_random_llava("llava_next", width, layers)
    side = model.config.vision_config.image_size
    tiles = {"pixel_values": torch.randn(1, 5, 3, side, side), "image_sizes": torch.tensor([[SIDE, SIDE]])}
    with torch.no_grad():
        (packed,) = model.get_image_features(**tiles, return_dict=True).pooler_output
    return model, _prompt([_IMAGE] * len(packed)) | tiles


MODELS = {"qwen2_5_vl": make_qwen, "llava_next": make_llava_next}


def make_selector(model: Any) -> FeatureSelector:
    """A selector of random weights, as deep as the pipeline's, for the features that the model reads."""
    torch.manual_seed(0)
    if is_ruled(model):
        width, grid, layer = model.config.get_text_config().hidden_size, GRID, "merged"
    else:
        vision = model.config.vision_config
        side = vision.image_size // vision.patch_size
        width, grid, layer = vision.hidden_size, (side, side), model.config.vision_feature_layer
    return FeatureSelector(width, grid, layers=LAYERS, heads=width // 64, layer=layer).eval()


def _prompt(image: list[int]) -> dict[str, Tensor]:
    ids = torch.tensor([[10, 11, *image, *range(12, 20)]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def compare(model: Any, inputs: Mapping[str, Any], reducer: Reducer | FeatureSelector, keep: float) -> Peaks:
    """The peaks of both sides, each after a run that warms it up, and ours' passes of the tower."""
    untouched = partial(generate, model, inputs)

    def reduced() -> None:
        generate(model, reduce(model, inputs, reducer, keep))

    return Peaks(peak(untouched), peak(reduced), count_passes(model, reduced))


@torch.no_grad()
def generate(model: Any, inputs: Mapping[str, Any]) -> None:
    """A greedy answer of ANSWER tokens."""
    model.generate(**inputs, do_sample=False, min_new_tokens=ANSWER, max_new_tokens=ANSWER)


@torch.no_grad()
def peak(call: Callable[[], object]) -> int:
    """Most bytes that a call has allocated at once."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    held = most = 0
    assert profiler.profiler is not None
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def count_passes(model: Any, call: Callable[[], object]) -> int:
    """How often a call runs the vision tower."""
    tower = model.model.visual if hasattr(model.model, "visual") else model.model.vision_tower
    passes: list[int] = []
    hook = tower.register_forward_hook(lambda *call: passes.append(1))
    try:
        call()
    finally:
        hook.remove()
    return len(passes)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one row per model and reducer."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--reducers", nargs="+", default=["selector", "l2_norm", "class_attention"])
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--width", type=int, default=256, help="of the language model, a multiple of 64")
    parser.add_argument("--layers", type=int, default=4, help="of the language model")
    options = parser.parse_args(arguments)
    for name in options.models:
        model, inputs = MODELS[name](options.width, options.layers)
        for reducer in options.reducers:
            built: Any = make_selector(model) if reducer == "selector" else build_reducer(reducer)
            peaks = compare(model, inputs, built, options.keep)
            sizes = " / ".join(f"{size / 2**20:.1f} MiB" for size in (peaks.reduced, peaks.untouched))
            print(f"{name}, {reducer} at {options.keep}: {sizes} = {peaks.ratio:.3f}; ", end="")
            print(f"the tower runs {peaks.passes} time(s)", flush=True)


if __name__ == "__main__":
    main()
