"""Grids from what an image processor says of sizes; tests/vlm/families/test_grids.py has every model type."""

from types import SimpleNamespace

import pytest
import torch

from atr.features.token_grids import count_tiles, merge_size, real_tiles


def config(**own):
    return SimpleNamespace(**{"vision_config": SimpleNamespace(), "model_type": "mine", **own})


def test_blank_tiles_that_pad_a_row_do_not_count():
    pixels = torch.zeros(2, 3, 1, 2, 2)
    pixels[0, :2], pixels[1, 0] = 1, 2
    assert count_tiles(pixels) == 3
    assert real_tiles(pixels)[:, 0, 0, 0].tolist() == [1, 1, 2]
    assert count_tiles(torch.zeros_like(pixels)) == 1
    assert count_tiles(torch.zeros(2, 1, 2, 2)) == 2


def test_patches_of_a_token_are_those_of_the_configuration():
    assert merge_size(config(downsample_factor=2)) == 2
    assert merge_size(config(vision_config=SimpleNamespace(merge_kernel_size=[3, 3]))) == 3
    assert merge_size(config(spatial_merge_size=2, merger_times=1, downsample_mode="16x")) == 4
    assert merge_size(config(spatial_merge_size=2, merger_times=2, downsample_mode="4x")) == 4
    with pytest.raises(ValueError, match=r"^model type 'mine': its config does not say how patches"):
        merge_size(config())
