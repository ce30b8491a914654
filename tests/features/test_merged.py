"""Merged tokens and the patches behind them: values, order, one pass over the tower."""

from copy import deepcopy

import pytest
import torch
from PIL import Image
from torch import nn

from atr.features.attention_hooks import tower_layer
from atr.features.encoder import Encoder
from atr.features.merged import encode_images, image_features, pooled_states, token_grids, vision_tower

BLOCKS = {  # patches along a side of a token
    "qwen2_vl": 2, "qwen2_5_vl": 2, "qwen3_vl": 2, "qwen3_5": 2, "gemma3": 2, "gemma4": 2, "internvl": 2,
    "paligemma": 1, "smolvlm": 3, "idefics3": 2, "mistral3": 2,
}  # fmt: skip
FAST = ("qwen2_5_vl", "qwen3_vl", "gemma3", "gemma4", "internvl", "smolvlm", "mistral3")
"""Each way of merging, and of passing tiles."""
ONE_SIZE = {"gemma3", "paligemma", "internvl", "smolvlm", "idefics3"}


def grids_of(kind):
    """Grids of tokens at which no image of the kind is resized."""
    if kind in ONE_SIZE:
        side = 6 // BLOCKS[kind]
        return [(side, side), (side, side)]
    return [(7, 10), (14, 5)] if kind == "gemma4" else [(3, 4), (4, 3), (1, 2), (3, 3)]


def noise(seed, grid, side):
    """A random picture of `grid` tokens of `side` pixels."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (grid[0] * side, grid[1] * side, 3), generator=generator)
    return Image.fromarray(pixels.byte().numpy())


@pytest.fixture(
    params=[kind if kind in FAST else pytest.param(kind, marks=pytest.mark.exhaustive) for kind in BLOCKS]
)
def host(request, hosts):
    """Kind, model, pictures of several grids, and the processor's tensors of pictures."""
    model, folder = hosts(request.param)
    processor = Encoder.load(str(folder), "merged").image_processor
    side = 14 * BLOCKS[request.param]
    pictures = [noise(seed, grid, side) for seed, grid in enumerate(grids_of(request.param))]
    keep = {"do_resize": False} if request.param in ONE_SIZE else {}  # Idefics3 resizes twice
    return request.param, model, pictures, lambda images: processor(images, return_tensors="pt", **keep)


def without_mixing(model):
    """A copy in which no layer of the tower moves anything from one patch to another."""
    model = deepcopy(model)
    with torch.no_grad():
        for layer in range(1, 4):
            for module in tower_layer(vision_tower(model), layer).modules():
                if isinstance(module, nn.Linear):
                    module.weight.zero_()
                    if module.bias is not None:
                        module.bias.zero_()
    return model


def tokens_of(kind, model, inputs):
    """The tokens of each image; Idefics3 and SmolVLM give those of a row of images in one."""
    output = image_features(model, inputs).pooler_output
    tokens = torch.cat([value.reshape(-1, value.shape[-1]) for value in output])
    return tokens.split([rows * columns for rows, columns in grids_of(kind)])


@torch.inference_mode()
def test_grids_are_those_of_the_tokens(host):
    kind, model, pictures, process = host
    inputs = process(pictures)
    output = image_features(model, inputs).pooler_output
    assert token_grids(model, inputs) == grids_of(kind)
    lengths = [value.numel() // value.shape[-1] for value in output]
    expected = [rows * columns for rows, columns in grids_of(kind)]
    assert lengths == ([sum(expected)] if kind in ("smolvlm", "idefics3") else expected)


@torch.inference_mode()
def test_a_patch_changes_its_own_token_and_the_mean_at_the_same_place(host):
    """Painting the last patch of one token: both outputs change there, and nowhere else."""
    kind, model, pictures, process = host
    model, (rows, columns), side = without_mixing(model), grids_of(kind)[1], 14 * BLOCKS[kind]
    before = process(pictures)
    for row, column in {(0, 0), (0, columns - 1), (rows - 1, 0), (rows // 2, columns // 2)}:
        painted = pictures[1].copy()
        corner = (column + 1) * side - 14, (row + 1) * side - 14
        painted.paste((255, 0, 200), (*corner, corner[0] + 14, corner[1] + 14))
        after = process([pictures[0], painted, *pictures[2:]])
        for read in (
            lambda inputs: tokens_of(kind, model, inputs),
            lambda inputs: pooled_states(model, inputs, 2),
        ):
            changes = [(one != other).any(1) for one, other in zip(read(before), read(after), strict=True)]
            assert changes[1].nonzero().flatten().tolist() == [row * columns + column]
            assert not any(change.any() for number, change in enumerate(changes) if number != 1)


@pytest.mark.parametrize("layer", [1, 2, -2])
@torch.inference_mode()
def test_states_are_means_of_the_patches_of_transformers(host, layer):
    """Their places are tested above; here the sums over an image's patches, whatever their order."""
    kind, model, pictures, process = host
    inputs = process(pictures)
    states = pooled_states(model, inputs, layer)
    output = vision_tower_states(kind, model, inputs)[layer]
    patches = [rows * columns * BLOCKS[kind] ** 2 for rows, columns in grids_of(kind)]
    if kind in ONE_SIZE or kind == "gemma4":
        extra = 1 if kind == "internvl" else 0  # the class token
        whole = [state[extra : extra + count] for state, count in zip(output, patches, strict=True)]
    else:
        whole = output.reshape(-1, output.shape[-1]).split(patches)
    for one, other in zip(states, whole, strict=True):
        torch.testing.assert_close(one.sum(0) * BLOCKS[kind] ** 2, other.sum(0), rtol=1e-4, atol=1e-4)
        assert one.std(0).mean() > 1e-2  # equal tokens would prove little


def vision_tower_states(kind, model, inputs):
    """Hidden states of the tower, from the embeddings on, as transformers records them."""
    recorded = []
    tower = vision_tower(model)
    forward = tower.forward

    def recording(*args, **kwargs):
        output = forward(*args, **(kwargs | {"output_hidden_states": True}))
        recorded.append(output.hidden_states)
        return output

    tower.forward = recording
    try:
        image_features(model, inputs)
    finally:
        del tower.forward
    return recorded[0]


@torch.inference_mode()
def test_tokens_and_states_come_from_one_pass_over_the_tower(host):
    _, model, pictures, process = host
    inputs = process(pictures)
    passes = []
    hook = vision_tower(model).register_forward_hook(lambda *_: passes.append(1))
    output, states = encode_images(model, inputs, 2)
    hook.remove()
    assert len(passes) == 1
    expected = image_features(model, inputs).pooler_output
    assert all(map(torch.equal, output.pooler_output, expected))
    assert all(map(torch.equal, states, pooled_states(model, inputs, 2)))
    assert all(map(torch.equal, pooled_states(model, inputs, -1), pooled_states(model, inputs, 3)))
    for layer in (None, "merged"):
        output, states = encode_images(model, inputs, layer)
        assert states is None
        assert all(map(torch.equal, output.pooler_output, expected))


@torch.inference_mode()
def test_the_tower_stops_after_the_layer(hosts):
    model, folder = hosts("qwen2_5_vl")
    inputs = Encoder.load(str(folder), "merged").preprocess([noise(0, (3, 4), 28)])
    last, passes = tower_layer(vision_tower(model), 3), []
    hook = last.register_forward_hook(lambda *_: passes.append(1))
    hooks = len(last._forward_hooks)  # transformers' own too
    pooled_states(model, inputs, 2)
    assert not passes
    pooled_states(model, inputs, 3)
    assert (len(passes), len(last._forward_hooks)) == (1, hooks)
    hook.remove()


@pytest.mark.parametrize("layer", [0, 4, -4])
def test_a_layer_that_the_tower_lacks_is_refused(layer, hosts):
    model, _ = hosts("qwen2_5_vl")
    for read in (pooled_states, encode_images):
        with pytest.raises(ValueError, match=f"qwen2_5_vl: there is no layer {layer}, allowed: 1 to 3"):
            read(model, {}, layer)


def test_a_layer_of_an_unknown_type_is_refused(hosts):
    model = deepcopy(hosts("internvl")[0])
    model.config.model_type = "got_ocr2"
    for read in (pooled_states, encode_images):
        with pytest.raises(ValueError, match="layer: 2 is not available from a model of type got_ocr2"):
            read(model, {}, 2)
