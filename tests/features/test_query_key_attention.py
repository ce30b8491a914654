"""Attention and keys of towers that merge patches, against hand-made ones and transformers' own softmax."""

import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForImageTextToText

from atr.features import query_key_attention
from atr.features.query_key_attention import PATCH_ORDER, capture_merged_attention, mean_received
from atr.features.token_grids import image_arguments
from atr.vlm.families import family_of
from atr.vlm.families.tiny import tiny_config, tiny_inputs, tiny_model

HEADS = 2
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
TEXT = {
    "vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "rope_parameters": MROPE,
}  # fmt: skip
VISION = {
    "depth": 4, "hidden_size": 32, "num_heads": HEADS, "intermediate_size": 16, "patch_size": 4,
    "out_hidden_size": 16,
}  # fmt: skip
QWEN = {
    "qwen2_vl": VISION | {"embed_dim": 32, "hidden_size": 16, "mlp_ratio": 1},
    # Windows of 2 x 2 tokens, in the first and the last layer.
    "qwen2_5_vl": VISION | {"window_size": 16, "fullatt_block_indexes": [1, 2]},
    "qwen3_vl": VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 64},
}
GRIDS = [(3, 4), (2, 5)]
ALL = frozenset({"attention_BN", "keys_BND", "first_attention_BN"})
FAST = ("gemma3", "gemma4", "internvl", "lfm2_vl", "mistral3", "qwen2_5_vl", "qwen3_vl", "smolvlm")
KINDS = [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.exhaustive) for kind in PATCH_ORDER]
WINDOWS = [kind for kind, order in PATCH_ORDER.items() if order == "windows"]
ORDERED = [
    kind if kind in FAST else pytest.param(kind, marks=pytest.mark.exhaustive)
    for kind in PATCH_ORDER
    if kind not in WINDOWS
]


def make_qwen(kind, attention="sdpa", dtype=torch.float32):
    """A Qwen of four layers, whose weights are so large that attention is far from uniform."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, text_config=TEXT, vision_config=QWEN[kind])
    model = AutoModelForImageTextToText.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.3)
    return model.to(dtype)


def draw_patches(grids=GRIDS):
    """What `get_image_features` of a Qwen takes of images of random pixels."""
    sides = torch.tensor([[1, 2 * rows, 2 * columns] for rows, columns in grids])
    draw = torch.Generator().manual_seed(1)
    return {
        "pixel_values": torch.randn(int(sides.prod(1).sum()), 3 * 2 * 4**2, generator=draw),
        "image_grid_thw": sides,
    }


@torch.no_grad()
def observe(model, inputs, layer=None, needs=ALL, grids=GRIDS):
    with capture_merged_attention(model, layer, grids, needs) as signals:
        output = model.get_image_features(**inputs, return_dict=True)
    return signals, output


def attention_inputs(model, index, inputs):
    """The arguments of the attention of a layer of a Qwen tower."""
    calls = []
    attention = model.model.visual.blocks[index].attn
    hook = attention.register_forward_hook(lambda *call: calls.append(call[1:3]), with_kwargs=True)
    with torch.no_grad():
        model.get_image_features(**inputs, return_dict=True)
    hook.remove()
    ((args, kwargs),) = calls
    return attention, args[0], kwargs["position_embeddings"]


def coordinates(rotations, grids):
    """Row and column of each patch of a Qwen tower, found by its rotations; one list for each image."""
    cos_TC, sin_TC = rotations
    quarter = cos_TC.shape[1] // 4
    frequency = 1e4 ** -(torch.arange(quarter) / quarter)
    places, start = [], 0
    for rows, columns in grids:
        known = list(itertools.product(range(2 * rows), range(2 * columns)))
        angles_PC = torch.tensor(known)[:, :, None] * frequency
        table_PC = torch.cat([angles_PC.cos().flatten(1), angles_PC.sin().flatten(1)], dim=1)
        here = slice(start, start + len(known))
        own_PC = torch.cat([cos_TC[here, : 2 * quarter], sin_TC[here, : 2 * quarter]], dim=1)
        distance_PP = torch.cdist(own_PC, table_PC)
        assert distance_PP.min(1).values.max() < 1e-2
        places.append([known[place] for place in distance_PP.argmin(1)])
        assert sorted(places[-1]) == known
        start += len(known)
    return places


def rotated(states_TC, rows_and_columns):
    """Queries or keys of one head, turned as complex numbers by the angles of their row and column."""
    half = states_TC.shape[1] // 2
    frequency = 1e4 ** -(torch.arange(half // 2, dtype=torch.float64) / (half // 2))
    angle_TC = (torch.tensor(rows_and_columns)[:, :, None] * frequency).flatten(1)
    return torch.complex(states_TC[:, :half], states_TC[:, half:]) * torch.polar(
        torch.ones_like(angle_TC), angle_TC
    )


def hand_made(model, index, inputs, grids=GRIDS):
    """Attention and keys of each token, in double precision, patch by patch from the weights of a layer."""
    attention, hidden_TD, rotations = attention_inputs(model, index, inputs)
    weight, bias = attention.qkv.weight.double(), attention.qkv.bias.double()
    query_TD, key_TD, _ = (hidden_TD.double() @ weight.T + bias).chunk(3, dim=1)
    received, keys, start = [], [], 0
    for places, (rows, columns) in zip(coordinates(rotations, grids), grids, strict=True):
        here = slice(start, start + len(places))
        start += len(places)
        heads = [
            (rotated(query, places), rotated(key, places))
            for query, key in zip(query_TD[here].chunk(HEADS, 1), key_TD[here].chunk(HEADS, 1), strict=True)
        ]
        weights = [
            ((query @ key.conj().T).real / math.sqrt(2 * query.shape[1])).softmax(1) for query, key in heads
        ]
        column_T = torch.stack(weights).mean((0, 1))
        key_TC = torch.stack(key_TD[here].chunk(HEADS, 1)).mean(0)
        members = [
            [place for place, (row, column) in enumerate(places) if (row // 2, column // 2) == token]
            for token in itertools.product(range(rows), range(columns))
        ]
        received.append(torch.stack([column_T[patches].mean() for patches in members]))
        keys.append(torch.stack([key_TC[patches].mean(0) for patches in members]))
    return received, keys


# The layer that is read, as an index of blocks, and the one that attends to whole images.
READ = {"qwen2_5_vl": {None: (3, 2), "merged": (3, 2), -2: (2, 2), 1: (0, 1)}}
OTHERS = {None: (3, 3), "merged": (3, 3), -2: (2, 2), 1: (0, 0)}


@pytest.mark.parametrize("layer", [None, "merged", -2, 1])
@pytest.mark.parametrize("kind", QWEN)
def test_of_qwen_it_is_the_column_mean_of_hand_made_attention(kind, layer):
    model, inputs = make_qwen(kind), draw_patches()
    read, whole = READ.get(kind, OTHERS)[layer]
    first = 1 if kind == "qwen2_5_vl" else 0
    signals, _ = observe(model, inputs, layer)
    (received, _), (_, keys), (early, _) = (hand_made(model, index, inputs) for index in (whole, read, first))
    for image in range(len(GRIDS)):
        ours = {name: values[image].double() for name, values in signals.items()}
        torch.testing.assert_close(ours["attention_BN"], received[image], atol=1e-7, rtol=1e-4)
        torch.testing.assert_close(ours["keys_BND"], keys[image], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(ours["first_attention_BN"], early[image], atol=1e-7, rtol=1e-4)
        assert received[image].std() > 1e-3, "uniform attention would tell nothing"


def make_tiny(kind):
    """A tiny model, the pixels of three images in two rows, and the grids of their tiles in tokens."""
    model = tiny_model(tiny_config(kind))
    inputs = tiny_inputs(model, [(0, 3), (2,)])
    pixels = {name: inputs[name] for name in image_arguments(model) if name in inputs}
    return model, pixels, family_of(model).tiling(model, inputs).grids


@torch.no_grad()
def tokens_of(model, pixels):
    """The tokens of all images, (tokens, width)."""
    output = model.get_image_features(**pixels, return_dict=True).pooler_output
    parts = [output] if isinstance(output, torch.Tensor) else output
    return torch.cat([part.flatten(0, -2) for part in parts])


def attention_modules(model):
    """The attention modules of a tower's layers, in order."""
    return [
        module
        for name, module in model.model.named_modules()
        if re.match(r"vis.*\.\d+\.", name) and (hasattr(module, "qkv") or hasattr(module, "k_proj"))
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_painted_pixel_changes_the_key_of_the_token_that_reads_it(kind):
    """Without attention between patches, the model itself says which token reads a pixel."""
    model, pixels, grids = make_tiny(kind)
    for module in attention_modules(model):
        for name in {"proj", "out_proj", "o_proj", "projection_layer"} & set(dict(module.named_children())):
            for weight in module.get_submodule(name).parameters():
                weight.data.zero_()
    keys = torch.cat(observe(model, pixels, 1, {"keys_BND"}, grids)[0]["keys_BND"])
    tokens, found = tokens_of(model, pixels), set()
    drawn = pixels["pixel_values"].flatten().nonzero()[:, 0]  # the rest is padding
    for place in drawn[torch.linspace(0, len(drawn) - 1, 8).long()]:
        painted = pixels["pixel_values"].clone()
        painted.view(-1)[place] += 3
        other = pixels | {"pixel_values": painted}
        changed = (tokens_of(model, other) - tokens).abs().amax(1) > 1e-6
        own = torch.cat(observe(model, other, 1, {"keys_BND"}, grids)[0]["keys_BND"])
        assert torch.equal((own - keys).abs().amax(1) > 1e-6, changed) and changed.sum() == 1
        found |= set(changed.nonzero()[:, 0].tolist())
    assert len(found) > 4


@pytest.mark.parametrize("kind", ORDERED)
def test_the_attention_is_that_of_the_softmax_in_the_tower(kind, monkeypatch):
    """What transformers' eager attention computes in the last layer, in the order that is proven above."""
    model, pixels, grids = make_tiny(kind)
    module, softmax, seen = attention_modules(model)[-1], F.softmax, []
    for weight in module.parameters():
        weight.data.mul_(6)  # far from uniform

    def keep(*args, **kwargs):
        seen.append(softmax(*args, **kwargs))
        return seen[-1]

    hooks = (
        module.register_forward_pre_hook(lambda *call: monkeypatch.setattr(F, "softmax", keep)),
        module.register_forward_hook(lambda *call: monkeypatch.setattr(F, "softmax", softmax)),
    )
    tokens_of(model, pixels)
    for hook in hooks:
        hook.remove()
    received = observe(model, pixels, None, {"attention_BN"}, grids)[0]["attention_BN"]
    for tile, (rows, columns) in enumerate(grids):
        theirs = merge_columns(kind, columns_of(seen, tile, grids), rows, columns)
        torch.testing.assert_close(received[tile], theirs, atol=1e-8, rtol=1e-4)
        assert theirs.std() > 0.01 * theirs.mean()


def columns_of(seen, tile, grids):
    """Mean attention to each patch of a tile over heads and real queries; a class token's alone."""
    if len(seen) == len(grids):
        return seen[tile][0].mean((0, 1))
    (weights_BHTT,) = seen
    if len(weights_BHTT) == 1:  # one row of all images, each of which sees itself alone
        weights_TT = weights_BHTT[0].mean(0)
        side = math.isqrt(len(weights_TT) // sum(rows * columns for rows, columns in grids))
        start = sum(rows * columns for rows, columns in grids[:tile]) * side**2
        here = slice(start, start + grids[tile][0] * grids[tile][1] * side**2)
        return weights_TT[here, here].mean(0)
    tokens = max(rows * columns for rows, columns in grids)
    side = math.isqrt(weights_BHTT.shape[-1] // tokens)
    if special := weights_BHTT.shape[-1] - tokens * side**2:
        return weights_BHTT[tile, :, 0, special:].mean(0)
    patches = grids[tile][0] * grids[tile][1] * side**2
    return weights_BHTT[tile, :, :patches, :patches].mean((0, 1))


def merge_columns(kind, column_P, rows, columns):
    """The mean over the patches of each token."""
    side = math.isqrt(len(column_P) // (rows * columns))
    if PATCH_ORDER[kind] == "blocks":
        return column_P.reshape(-1, side**2).mean(1)
    if (
        PATCH_ORDER[kind] == "windows"
    ):  # of one token in the tiny copy, with pixels of 16 = 2 x 2 patches of 4
        return column_P.reshape(-1, side**2).mean(1)
    return F.avg_pool2d(column_P.reshape(1, rows * side, columns * side), side).flatten()


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "mistral3", "internvl"])
def test_features_do_not_depend_on_needs_and_the_tower_runs_once(kind):
    model, pixels, grids = make_tiny(kind)
    tower = model.model.visual if kind == "qwen2_5_vl" else model.model.vision_tower
    passes = []
    tower.register_forward_hook(lambda *call: passes.append(1))
    outputs = [observe(model, pixels, None, needs, grids)[1] for needs in (frozenset(), ALL)]
    assert len(passes) == 2 and tower.config._attn_implementation == "eager"
    for one, other in zip(*(output.pooler_output for output in outputs), strict=True):
        assert torch.equal(one, other)


def test_an_image_has_the_same_alone():
    model, inputs = make_qwen("qwen2_5_vl"), draw_patches()
    both = observe(model, inputs)[0]
    alone = {"pixel_values": inputs["pixel_values"][48:], "image_grid_thw": inputs["image_grid_thw"][1:]}
    for name, values in observe(model, alone, grids=GRIDS[1:])[0].items():
        torch.testing.assert_close(both[name][1], values[0], atol=1e-5, rtol=1e-4)


def test_in_bfloat16_and_under_eager_attention_it_is_nearly_the_same():
    inputs = draw_patches()
    exact = observe(make_qwen("qwen2_5_vl"), inputs)[0]
    eager = observe(make_qwen("qwen2_5_vl", "eager"), inputs)[0]
    half = observe(make_qwen("qwen2_5_vl", dtype=torch.bfloat16), inputs)[0]
    for name, values in exact.items():
        torch.testing.assert_close(eager[name], values, atol=1e-6, rtol=1e-4)
        for one, other in zip(half[name], values, strict=True):
            assert one.dtype == (torch.bfloat16 if name == "keys_BND" else torch.float32)
            assert torch.corrcoef(torch.stack([one.flatten().float(), other.flatten()]))[0, 1] > 0.95


def test_a_mean_in_parts_is_the_mean_and_padding_does_not_count(monkeypatch):
    query, key = torch.randn(2, 2, 3, 7, 4, generator=torch.Generator().manual_seed(0))
    whole = mean_received(query, key, None, 0.5)
    torch.testing.assert_close(whole, (query @ key.mT * 0.5).softmax(-1).mean((1, 2)))
    monkeypatch.setattr(query_key_attention, "_ENTRIES", 2 * 3 * 7 * 2)
    torch.testing.assert_close(mean_received(query, key, None, 0.5), whole)
    first = mean_received(query, key, None, 0.5, queries=1)
    torch.testing.assert_close(first, (query[:, :, :1] @ key.mT * 0.5).softmax(-1).mean((1, 2)))
    real = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    added = torch.zeros(2, 1, 7, 7).masked_fill(~real[:, None, None], torch.finfo(torch.float32).min)
    short = mean_received(query[1:, :, :4], key[1:, :, :4], None, 0.5)
    for mask in (real, real[:, None, None].expand(2, 1, 7, 7), added):
        padded = mean_received(query, key, mask, 0.5)
        torch.testing.assert_close(padded[0], whole[0])
        torch.testing.assert_close(padded[1, :4], short[0])
        assert not padded[1, 4:].any()


def test_what_cannot_be_captured_is_refused_by_name():
    model = make_qwen("qwen2_5_vl")
    with pytest.raises(ValueError, match=r"^values_BND cannot be captured, allowed: attention_BN, keys_BND"):
        observe(model, {}, needs={"values_BND"})
    for layer in (0, 5, -5):
        with pytest.raises(
            ValueError,
            match=rf"^layer: {layer} of the tower of qwen2_5_vl has no attention, allowed: 1 to 4, -4 to -1$",
        ):
            observe(model, {}, layer)
    model.config.model_type = "gemma3n"
    with pytest.raises(
        ValueError, match=r"^attention_BN is not available from the tower of gemma3n, allowed: "
    ):
        observe(model, {})


def test_images_packed_for_flash_attention_are_refused():
    """Their borders are arguments of the kernel, not a mask."""
    model, pixels, grids = make_tiny("mistral3")
    with pytest.raises(ValueError, match=r"^attention cannot be computed from images packed for Flash"):
        observe(model, pixels | {"cu_seq_lens_q": torch.tensor([0, 24, 72, 88])}, grids=grids)
