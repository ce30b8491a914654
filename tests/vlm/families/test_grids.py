import pytest
import torch

from atr.vlm.families import family_of
from atr.vlm.families.grids import PlaceholderRun, find_runs, from_start, run_per_image, until_end, until_tag
from atr.vlm.families.proof import HalfByFeature
from atr.vlm.families.rule import Rule
from atr.vlm.families.table import TABLE
from atr.vlm.families.tiny import tiny_config, tiny_inputs, tiny_model
from atr.vlm.families.tiny_pixels import TINY_IMAGES
from atr.vlm.reduce import prepare, reduce

NATIVE = [
    "ernie4_5_vl_moe", "exaone4_5", "gemma4", "glm46v", "glm4v", "glm_ocr", "hyperclovax_vision_v2",
    "kimi_k25", "lighton_ocr", "mistral3", "paddleocr_vl", "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_5_moe",
    "qwen3_vl",
    "qwen3_vl_moe",
]  # fmt: skip
TILED = ["aya_vision", "cohere2_vision", "idefics3", "internvl", "ovis2", "smolvlm"]


def model_of(model_type):
    return tiny_model(tiny_config(model_type))


@pytest.mark.parametrize("model_type", NATIVE)
def test_an_image_of_its_own_size_is_one_tile_of_that_grid(model_type):
    model = model_of(model_type)
    tiling = family_of(model).tiling(model, tiny_inputs(model, ((0,), (), (3, 1))))
    assert tiling.grids == (TINY_IMAGES[0], TINY_IMAGES[3], TINY_IMAGES[1])
    assert tiling.tiles == (1, 1, 1)


@pytest.mark.parametrize("model_type", TILED)
def test_tiles_are_grouped_into_images(model_type):
    model = model_of(model_type)
    tiling = family_of(model).tiling(model, tiny_inputs(model, ((0,), (1, 2), (), (3,))))
    assert tiling.tiles == tuple(TINY_IMAGES[image][1] for image in (0, 1, 2, 3))
    assert set(tiling.grids) == {(3, 3)}


def test_tiles_of_several_grids_are_grouped_into_images():
    """Two tiles and the whole image, behind an image of one tile; the reverse in MiniCPM-V."""
    lfm2, minicpm = model_of("lfm2_vl"), model_of("minicpmv4_6")
    rows = ((1, 0), (0,))
    found = family_of(lfm2).tiling(lfm2, tiny_inputs(lfm2, rows))
    assert found.tiles == (1, 3, 3)
    assert found.grids == (TINY_IMAGES[1], *((2, 2), (2, 2), TINY_IMAGES[0]) * 2)
    found = family_of(minicpm).tiling(minicpm, tiny_inputs(minicpm, rows))
    assert found.tiles == (1, 3, 3)
    assert found.grids == (TINY_IMAGES[1], *(TINY_IMAGES[0], (2, 2), (1, 2)) * 2)


@pytest.mark.parametrize("model_type", sorted(TABLE))
@torch.no_grad()
def test_tokens_of_a_grid_are_in_raster_order(model_type):
    """Other pixels of one token change that token more than any other, though all patches see each other."""
    model = model_of(model_type)
    inputs = tiny_inputs(model, ((0,),))
    own = prepare(model, inputs).tokens.images[0]
    for kind, grid, first in changed_tokens(model, inputs):
        moved = (prepare(model, kind).tokens.images[0] - own).abs().amax(-1)
        assert int(moved.argmax()) == first, grid


def changed_tokens(model, inputs):
    """Inputs with the pixels of one token changed, its (row, column) and its expected number."""
    tiling = family_of(model).tiling(model, inputs)
    rows, columns = tiling.grids[0]
    for row, column in ((0, columns - 1), (rows - 1, 0), (rows - 1, columns - 1)):
        pixels = inputs["pixel_values"].clone()
        paint(model, inputs, pixels, (rows, columns), (row, column))
        yield {**inputs, "pixel_values": pixels}, (row, column), row * columns + column


def paint(model, inputs, pixels, grid, place):
    """Change the pixels of the token at `place` in the first tile, in place."""
    (rows, columns), (row, column) = grid, place
    if "image_grid_thw" in inputs:  # merge blocks in raster order, except towers without blocks
        _, high, wide = inputs["image_grid_thw"][0].tolist()
        merge = high // rows
        if model.config.model_type == "paddleocr_vl" or model.config.model_type == "kimi_k25":
            patches = pixels[: high * wide].view(high, wide, *pixels.shape[1:])
            patches[row * merge : (row + 1) * merge, column * merge : (column + 1) * merge].mul_(-20)
        else:
            block = (row * columns + column) * merge**2
            pixels[block : block + merge**2].mul_(-20)
    elif "spatial_shapes" in inputs or "image_position_ids" in inputs:
        is_shaped = "spatial_shapes" in inputs
        places = inputs["image_position_ids"][0] if not is_shaped else None
        high, wide = (
            inputs["spatial_shapes"][0].tolist() if is_shaped else (places.amax(0) + 1).flip(0).tolist()
        )
        patches = pixels[0, : high * wide].view(high, wide, -1)
        merge = high // rows
        patches[row * merge : (row + 1) * merge, column * merge : (column + 1) * merge].mul_(-20)
    elif "target_sizes" in inputs:
        high, wide = inputs["target_sizes"][0].tolist()
        side = pixels.shape[2]
        strip = pixels[0, :, :, : high * wide * side].unflatten(-1, (high, wide, side))
        merge = high // rows
        strip[:, :, row * merge : (row + 1) * merge, column * merge : (column + 1) * merge].mul_(-20)
    else:
        tile = pixels[(0,) * (pixels.ndim - 3)]
        side = (
            tile.shape[-1] // columns
            if "image_sizes" not in inputs
            else inputs["image_sizes"][0][1] // columns
        )
        tile[:, row * side : (row + 1) * side, column * side : (column + 1) * side].mul_(-20)


def test_runs_know_their_neighbours():
    ids_BL = torch.tensor([[9, 9, 1, 9], [2, 9, 3, 3], [4, 4, 4, 9]])
    assert find_runs(ids_BL, ids_BL == 9) == [
        PlaceholderRun(0, 2, -1, 1), PlaceholderRun(0, 1, 1, -1), PlaceholderRun(1, 1, 2, 3),
        PlaceholderRun(2, 1, 4, -1),
    ]  # fmt: skip


def test_images_are_told_by_tags_ends_and_starts():
    def runs(*borders):
        return [PlaceholderRun(0, 4, before, after) for before, after in borders]

    grids = [(2, 2)] * 5
    tagged = runs((1, 0), (1, 0), (7, 0), (1, 0), (7, 0))
    assert until_tag(tagged, grids) == [3, 2]
    ended = runs((0, 1), (0, 1), (0, 7), (0, 7), (0, 7))
    assert until_end(ended, grids) == [3, 1, 1]
    started = runs((7, 0), (1, 0), (7, 0), (7, 0), (1, 0))
    assert from_start(started, grids) == [2, 1, 2]
    assert run_per_image(started, grids) == [1] * 5


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "lfm2_vl", "gemma4", "minicpmv4_6", "mistral3"])
def test_sizes_that_are_missing_are_named(model_type):
    model = model_of(model_type)
    inputs = tiny_inputs(model, ((0,),))
    (key,) = {"image_grid_thw", "spatial_shapes", "image_position_ids", "target_sizes", "image_sizes"} & set(
        inputs
    )
    del inputs[key]
    with pytest.raises(ValueError, match=f"inputs: {key} is missing"):
        prepare(model, inputs)


@pytest.mark.parametrize(
    "model_type", ["smolvlm", "mistral3", "lfm2_vl", "cohere2_vision", "aya_vision", "ovis2"]
)
def test_tags_follow_their_tiles_or_rows(model_type):
    """One token is kept of an image of several runs: the tags between the others go with them."""
    model = model_of(model_type)
    inputs = tiny_inputs(model, ((0,),))
    family = family_of(model)
    assert isinstance(family, Rule) and family.entry.tags
    kept, followed = (
        reduce(model, inputs, HalfByFeature(), 1, newline=newline)["input_ids"]
        for newline in ("keep", "follow")
    )
    runs = find_runs(inputs["input_ids"], inputs["input_ids"] == model.config.image_token_id)
    gone = kept.shape[1] - followed.shape[1]
    assert len(runs) > 1
    assert len(runs) - 2 <= gone <= len(runs) - 1
    assert (followed == model.config.image_token_id).sum() == 1
