"""Attention and keys of towers that merge patches, against hand-made ones and transformers' own weights."""

import itertools
import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from atr.features import query_key_attention
from atr.features.query_key_attention import PATCH_ORDER, capture_merged_attention, mean_received

TEXT = {
    "vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
HEADS, PATCH, SIDE = 2, 4, 32
QWEN = {
    "depth": 4, "hidden_size": 32, "num_heads": HEADS, "intermediate_size": 16, "patch_size": PATCH,
    "out_hidden_size": 16,
}  # fmt: skip
SQUARE = {
    "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": HEADS,
    "image_size": SIDE, "patch_size": PATCH,
}  # fmt: skip
SIGLIP = SQUARE | {"model_type": "siglip_vision_model", "vision_use_head": False, "projection_dim": 16}
CONFIGS = {
    "qwen2_vl": {
        "text_config": TEXT | MROPE,
        "vision_config": QWEN | {"embed_dim": 32, "hidden_size": 16, "mlp_ratio": 1},
    },
    # Windows of 2 x 2 tokens, in the first and the last layer.
    "qwen2_5_vl": {
        "text_config": TEXT | MROPE,
        "vision_config": QWEN | {"window_size": 16, "fullatt_block_indexes": [1, 2]},
    },
    "qwen3_vl": {
        "text_config": TEXT | MROPE,
        "vision_config": QWEN | {"deepstack_visual_indexes": [0], "num_position_embeddings": 64},
    },
    "gemma3": {
        "text_config": TEXT | {"model_type": "gemma3_text"},
        "vision_config": SIGLIP,
        "mm_tokens_per_image": 4,
    },
    "paligemma": {
        "text_config": TEXT | {"model_type": "gemma"}, "vision_config": SIGLIP, "projection_dim": 16,
    },
    "internvl": {
        "text_config": TEXT | {"model_type": "qwen2"},
        "vision_config": SQUARE
        | {"model_type": "internvl_vision", "image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]},
        "image_seq_length": 16,
    },
    "smolvlm": {"text_config": TEXT | {"model_type": "llama"}, "vision_config": SQUARE, "scale_factor": 2},
    "idefics3": {"text_config": TEXT | {"model_type": "llama"}, "vision_config": SQUARE, "scale_factor": 4},
    "mistral3": {
        "text_config": TEXT | {"model_type": "mistral"},
        "vision_config": SQUARE | {"model_type": "pixtral", "head_dim": 16},
        "spatial_merge_size": 2,
    },
}  # fmt: skip
CONFIGS["qwen3_vl_moe"] = CONFIGS["qwen3_vl"]
FUSED = [kind for kind in CONFIGS if kind.startswith("qwen")]
RASTER = [kind for kind in CONFIGS if kind not in FUSED]
RAGGED = [(3, 4), (2, 5)]
GRIDS = dict.fromkeys(FUSED, RAGGED) | {"mistral3": RAGGED}
GRIDS |= {"gemma3": [(2, 2)] * 2, "paligemma": [(8, 8)] * 2, "internvl": [(4, 4)] * 2}
GRIDS |= {"smolvlm": [(4, 4)] * 2, "idefics3": [(2, 2)] * 2}
ALL = frozenset({"attention_BN", "keys_BND", "first_attention_BN"})


def make_model(kind, attention="sdpa", dtype=torch.float32):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **CONFIGS[kind])
    model = AutoModelForImageTextToText.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.3)
    return model.to(dtype)


def make_inputs(kind, grids=None):
    """What `get_image_features` takes of two images of random pixels."""
    grids = grids or GRIDS[kind]
    draw = torch.Generator().manual_seed(1)
    if kind in FUSED:
        sides = torch.tensor([[1, 2 * rows, 2 * columns] for rows, columns in grids])
        patches = torch.randn(int(sides.prod(1).sum()), 3 * 2 * PATCH**2, generator=draw)
        return {"pixel_values": patches, "image_grid_thw": sides}
    pixels = torch.randn(len(grids), 3, SIDE, 40, generator=draw)
    if kind == "mistral3":
        sizes = [[2 * PATCH * rows, 2 * PATCH * columns] for rows, columns in grids]
        return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}
    pixels = pixels[..., :SIDE]
    return {"pixel_values": pixels[None] if kind in ("smolvlm", "idefics3") else pixels}


@torch.no_grad()
def observe(model, inputs, layer=None, needs=ALL, grids=None):
    kind = model.config.model_type
    with capture_merged_attention(model, layer, grids or GRIDS[kind], needs) as signals:
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


def hand_made(model, index, inputs, grids):
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
@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_of_qwen_it_is_the_column_mean_of_hand_made_attention(kind, layer):
    model, inputs, grids = make_model(kind), make_inputs(kind), GRIDS[kind]
    read, whole = READ.get(kind, OTHERS)[layer]
    first = 1 if kind == "qwen2_5_vl" else 0
    signals, _ = observe(model, inputs, layer)
    for image in range(len(grids)):
        ours = {name: values[image].double() for name, values in signals.items()}
        theirs = hand_made(model, whole, inputs, grids)[0][image]
        torch.testing.assert_close(ours["attention_BN"], theirs, atol=1e-7, rtol=1e-4)
        keys = hand_made(model, read, inputs, grids)[1][image]
        torch.testing.assert_close(ours["keys_BND"], keys, atol=1e-5, rtol=1e-4)
        early = hand_made(model, first, inputs, grids)[0][image]
        torch.testing.assert_close(ours["first_attention_BN"], early, atol=1e-7, rtol=1e-4)
        assert theirs.std() > 1e-3, "uniform attention would tell nothing"


@pytest.mark.parametrize("kind", RASTER)
def test_of_other_towers_it_is_what_transformers_returns(kind):
    """Their weights from a forward under eager attention, merged by the rows and columns of the patches."""
    model, inputs, grids = make_model(kind, "eager"), make_inputs(kind), GRIDS[kind]
    tower = model.model.vision_model if hasattr(model.model, "vision_model") else model.model.vision_tower
    seen = []
    layers = tower.transformer.layers if kind == "mistral3" else None
    layers = layers or (tower.encoder.layer if kind == "internvl" else tower.encoder.layers)
    block = next(part for part in layers[2].modules() if hasattr(part, "k_proj"))
    hook = block.register_forward_hook(
        lambda module, args, kwargs, out: seen.append(out[1]), with_kwargs=True
    )
    with torch.no_grad():
        model.get_image_features(**inputs, return_dict=True)
    hook.remove()
    weights_BHTT = seen[0]
    signals, _ = observe(model, inputs, -2, {"attention_BN"})
    start = 0
    for image, (rows, columns) in enumerate(grids):
        if kind == "mistral3":
            patches = 4 * rows * columns
            here = slice(start, start + patches)
            column_T, side = weights_BHTT[0, :, here, here].mean((0, 1)), 2
            start += patches
        elif kind == "internvl":
            column_T, side = weights_BHTT[image, :, 0, 1:].mean(0), 2
        else:
            column_T, side = weights_BHTT[image].mean((0, 1)), SIDE // PATCH // rows
        picture = column_T.reshape(rows * side, columns * side)
        theirs = torch.nn.functional.avg_pool2d(picture[None], side)[0].flatten()
        torch.testing.assert_close(signals["attention_BN"][image], theirs, atol=1e-7, rtol=1e-4)
        assert theirs.std() > 1e-4


def paint(kind, inputs, image, token, grids):
    """The inputs with other pixels where one token of an image is."""
    rows, columns = grids[image]
    row, column = divmod(token, columns)
    pixels = inputs["pixel_values"].clone()
    if kind in FUSED:  # the processor's order: the four patches of a token follow each other
        first = 4 * (sum(r * c for r, c in grids[:image]) + token)
        pixels[first : first + 4] += 3
    else:
        sides = inputs.get("image_sizes", torch.tensor([[SIDE, SIDE]] * len(grids)))[image]
        height, width = int(sides[0]) // rows, int(sides[1]) // columns
        place = slice(row * height, (row + 1) * height), slice(column * width, (column + 1) * width)
        picture = pixels[0, image] if pixels.ndim == 5 else pixels[image]
        picture[:, place[0], place[1]] += 3
    return inputs | {"pixel_values": pixels}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_painted_token_alone_has_another_key_in_the_first_layer(kind):
    model, inputs, grids = make_model(kind), make_inputs(kind), GRIDS[kind]
    own = observe(model, inputs, 1, {"keys_BND"})[0]["keys_BND"]
    for image, (rows, columns) in enumerate(grids):
        for token in {0, 1, rows * columns // 2, rows * columns - 1}:
            painted = observe(model, paint(kind, inputs, image, token, grids), 1, {"keys_BND"})[0]["keys_BND"]
            changed = [
                (other, place)
                for other, (one_NC, two_NC) in enumerate(zip(own, painted, strict=True))
                for place in ((one_NC - two_NC).abs().amax(1) > 1e-4).nonzero()[:, 0].tolist()
            ]
            assert changed == [(image, token)]


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "mistral3", "internvl"])
def test_features_do_not_depend_on_needs_and_the_tower_runs_once(kind):
    model, inputs = make_model(kind), make_inputs(kind)
    tower = model.model.visual if kind == "qwen2_5_vl" else model.model.vision_tower
    passes = []
    tower.register_forward_hook(lambda *call: passes.append(1))
    implementation = tower.config._attn_implementation
    outputs = [observe(model, inputs, None, needs)[1] for needs in (frozenset(), ALL)]
    assert len(passes) == 2 and tower.config._attn_implementation == implementation
    for one, other in zip(*(output.pooler_output for output in outputs), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "mistral3"])
def test_an_image_has_the_same_alone(kind):
    model, grids = make_model(kind), GRIDS[kind]
    inputs = make_inputs(kind)
    both = observe(model, inputs)[0]
    if kind == "qwen2_5_vl":
        alone = {"pixel_values": inputs["pixel_values"][48:], "image_grid_thw": inputs["image_grid_thw"][1:]}
    else:
        alone = {"pixel_values": inputs["pixel_values"][1:], "image_sizes": inputs["image_sizes"][1:]}
    single = observe(model, alone, grids=grids[1:])[0]
    for name, values in single.items():
        torch.testing.assert_close(both[name][1], values[0], atol=1e-5, rtol=1e-4)


def test_in_bfloat16_and_under_eager_attention_it_is_nearly_the_same():
    inputs = make_inputs("qwen2_5_vl")
    exact = observe(make_model("qwen2_5_vl"), inputs)[0]
    eager = observe(make_model("qwen2_5_vl", "eager"), inputs)[0]
    half = observe(make_model("qwen2_5_vl", dtype=torch.bfloat16), inputs)[0]
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
    model = make_model("qwen2_5_vl")
    with pytest.raises(ValueError, match=r"^values_BND cannot be captured, allowed: attention_BN, keys_BND"):
        observe(model, {}, needs={"values_BND"})
    for layer in (0, 5, -5):
        with pytest.raises(
            ValueError,
            match=rf"^layer: {layer} of the tower of qwen2_5_vl has no attention, allowed: 1 to 4, -4 to -1$",
        ):
            observe(model, {}, layer)
    model.config.model_type = "gemma4"
    with pytest.raises(
        ValueError, match=r"^attention_BN is not available from the tower of gemma4, allowed: "
    ):
        observe(model, {}, grids=RAGGED)


def test_images_packed_for_flash_attention_are_refused():
    """Their borders are arguments of the kernel, not a mask."""
    model, packed = make_model("mistral3"), {"cu_seq_lens_q": torch.tensor([0, 48, 88])}
    with pytest.raises(
        ValueError, match=r"^attention cannot be computed from images packed for FlashAttention"
    ):
        observe(model, make_inputs("mistral3") | packed)


def test_every_order_is_tested():
    assert set(CONFIGS) == set(PATCH_ORDER)
