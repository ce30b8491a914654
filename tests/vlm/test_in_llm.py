import copy
import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import MistralConfig

from atr.reduction.layer_schedule import Schedule
from atr.reduction.peers.fastv import FastV
from atr.reduction.peers.pyramiddrop import PyramidDrop
from atr.vlm.in_llm import Slots, _select_best, last_token_attention, prune_layers
from atr.vlm.reduce import prepare

LAYERS = 5
SINGLE = ("<image> a b",)
RAGGED = ("<image> a b", "c <image> d e f g <image> h", "i j k", "<image> <image> l")
SUPPRESSED = [2, 4]  # the end, and a placeholder that a random model may well choose
FAMILIES = pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision"])
POSITIONS = pytest.mark.parametrize("positions", ["original", "contiguous"])
ATTENTION = pytest.mark.parametrize("attention", ["eager", "sdpa"])
DROPS = pytest.mark.parametrize(
    "drops, own",
    [({2: 0.3}, False), ({1: 0.5, 2: 0.25, 3: 0.125}, True), ({1: 0.7, 2: 0.4, 4: 0.0}, False)],
    ids=["fastv", "pyramiddrop", "every layer"],
)


@dataclass(frozen=True)
class Fixed:
    """Drops as given, whatever `keep` is."""

    drops: dict
    own: bool

    def schedule(self, layers, keep):
        return Schedule(layers, self.drops, self.own)


@pytest.fixture
def make_deep(make_model):
    """A model of as many layers as have room for three drops."""

    def make(attention="sdpa", dtype=torch.float32, kind=None, **change):
        text = make_model().config.text_config
        settings = {
            key: value for key, value in text.to_dict().items() if key not in ("model_type", "layer_types")
        }
        deeper = (kind or type(text))(**settings | {"num_hidden_layers": LAYERS} | change)
        return make_model(attention, dtype, text_config=deeper)

    return make


@pytest.fixture
def deep(make_deep):
    return make_deep()


def embedded(model, inputs):
    """Embeddings of a row, and its images' columns: of visual tokens, in order, and of newlines."""
    ids = inputs["input_ids"]
    embeds_1LD = model.get_input_embeddings()(ids)
    columns_P = (ids[0] == model.config.image_token_id).nonzero()[:, 0]
    if not len(columns_P):
        return embeds_1LD, []
    images = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
    features = model.model.get_image_features(**images).pooler_output
    embeds_1LD[0, columns_P] = torch.cat(list(features))
    newline = getattr(model.model, "image_newline", None)
    seen = []
    for columns in columns_P.split([len(image) for image in features]):
        is_newline = (
            [bool((embeds_1LD[0, column] == newline).all()) for column in columns]
            if newline is not None
            else [False] * len(columns)
        )
        seen.append([column for column, skip in zip(columns.tolist(), is_newline, strict=True) if not skip])
    return embeds_1LD, seen


def pass_of(model, embeds_1LD, gone, positions):
    """Logits of a row's last token and what it pays attention to in each layer, nothing shorter.

    `gone` says which columns are hidden as keys from which layer on. Needs eager attention.
    """
    language_model, length = model.model.language_model, embeds_1LD.shape[1]
    hidden, visible, paid = embeds_1LD, torch.ones(length, dtype=torch.bool), []
    for index, layer in enumerate(language_model.layers):
        visible[gone.get(index, [])] = False
        mask = torch.full((length, length), -torch.inf).triu(1)
        mask[:, ~visible] = -torch.inf
        ids = visible.cumsum(0) - 1 if positions == "contiguous" else torch.arange(length)
        rotations = language_model.rotary_emb(hidden, ids[None])
        _, weights = layer.self_attn(layer.input_layernorm(hidden), rotations, mask[None, None])
        paid.append(weights[0, :, -1].mean(0))
        hidden = layer(hidden, attention_mask=mask[None, None], position_embeddings=rotations)
    return model.lm_head(language_model.norm(hidden))[0, -1], paid


def chosen(model, inputs, drops, own, positions):
    """Which columns leave a row before which layer: a full pass for each drop, rank, hide, go on."""
    embeds_1LD, images = embedded(model, inputs)
    gone, left = {}, copy.deepcopy(images)
    for layer, keep in sorted(drops.items()):
        _, paid = pass_of(model, embeds_1LD, gone, positions)
        scores = paid[layer if own else layer - 1]
        gone[layer] = []
        for image, columns in enumerate(left):
            count = math.floor(keep * len(images[image]) + 0.5)
            best = sorted(columns, key=lambda column: -scores[column])[:count]
            gone[layer] += [column for column in columns if column not in best]
            left[image] = sorted(best)
    return gone


def greedy(model, inputs, drops, own, positions, steps):
    """Greedy decoding of a row by hand without a cache; what left in the prefill stays away."""
    gone = chosen(model, inputs, drops, own, positions)
    embeds_1LD, _ = embedded(model, inputs)
    generated = []
    for _ in range(steps):
        logits, _ = pass_of(model, embeds_1LD, gone, positions)
        logits[SUPPRESSED] = -torch.inf
        generated.append(int(logits.argmax()))
        embeds_1LD = torch.cat([embeds_1LD, model.get_input_embeddings()(torch.tensor([generated[-1:]]))], 1)
    return generated


def generate(model, inputs, steps):
    ids = model.generate(**inputs, max_new_tokens=steps, suppress_tokens=SUPPRESSED, do_sample=False)
    return ids[:, inputs["input_ids"].shape[1] :].tolist()


@FAMILIES
@POSITIONS
@ATTENTION
@DROPS
@torch.no_grad()
def test_answers_are_those_of_decoding_by_hand_with_the_dropped_tokens_hidden(
    make_deep, process, attention, positions, drops, own
):
    model, exact = make_deep(attention), make_deep("eager")
    with prune_layers(prepare(model, process(*RAGGED)), Fixed(drops, own), 1.0, positions) as pruning:
        logits = model(**pruning.inputs).logits[:, -1]
        generated = generate(model, pruning.inputs, 4)
    rows = [process(prompt) for prompt in RAGGED]
    assert generated == [greedy(exact, row, drops, own, positions, 4) for row in rows]
    expected = [
        pass_of(exact, embedded(exact, row)[0], chosen(exact, row, drops, own, positions), positions)[0]
        for row in rows
    ]
    torch.testing.assert_close(logits, torch.stack(expected), atol=1e-4, rtol=1e-4)


@FAMILIES
@DROPS
@torch.no_grad()
def test_the_tokens_kept_of_each_image_are_reported(make_deep, process, drops, own):
    model = make_deep("eager")
    with prune_layers(prepare(model, process(*RAGGED)), Fixed(drops, own), 1.0) as pruning:
        model(**pruning.inputs)
    reports = {layer: iter(kept) for layer, kept in pruning.kept.items()}
    for prompt in RAGGED:
        row = process(prompt)
        gone = chosen(model, row, drops, own, "original")
        left = (row["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0].tolist()
        sizes = [len(columns) for columns in embedded(model, row)[1]]
        for layer in sorted(drops):
            left = [column for column in left if column not in gone[layer]]
            kept = [next(reports[layer]) for _ in sizes]
            assert [report.of for report in kept] == sizes
            counts = [math.floor(drops[layer] * size + 0.5) for size in sizes]
            assert [report.tokens for report in kept] == counts
            assert sum(len(report.indices_K) for report in kept) == len(left)
            if len(sizes) == 1:
                first = (row["input_ids"][0] == model.config.image_token_id).nonzero()[0, 0]
                assert (kept[0].indices_K + first).tolist() == left
    assert all(next(rest, None) is None for rest in reports.values())


@FAMILIES
@POSITIONS
@pytest.mark.parametrize("prompts", [SINGLE, RAGGED], ids=["single", "ragged"])
@pytest.mark.parametrize(
    "attention, dtype", [("eager", torch.float32), ("sdpa", torch.float32), ("sdpa", torch.bfloat16)]
)
@torch.no_grad()
def test_keeping_every_token_gives_the_untouched_model_bit_by_bit(
    make_deep, process, prompts, attention, dtype, positions
):
    model, inputs = make_deep(attention, dtype), process(*prompts)
    untouched = model(**inputs).logits, generate(model, inputs, 3)
    for reducer in (FastV(), PyramidDrop()):
        with prune_layers(prepare(model, inputs), reducer, 1.0, positions) as pruning:
            assert torch.equal(model(**pruning.inputs).logits, untouched[0])
            assert generate(model, pruning.inputs, 3) == untouched[1]


@FAMILIES
@torch.no_grad()
def test_layers_and_cache_hold_only_the_remaining_tokens(deep, process):
    """Time and memory are saved, in prefill and in decoding, and the mean counts what the layers read."""
    inputs = process(*SINGLE)
    full = inputs["input_ids"].shape[1]
    with prune_layers(prepare(deep, inputs), PyramidDrop(), 0.5) as pruning:
        out = deep(**pruning.inputs, output_hidden_states=True, use_cache=True)
        step = deep(
            input_ids=torch.tensor([[5]]), past_key_values=out.past_key_values, output_hidden_states=True
        )
    ((size, newlines),) = {(kept[0].of, kept[0].newlines) for kept in pruning.kept.values()}
    text = full - size - newlines
    read = [layer.keys.shape[-2] - 1 - text - newlines for layer in step.past_key_values.layers]
    assert read == [size, round(size / 2 + 0.1), *[round(size / 4 + 0.1)] * 1, *[round(size / 8 + 0.1)] * 2]
    assert [sum(read) / LAYERS] == pruning.tokens
    # What the hooks give a layer is not what the layer before returned: these are the outputs.
    outputs = [hidden.shape[1] - text - newlines for hidden in out.hidden_states[1:]]
    assert outputs == read
    assert {hidden.shape[1] for hidden in step.hidden_states} == {1}


@torch.no_grad()
def test_layers_read_shorter_states_in_every_family(deep, process):
    seen = []
    for layer in deep.model.language_model.layers:
        layer.mlp.register_forward_hook(lambda module, given, made: seen.append(made.shape[:2]))
    with prune_layers(prepare(deep, process(*RAGGED)), FastV(), 0.25) as pruning:
        deep(**pruning.inputs)
    length = pruning.inputs["input_ids"].shape[1]
    longest = max(7 + 8, 4 + 2)  # the text of a row, and 4 of 16 tokens of each of its images
    assert seen == [(4, length)] * 2 + [(4, longest)] * 3


def test_tiles_share_a_later_budget_by_the_tokens_they_have_left():
    scores = torch.full((8,), -torch.inf)
    scores[torch.tensor([2, 4, 5, 6, 7])] = torch.tensor([0.1, 0.2, 0.9, 0.3, 0.4])
    parts = list(torch.arange(8).split(4))
    assert _select_best(scores, parts, 3).tolist() == [2, 5, 7]


@torch.no_grad()
def test_contiguous_positions_count_from_the_first_remaining_token(deep, process):
    """Rotations compare by difference alone, so that no answer shows where the numbers begin."""
    given, language_model = {}, deep.model.language_model
    with prune_layers(prepare(deep, process(*SINGLE)), FastV(), 0.25, "contiguous") as pruning:
        language_model.layers[3].register_forward_pre_hook(
            lambda module, args, kwargs: given.update(kwargs, hidden=args[0]), with_kwargs=True
        )
        deep(**pruning.inputs)
    left = torch.arange(3 + 4)[None]  # the text, and 4 of 16 tokens
    for ours, expected in zip(
        given["position_embeddings"], language_model.rotary_emb(given["hidden"], left), strict=True
    ):
        torch.testing.assert_close(ours, expected)


@FAMILIES
@torch.no_grad()
def test_the_model_is_restored_after_the_context(deep, process):
    def snapshot():
        hooks = [
            (len(module._forward_pre_hooks), len(module._forward_hooks), sorted(vars(module)))
            for module in deep.modules()
        ]
        return hooks, deep.config.to_dict(), copy.deepcopy(deep.state_dict())

    inputs = process(*RAGGED)
    untouched = deep(**inputs).logits  # transformers notes things at a module when it is first used
    before = snapshot()
    with prune_layers(prepare(deep, inputs), FastV(), 0.25) as pruning:
        generate(deep, pruning.inputs, 2)
    with pytest.raises(KeyError), prune_layers(prepare(deep, inputs), PyramidDrop(), 0.5):
        raise KeyError
    after = snapshot()
    assert after[:2] == before[:2]
    assert all(torch.equal(value, before[2][name]) for name, value in after[2].items())
    assert torch.equal(deep(**inputs).logits, untouched)


@FAMILIES
@torch.no_grad()
def test_attention_of_the_last_token_is_that_of_the_eager_layer(make_deep, process):
    model, given = make_deep("eager"), {}
    layer = model.model.language_model.layers[2]
    layer.register_forward_pre_hook(
        lambda module, args, kwargs: given.update(kwargs, hidden=args[0]), with_kwargs=True
    )
    inputs = process("<image> a b", "<image> c d e f")
    weights_BHLL = model(**inputs, output_attentions=True).attentions[2]
    scores_BL = last_token_attention(
        layer, given["hidden"], given["position_embeddings"], inputs["attention_mask"].bool()
    )
    torch.testing.assert_close(scores_BL, weights_BHLL[:, :, -1].mean(1))


@torch.no_grad()
def test_attention_that_is_not_finite_ranks_nothing_and_is_named(make_deep, process):
    model = make_deep()
    model.model.language_model.layers[1].self_attn.q_proj.weight.data.fill_(torch.nan)
    message = r"^layer 1: attention of images \[0, 1\] of 2 holds NaN or infinity"
    with (
        prune_layers(prepare(model, process("<image> a", "<image> b")), FastV(), 0.3) as pruning,
        pytest.raises(ValueError, match=message),
    ):
        model(**pruning.inputs)


@torch.no_grad()
def test_mistral_is_supported(make_deep, process):
    model = make_deep("sdpa", kind=MistralConfig, sliding_window=None)
    exact = make_deep("eager", kind=MistralConfig, sliding_window=None)
    with prune_layers(prepare(model, process(*RAGGED)), FastV(), 0.3) as pruning:
        generated = generate(model, pruning.inputs, 3)
    rows = [process(prompt) for prompt in RAGGED]
    assert generated == [greedy(exact, row, {2: 0.3}, False, "original", 3) for row in rows]


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
@torch.no_grad()
def test_tiles_share_by_what_each_has_left_and_newlines_follow_their_rows(deep, process):
    prepared = prepare(deep, process(*RAGGED))
    with prune_layers(prepared, PyramidDrop(), 0.4, budget="tile", newline="follow") as pruning:
        deep(**pruning.inputs)
    left = prepared.layout.groups("tile")
    for kept_of_images in pruning.kept.values():
        stay = prepared.layout.with_newlines(
            [
                kept.indices_K[prepared.layout.tile_of[image][kept.indices_K] >= 0]
                for image, kept in enumerate(kept_of_images)
            ],
            "follow",
        )
        for image, kept in enumerate(kept_of_images):
            assert kept.indices_K.tolist() == stay[image].tolist()
            total = sum(len(part) for part in left[image])
            parts = [part[torch.isin(part, kept.indices_K)] for part in left[image]]
            assert sum(map(len, parts)) == kept.tokens
            for part, before in zip(parts, left[image], strict=True):
                assert abs(len(part) - kept.tokens * len(before) / total) < 1
            left[image] = parts


@torch.no_grad()
def test_an_image_that_is_shown_twice_is_ranked_in_each_place(deep, process):
    image = Image.effect_noise((28, 28), 90).convert("RGB")
    twice = prepare(deep, process("<image> a <image> b", images=[[image, image]]))
    once = prepare(deep, process("<image>", images=[[image]]))
    shared = replace(twice, layout=once.layout, encoded=once.encoded, tokens=once.tokens, image_of=[0, 0])
    results = []
    for prepared in (twice, shared):
        with prune_layers(prepared, FastV(), 0.3) as pruning:
            logits = deep(**pruning.inputs).logits
        results.append((logits, [kept.indices_K.tolist() for kept in pruning.kept[2]]))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert results[0][1][0] != results[0][1][1]


@given(st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=4), st.data())
def test_narrowing_keeps_the_columns_that_stay_in_order(stay, data):
    """Each row's, at its right end, twice over as well as at once."""
    stay_BL = torch.tensor(stay)
    later_BL = stay_BL & torch.tensor(data.draw(st.lists(st.booleans(), min_size=9, max_size=9)))
    full = Slots(torch.arange(9).expand_as(stay_BL), torch.ones_like(stay_BL))
    source_BS, slots = full.narrow(stay_BL)
    assert torch.equal(source_BS, slots.column_BS)
    again_BS, fewer = slots.narrow(later_BL)
    assert torch.equal(slots.column_BS.gather(1, again_BS), fewer.column_BS)
    for narrowed, wanted_BL in ((slots, stay_BL), (fewer, later_BL)):
        for column_S, real_S, wanted_L in zip(narrowed.column_BS, narrowed.real_BS, wanted_BL, strict=True):
            assert column_S[real_S].tolist() == wanted_L.nonzero()[:, 0].tolist()
            assert real_S.tolist() == sorted(real_S.tolist())
            assert len(set(column_S.tolist())) == len(column_S)


@torch.no_grad()
def test_unsupported_models_and_calls_are_refused_by_name(make_deep, deep, process):
    inputs = process(*SINGLE)
    prepared, shallow = prepare(deep, inputs), make_deep(num_hidden_layers=1)
    with (
        pytest.raises(ValueError, match="language model: 1 layer, allowed: two or more"),
        prune_layers(prepare(shallow, inputs), PyramidDrop(), 0.5),
    ):
        pass
    windowed = make_deep(kind=MistralConfig, sliding_window=8)
    with (
        pytest.raises(ValueError, match="language model: sliding_window 8 is not supported, allowed: None"),
        prune_layers(prepare(windowed, inputs), FastV(), 0.5),
    ):
        pass
    with (
        pytest.raises(ValueError, match="newline: 'drop' is unknown"),
        prune_layers(prepared, FastV(), 0.5, newline="drop"),
    ):
        pass
    with prune_layers(prepared, FastV(), 0.5) as pruning:
        for call, message in {
            lambda: deep(**process("<image> a b c")): r"\(1, 20\) is not allowed, allowed: \(1, 19\)",
            lambda: generate(deep, {**pruning.inputs, "use_cache": False}, 2): r"\(1, 20\) is not allowed",
            lambda: deep.generate(**pruning.inputs, num_beams=2, max_new_tokens=2): r"\(2, 19\) .*no beams",
            lambda: deep.generate(
                **pruning.inputs, cache_implementation="static", max_new_tokens=2
            ): "StaticCache is not allowed",
        }.items():
            with pytest.raises(ValueError, match=message):
                call()
