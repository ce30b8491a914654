"""Visual tokens as a language model is fed them, and the patches of the vision tower behind each.

Outside LLaVA a token is made of several patches: a block of 2 x 2, 3 x 3 or 4 x 4 of them. Each tower leaves
its patches in an order of its own; here those of a block are averaged, in the order of the tokens.
Shapes: see atr.core.tokens; B images or tiles, N tokens of one in raster order, P patches of all of them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from atr.core.ragged import Grid
from atr.core.tower_layer import MERGED, TowerLayer
from atr.features.attention_hooks import CLASS_TOKENS, layers_to_run, leading_tokens, tower_layer
from atr.features.token_grids import (
    Inputs,
    block_grids,
    image_arguments,
    merge_size,
    patch_grids,
    patch_side,
)


def encode_images(
    model: Any, inputs: Inputs, layer: TowerLayer | None, grids: Sequence[Grid] | None = None
) -> tuple[Any, list[Tensor] | None]:
    """The output of the model's `get_image_features`, and patches at `layer` as `pooled_states` gives them.

    One forward of the tower gives both. The second is None if `layer` is None or "merged": then features are
    the output's own tokens. Arguments and errors as in `pooled_states`.
    """
    if layer is None or isinstance(layer, str):
        return image_features(model, inputs), None
    patches = patches_of(model.config.model_type, layer)
    states: list[Tensor] = []
    with _read_layer(model, layer, states.append):
        output = image_features(model, inputs)
    return output, patches.pool(model, inputs, states[0], grids)


def pooled_states(
    model: Any, inputs: Inputs, layer: int, grids: Sequence[Grid] | None = None
) -> list[Tensor]:
    """Patches after `layer` of the tower, averaged over the block of each token; (N, D) per image or tile.

    `layer` is an index into `hidden_states`: 1 is the output of the first layer, -1 that of the last, before
    a final norm. The tower stops there. `grids` (rows, columns) of the tokens of each image or tile, in the
    order of the pixels, are by default those of `token_grids`. Raises ValueError for a layer that the tower
    lacks, and for a type of model that is not in PATCHES.
    """
    patches = patches_of(model.config.model_type, layer)
    states: list[Tensor] = []

    def stop(state: Tensor) -> None:
        states.append(state)
        raise _Reached

    with suppress(_Reached), _read_layer(model, layer, stop):
        image_features(model, inputs)
    return patches.pool(model, inputs, states[0], grids)


def token_grids(model: Any, inputs: Inputs) -> list[Grid]:
    """(rows, columns) of the tokens of each image or tile; raises ValueError for a type not in PATCHES."""
    patches = patches_of(model.config.model_type, MERGED)
    return block_grids(model, inputs, patches.block(model.config))


def image_features(model: Any, inputs: Inputs) -> Any:
    """The output of `get_image_features` for those of `inputs` that it takes, as `generate` calls it."""
    known = image_arguments(model)
    images = {key: value for key, value in inputs.items() if key in known}
    return model.base_model.get_image_features(**images, return_dict=True)


def vision_tower(model: Any) -> Any:
    """The vision tower of a model; None if its language model reads the patches themselves."""
    base, names = model.base_model, ("visual", "vision_tower", "vision_model", "vision_encoder")
    return next((getattr(base, name) for name in names if hasattr(base, name)), None)


class _Reached(Exception):
    """Ends a forward at the layer that is read."""


@contextmanager
def _read_layer(model: Any, layer: int, read: Callable[[Tensor], None]) -> Iterator[None]:
    """Call `read` with the output of `layer` of the tower in each forward in the block."""
    tower = vision_tower(model)
    layers_to_run(model.config.model_type, layer, tower.config.num_hidden_layers)
    hook = tower_layer(tower, layer).register_forward_hook(
        lambda module, args, output: read(output[0] if isinstance(output, tuple) else output)
    )
    try:
        yield
    finally:
        hook.remove()


@dataclass(frozen=True)
class Patches:
    """How a type of model makes tokens of patches."""

    split: Callable[[Any, Inputs, Tensor, Sequence[Grid], int], list[Tensor]]
    """A layer's output as patches of each image, (N, block * block, D)."""
    block: Callable[[Any], int] = merge_size
    """Patches along a side of a token, from the model's configuration."""

    @property
    def is_ragged(self) -> bool:
        """Whether images have grids of their own."""
        return self.split is not _from_tiles

    def pool(self, model: Any, inputs: Inputs, state: Tensor, grids: Sequence[Grid] | None) -> list[Tensor]:
        """Mean of the patches of each token, from a layer's output."""
        block = self.block(model.config)
        grids = block_grids(model, inputs, block) if grids is None else grids
        return [patches_NPD.mean(1) for patches_NPD in self.split(model, inputs, state, grids, block)]


def patches_of(kind: str, layer: TowerLayer) -> Patches:
    """The entry of PATCHES; raises ValueError naming the type of model."""
    if kind not in PATCHES:
        allowed = f"{MERGED}, or an int for {', '.join(PATCHES)}"
        raise ValueError(f"layer: {layer} is not available from a model of type {kind}, allowed: {allowed}")
    return PATCHES[kind]


def _from_blocks(
    model: Any, inputs: Inputs, state_PD: Tensor, grids: Sequence[Grid], block: int
) -> list[Tensor]:
    """Patches of a token follow one another, and so do tokens and images."""
    patches = state_PD.reshape(-1, block * block, state_PD.shape[-1])
    return list(torch.split(patches, [rows * columns for rows, columns in grids]))


def _from_windows(
    model: Any, inputs: Inputs, state_PD: Tensor, grids: Sequence[Grid], block: int
) -> list[Tensor]:
    """As `_from_blocks`, with the tokens in the order of the tower's attention windows."""
    patches = state_PD.reshape(-1, block * block, state_PD.shape[-1])
    places_N = raster_places(model.config.vision_config, inputs["image_grid_thw"], block)
    return _from_blocks(model, inputs, patches[places_N.to(patches.device)], grids, block)


def raster_places(vision: Any, grid_thw: Tensor, block: int) -> Tensor:
    """Where the tokens, image by image in raster order, are among the attention windows; int64 (N,).

    `vision` is the configuration of a tower of Qwen2.5-VL, `grid_thw` (images, 3) counts patches.
    """
    # Imported here, because importing a model of another family does not import it.
    from transformers.vision_utils import get_vision_window_index

    order_N, _ = get_vision_window_index(grid_thw, block, vision.window_size, patch_side(vision))
    places_N: Tensor = order_N.argsort()
    return places_N


def _from_tiles(
    model: Any, inputs: Inputs, state_BTD: Tensor, grids: Sequence[Grid], block: int
) -> list[Tensor]:
    """Patches of a tile in raster order, after class and register tokens."""
    config = vision_tower(model).config
    extra = leading_tokens(config)[1] if config.model_type in CLASS_TOKENS else 0
    assert len(grids) == len(state_BTD), f"{len(state_BTD)} tiles, not {len(grids)}"
    return [
        _blocks(state_TD[extra:], grid, grid[1] * block, block)
        for state_TD, grid in zip(state_BTD, grids, strict=True)
    ]


def _from_rasters(
    model: Any, inputs: Inputs, state: Tensor, grids: Sequence[Grid], block: int
) -> list[Tensor]:
    """Patches of an image in raster order; the images follow one another."""
    sizes = patch_grids(model, inputs)
    images = torch.split(state.flatten(0, -2), [rows * columns for rows, columns in sizes])
    return [
        _blocks(image, grid, columns, block)
        for image, grid, (_, columns) in zip(images, grids, sizes, strict=True)
    ]


def _from_padded(
    model: Any, inputs: Inputs, state_BTD: Tensor, grids: Sequence[Grid], block: int
) -> list[Tensor]:
    """Patches of an image in raster order, padded at the end."""
    return [
        _blocks(state_TD[: rows * columns * block**2], (rows, columns), columns * block, block)
        for state_TD, (rows, columns) in zip(state_BTD, grids, strict=True)
    ]


def _blocks(patches_PD: Tensor, grid: Grid, columns: int, block: int) -> Tensor:
    """Patches in raster order, `columns` in a row, by token; (N, block * block, D).

    Rows and columns after the last whole block belong to no token.
    """
    width = patches_PD.shape[-1]
    patches = patches_PD.reshape(-1, columns, width)[: grid[0] * block, : grid[1] * block]
    blocks = patches.reshape(grid[0], block, grid[1], block, width)
    return blocks.transpose(1, 2).reshape(-1, block * block, width)


def _gemma3_block(config: Any) -> int:
    vision = config.vision_config
    return int(vision.image_size // vision.patch_size // isqrt(config.mm_tokens_per_image))


def _tiled(block: Callable[[Any], int] = merge_size) -> Patches:
    return Patches(_from_tiles, block)


_BLOCKS = Patches(_from_blocks)
_PADDED = Patches(_from_padded)
_RASTERS = Patches(_from_rasters)
_WINDOWS = Patches(_from_windows)

PATCHES = {
    "qwen2_vl": _BLOCKS,
    "qwen2_5_vl": _WINDOWS,
    "qwen3_vl": _BLOCKS,
    "qwen3_vl_moe": _BLOCKS,
    "qwen3_5": _BLOCKS,
    "qwen3_5_moe": _BLOCKS,
    "gemma3": _tiled(_gemma3_block),
    "gemma4": _PADDED,
    "paligemma": _tiled(lambda config: 1),
    "internvl": _tiled(lambda config: round(1 / config.downsample_ratio)),
    "smolvlm": _tiled(lambda config: int(config.scale_factor)),
    "idefics3": _tiled(lambda config: int(config.scale_factor)),
    "mistral3": _RASTERS,
    "lighton_ocr": _RASTERS,
    "aya_vision": _tiled(),
    "cohere2_vision": _tiled(),
    "ovis2": _tiled(lambda config: int(config.vision_config.hidden_stride)),
    "glm4v": _BLOCKS,
    "glm46v": _BLOCKS,
    "glm_ocr": _BLOCKS,
    "ernie4_5_vl_moe": _BLOCKS,
    "paddleocr_vl": _RASTERS,
    "lfm2_vl": _PADDED,
    "kimi_k25": _RASTERS,
    "exaone4_5": _WINDOWS,
    "hyperclovax_vision_v2": _WINDOWS,
}
"""By type of model; for all others a layer is refused."""
