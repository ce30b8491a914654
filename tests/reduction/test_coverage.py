"""Coverage by few gains takes the tokens, in the order, that all gains in every step give."""

from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from atr.core.tokens import budget, top_k_BK
from atr.reduction import EncoderOutput, FeatureSelector, SelectorReducer
from atr.reduction.coverage import Scope, coverage_order_BK
from atr.reduction.distilled import COVERED, DistilledReducer
from atr.reduction.greedy import min_max_BN
from atr.reduction.similarity import exact_cosines_BNN
from benchmarks.memory import peak

SELECTORS = Path(__file__).parents[2] / "data/micro/selectors"


def reference_cosines(vectors):
    units = F.normalize(vectors.double(), dim=-1, eps=torch.finfo(torch.float64).tiny)
    units = (units * 2.0**26).round() / 2.0**26
    return (units @ units.mT * 2.0**36).round() / 2.0**36


def reference_order(similarity, weight, k):
    """The gains of all tokens in every step, in float32."""
    covered, order = torch.zeros_like(similarity[:, 0]), []
    taken = torch.zeros_like(covered, dtype=torch.bool)
    for _ in range(k):
        reached = torch.maximum(similarity, covered.unsqueeze(1)).sum(dim=2)
        gain = weight * (reached - covered.sum(dim=1, keepdim=True))
        best = gain.float().masked_fill(taken, -torch.inf).argmax(dim=1, keepdim=True)
        taken.scatter_(1, best, True)
        covered = torch.maximum(covered, similarity.take_along_dim(best.unsqueeze(-1), dim=1).squeeze(1))
        order.append(best)
    return torch.cat(order, dim=1)


def vectors_of(kind, shape, generator):
    """Vectors that differ, of which many are equal, that point one way, of few values, or all 0."""
    vectors = torch.randn(shape, generator=generator)
    if kind == "repeated":
        return vectors[:, torch.randint(shape[1] // 4, (shape[1],), generator=generator)]
    if kind == "alike":
        return vectors * 0.1 + vectors[:, :1]
    if kind == "few":
        return vectors.sign()
    return vectors * (kind != "zero")


def weights_of(kind, shape, generator):
    weight = torch.rand(shape, generator=generator, dtype=torch.float64)
    if kind == "peaked":
        return weight**20
    if kind == "tied":
        return (4 * weight).round() / 4  # with zeros
    return weight if kind == "random" else torch.ones_like(weight)


@settings(max_examples=60, deadline=None)
@given(
    images=st.integers(1, 5),
    tokens=st.integers(16, 220),
    width=st.sampled_from([1, 3, 16, 64]),
    vectors=st.sampled_from(["random", "repeated", "alike", "few", "zero"]),
    weights=st.sampled_from(["random", "peaked", "tied", "equal"]),
    seed=st.integers(0, 2**16),
)
def test_every_budget_is_that_of_all_gains(images, tokens, width, vectors, weights, seed):
    generator = torch.Generator().manual_seed(seed)
    similarity = exact_cosines_BNN(vectors_of(vectors, (images, tokens, width), generator))
    weight = weights_of(weights, (images, tokens), generator)
    order = coverage_order_BK(similarity, weight, tokens)
    assert torch.equal(order, reference_order(similarity, weight, tokens))
    for k in {0, 1, tokens // 10, tokens // 2}:
        assert torch.equal(coverage_order_BK(similarity, weight, k), order[:, :k])


@pytest.mark.parametrize(("tokens", "k"), [(576, 300), (729, 150), (1030, 60), (2928, 12)])
@pytest.mark.parametrize("vectors", ["random", "repeated"])
def test_large_images(tokens, k, vectors):
    generator = torch.Generator().manual_seed(tokens)
    given = vectors_of(vectors, (1, tokens, 16), generator)
    similarity, weight = reference_cosines(given), weights_of("tied", (1, tokens), generator)
    assert torch.equal(exact_cosines_BNN(given), similarity)
    assert torch.equal(coverage_order_BK(similarity, weight, k), reference_order(similarity, weight, k))


def test_weights_below_zero_are_taken_last_and_by_their_new_gains():
    generator = torch.Generator().manual_seed(0)
    similarity = exact_cosines_BNN(vectors_of("random", (3, 40, 8), generator))
    weight = torch.randn(3, 40, generator=generator, dtype=torch.float64)
    assert torch.equal(coverage_order_BK(similarity, weight, 40), reference_order(similarity, weight, 40))


@cache
def trained(name):
    return FeatureSelector.from_pretrained(SELECTORS / name)


@torch.no_grad()
@pytest.mark.parametrize("make", [trained, lambda name: untrained()], ids=["trained", "random"])
@pytest.mark.parametrize("name", ["distilled", "selector"])
def test_a_selector_keeps_the_tokens_of_all_gains(make, name):
    selector, generator = make(name), torch.Generator().manual_seed(0)
    mean, deviation = selector.standardise.mean_D, selector.standardise.deviation_D
    features = mean + deviation * torch.randn(5, 144, selector.trunk.width, generator=generator)
    features[1:3, ::2] = features[1:3, 1::2].clone()
    projected = vectors_of("alike", (5, 144, 32), generator)
    projected[2, ::2] = projected[2, 1::2].clone()
    encoded = EncoderOutput(features, selector.grid, projected_BND=projected)
    scores = SelectorReducer(selector).scores(encoded)
    order = reference_order(reference_cosines(projected), min_max_BN(scores), 144)
    scope, reducer = Scope(SelectorReducer(selector), on="projected"), DistilledReducer(selector)
    for k in range(144, 0, -1):  # the order of the largest budget serves the others
        assert torch.equal(scope(encoded, k), order[:, :k].sort(dim=1).values)
        first = order[:, : min(k, budget(COVERED, 144))]
        assert torch.equal(reducer(encoded, k), top_k_BK(scores.scatter(1, first, torch.inf), k))


def untrained():
    torch.manual_seed(0)
    selector = FeatureSelector(192, (12, 12), layers=1).eval()
    torch.nn.init.normal_(selector.trunk.head.weight)
    return selector


def test_one_matrix_of_cosines_is_in_memory():
    encoded = EncoderOutput(torch.randn(3, 1024, 16), None, attention_BN=torch.rand(3, 1024))
    assert peak(lambda: Scope()(encoded, 9)) < 1.6 * 8 * 1024**2
