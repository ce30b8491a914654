"""What every reducer owes its caller, whatever it is and whatever the features are like."""

from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atr.reduction import NEEDS, REDUCERS, EncoderOutput, FeatureSelector
from atr.reduction.base import Merger
from atr.reduction.checked import ask, ask_merged

WIDTH = 4  # fewer than most grids have tokens
OPTIONAL = [field.name for field in fields(EncoderOutput) if field.name != "features_BND"]
KINDS = ("random", "constant", "zero", "duplicated", "concentrated")
NAMES = pytest.mark.parametrize("name", [name for name in REDUCERS if name not in ("full", "none")])
EXAMPLES = settings(max_examples=15, deadline=None)


class Encoder:
    """Of a patch of 2 x 2 pixels the mean colour, and the mean brightness of the image."""

    def __init__(self, grid):
        self.grid = grid

    def __call__(self, pixels_BCHW):
        colours_BN3 = F.avg_pool2d(pixels_BCHW.float(), 2).flatten(2).mT
        brightness_BN1 = colours_BN3.mean((1, 2), keepdim=True).expand(-1, colours_BN3.shape[1], 1)
        return torch.cat([colours_BN3, brightness_BN1], 2).to(pixels_BCHW.dtype)


def values(kind, images, tokens, width, generator):
    """Of "duplicated" there are two distinct tokens an image, of "constant" and "zero" one in all."""
    random_BND = torch.randn(images, tokens, width, generator=generator)
    if kind == "duplicated":
        twin_BN1 = torch.randint(0, min(2, tokens), (images, tokens, 1), generator=generator)
        return random_BND.take_along_dim(twin_BN1, 1)
    return {"constant": torch.full_like(random_BND, 0.3), "zero": 0 * random_BND}.get(kind, random_BND)


@st.composite
def encodings(draw):
    """A batch with all that a reducer may ask for; its attention is all on one token if "concentrated"."""
    grid = rows, columns = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    images, kind = draw(st.integers(1, 3)), draw(st.sampled_from(KINDS))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    features, keys, projected = (
        values(kind, images, rows * columns, width, generator).to(dtype) for width in (WIDTH, 3, 5)
    )
    logits = values(kind, images, rows * columns, 1, generator)[..., 0]
    pixels = torch.randn(images, 3, 2 * rows, 2 * columns, generator=generator)
    return EncoderOutput(
        features,
        grid,
        attention_BN=(logits * (1000 if kind == "concentrated" else 1)).softmax(1),
        first_attention_BN=logits.softmax(1),
        keys_BND=keys,
        projected_BND=projected,
        text_BD=F.normalize(torch.randn(images, 5, generator=generator), dim=1).to(dtype),
        pixels_BCHW=(pixels * (kind not in ("constant", "zero"))).to(dtype),
        encode=Encoder(grid),
    )


def only(encoded, needs):
    """Without what a reducer does not say it reads."""
    return replace(encoded, **dict.fromkeys(set(OPTIONAL) - needs))


def alone(encoded, image):
    """One image of the batch."""
    batched = {field.name: getattr(encoded, field.name) for field in fields(EncoderOutput)}
    rows = {name: value[image : image + 1] for name, value in batched.items() if isinstance(value, Tensor)}
    return replace(encoded, **rows)


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Reducers by name, the learned ones from an untrained selector that tells tokens apart."""
    torch.manual_seed(0)
    selector = FeatureSelector(width=WIDTH, grid=(3, 3), layers=1, heads=1)
    torch.nn.init.normal_(selector.trunk.head.weight)
    folder = tmp_path_factory.mktemp("selector")
    selector.save_pretrained(folder)
    return lambda name: REDUCERS[name](0, folder)


def test_needs_are_told_without_making_a_reducer(make):
    assert {name: make(name).needs for name in REDUCERS} == NEEDS
    assert set().union(*NEEDS.values()) <= set(OPTIONAL)


@NAMES
@EXAMPLES
@given(encoded=encodings())
def test_exactly_the_budget_is_kept_distinct_and_in_raster_order(make, name, encoded):
    reducer = make(name)
    encoded = only(encoded, reducer.needs)
    for k in range(1, encoded.tokens + 1):
        keep = ask(reducer, encoded, k)
        assert keep.dtype == torch.int64 and keep.device == encoded.features_BND.device
        assert [len(set(row)) for row in keep.tolist()] == [k] * len(encoded.features_BND)
        assert all(row == sorted(row) and 0 <= row[0] <= row[-1] < encoded.tokens for row in keep.tolist())
        if isinstance(reducer, Merger):
            places, merged = ask_merged(reducer, encoded, k)
            assert torch.equal(places, keep)
            assert merged.shape == (*keep.shape, WIDTH) and merged.dtype == encoded.features_BND.dtype
            assert merged.isfinite().all()
            assert k < encoded.tokens or torch.equal(merged, encoded.features_BND)


@NAMES
@EXAMPLES
@given(encoded=encodings())
def test_an_image_is_reduced_the_same_in_any_batch_and_every_time(make, name, encoded):
    reducer, again = make(name), make(name)
    images = [alone(encoded, image) for image in range(len(encoded.features_BND))]
    for k in range(1, encoded.tokens + 1):
        keep = ask(reducer, encoded, k)
        assert torch.equal(keep, ask(again, encoded, k))
        assert torch.equal(keep, torch.cat([ask(reducer, image, k) for image in images]))
        if isinstance(reducer, Merger):
            merged = ask_merged(reducer, encoded, k)[1]
            assert torch.equal(merged, ask_merged(again, encoded, k)[1])
            apart = torch.cat([ask_merged(reducer, image, k)[1] for image in images])
            torch.testing.assert_close(merged, apart)


@NAMES
@EXAMPLES
@given(encoded=encodings(), data=st.data())
def test_a_budget_out_of_range_and_values_that_are_not_finite_are_refused(make, name, encoded, data):
    reducer = make(name)
    budget = data.draw(st.sampled_from([-1, 0, encoded.tokens + 1]))
    with pytest.raises(ValueError, match=f"budget {budget} is out of range"):
        ask(reducer, encoded, budget)
    read = ["features_BND", *sorted(reducer.needs - {"grid", "encode"})]
    field = data.draw(st.sampled_from(read))
    broken = getattr(encoded, field).clone()
    broken[-1, ..., -1] = float("nan")
    with pytest.raises(ValueError, match=f"{type(reducer).__name__}: {field} of images .* holds NaN"):
        ask(reducer, replace(encoded, **{field: broken}), 1)
