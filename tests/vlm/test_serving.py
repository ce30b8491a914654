"""What the constants say is served reduces inputs of tiny copies, and what they refuse is refused by name."""

import pytest
import torch

from atr import reduce
from atr.core import catalog, serving
from atr.reduction.layer_schedule import LayerReducer
from atr.reduction.registry import build_reducer
from atr.vlm.families import OWN_TYPES
from atr.vlm.families.table import TABLE
from atr.vlm.families.tiny import tiny_config, tiny_inputs, tiny_model
from atr.vlm.in_llm import prune_layers
from atr.vlm.reduce import prepare

FAST = ("internvl", "qwen2_5_vl", "qwen3_vl")
KINDS = [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.exhaustive) for kind in TABLE]


def test_every_family_is_of_the_kind_that_the_table_has():
    assert {*OWN_TYPES, *TABLE} <= set(serving.FAMILIES)
    assert {kind for kind in TABLE if TABLE[kind].levels} == set(serving.SEVERAL_LAYERS) & set(TABLE)
    llava = {kind for kind, own in serving.FAMILIES.items() if own in ("llava", "llava_tiled")}
    assert llava == set(OWN_TYPES)


@pytest.fixture(scope="module")
def tiny():
    """The tiny copy of a model type and its inputs, two images in a row and one in another."""
    made = {}

    def make(kind):
        if kind not in made:
            made.clear()
            model = tiny_model(tiny_config(kind))
            made[kind] = model, tiny_inputs(model, [(0, 3), (1,)])
        return made[kind]

    return make


@torch.no_grad()
def try_reducer(name, model, inputs):
    """Shorten the inputs and run the model; raises ValueError as any user would see it."""
    reducer = build_reducer(name)
    if isinstance(reducer, LayerReducer):
        with prune_layers(prepare(model, inputs), reducer, 0.5):
            return None
    keep = {"all": 1.0, "own": "adaptive"}.get(catalog.reducer_traits(name).budget, 0.5)
    reduced = reduce(model, inputs, reducer, keep)
    assert torch.isfinite(model(**reduced).logits).all()
    return reduced


@pytest.mark.parametrize("kind", KINDS)
def test_a_reducer_reduces_what_it_is_said_to_serve_and_nothing_else(kind, tiny):
    model, inputs = tiny(kind)
    is_cut = max(len(kept.tiles) for kept in reduce(model, inputs, build_reducer("full"), 1.0).kept) > 1
    for name in catalog.untrained():
        if name == "none":
            continue  # the prompt without image is asked in its place
        reason = serving.serves(name, kind, is_cut)
        if reason:
            with pytest.raises(ValueError) as caught:
                try_reducer(name, model, inputs)
            assert "\n" not in str(caught.value)
            continue
        for kept in try_reducer(name, model, inputs).kept:
            expected = kept.of if name == "full" else (kept.of + 1) // 2
            assert kept.tokens == expected or catalog.reducer_traits(name).budget == "own", name


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "gemma3"])
def test_the_most_attended_tokens_stay(kind, tiny):
    model, inputs = tiny(kind)
    prepared = prepare(model, inputs, needs={"attention_BN", "keys_BND"})
    received = prepared.encoded.value("attention_BN")
    assert [len(values_N) for values_N in received] == prepared.layout.sizes
    assert all(values_ND.ndim == 2 for values_ND in prepared.encoded.value("keys_BND"))
    for kept, values_N in zip(
        reduce(model, inputs, build_reducer("class_attention"), 3).kept, received, strict=True
    ):
        assert kept.indices_K.tolist() == sorted(values_N.topk(3).indices.tolist())
        assert values_N.std() > 0


def test_what_tiles_and_towers_do_not_give_is_named(tiny):
    model, inputs = tiny("internvl")
    with pytest.raises(ValueError, match=r"^first_attention_BN splits a budget by a first tile .* internvl "):
        reduce(model, inputs, build_reducer("hired"), 0.5)
    with pytest.raises(ValueError, match=r"^pixels_BCHW is not available from internvl$"):
        reduce(model, inputs, build_reducer("pixel_variance"), 0.5)
    with (
        pytest.raises(
            ValueError,
            match=r"^model type 'internvl' is not supported between the layers of the language model, "
            r"allowed: llava, llava_next, ",
        ),
        prune_layers(prepare(model, inputs), build_reducer("fastv"), 0.5),
    ):
        pass
