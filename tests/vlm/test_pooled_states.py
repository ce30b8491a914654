"""Patches averaged by token stand where the language model's tokens do, in every type that has them."""

from itertools import product
from random import Random

import pytest
import torch
from torch import nn

from atr.features.attention_hooks import tower_layer
from atr.features.merged import PATCHES, encode_images, token_grids, vision_tower
from atr.vlm.families import family_of
from atr.vlm.families.tiny import tiny_config, tiny_inputs, tiny_model

SIDE = 4  # of a tiny model's patch, in pixels
FIRST = {
    "qwen2_5_vl",
    "qwen3_vl",
    "gemma4",
    "lfm2_vl",
    "smolvlm",
    "mistral3",
    "paddleocr_vl",
}  # each way of merging


def without_mixing(kind):
    """A tiny model in which no layer of the tower moves anything from one patch to another."""
    model = tiny_model(tiny_config(kind))
    tower = vision_tower(model)
    with torch.no_grad():
        for layer in range(1, tower.config.num_hidden_layers + 1):
            for module in tower_layer(tower, layer).modules():
                if isinstance(module, nn.Linear):
                    for weight in module.parameters():
                        weight.zero_()
    return model


def patches(pixels):
    """Places of single patches in the processor's pixels, without tiles and patches that are padding."""
    squares = [slice(start, start + SIDE) for start in range(0, pixels.shape[-1], SIDE)]
    if pixels.ndim < 4 or pixels.shape[-1] == SIDE:  # cut into patches: (P, ...) or (images, P, ...)
        places = product(*map(range, pixels.shape[: 2 if pixels.ndim == 3 else 1]))
    else:
        places = product(*map(range, pixels.shape[:-3]), [slice(None)], squares, squares)
    return [place for place in places if pixels[place].any()]


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in FIRST else pytest.mark.exhaustive) for kind in PATCHES]
)
@torch.inference_mode()
def test_a_patch_changes_token_and_mean_at_the_same_place(kind):
    model = without_mixing(kind)
    inputs = tiny_inputs(model, ((0,), (1, 2)))
    grids = family_of(model).tiling(model, inputs).grids
    assert token_grids(model, inputs) == list(grids)

    def read(inputs):
        output, states = encode_images(model, inputs, 2)
        tokens = output.pooler_output
        if not isinstance(tokens, torch.Tensor):
            tokens = torch.cat([image.flatten(0, -2) for image in tokens])
        return tokens.flatten(0, -2), torch.cat(states)

    before, seen = read(inputs), set()
    assert len(before[0]) == len(before[1]) == sum(rows * columns for rows, columns in grids)
    places = patches(inputs["pixel_values"])
    for place in Random(0).sample(places, min(40, len(places))):
        pixels = inputs["pixel_values"].clone()
        pixels[place] += 1
        after = read(inputs | {"pixel_values": pixels})
        changed = [(one != other).any(1).nonzero() for one, other in zip(before, after, strict=True)]
        assert torch.equal(*changed) and len(changed[0]) == 1
        seen.add(int(changed[0]))
    assert len(seen) > 10
