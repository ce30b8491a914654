"""Reducers by diversity, against slow transcriptions of their formulas."""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atr.core.tokens import top_k_BK
from atr.reduction import EncoderOutput, FeatureSelector, Scorer, SelectorReducer
from atr.reduction.coverage import Scope, coverage_order_BK
from atr.reduction.determinantal import CDPruner, dpp_order_BK
from atr.reduction.marginal_relevance import MMR, max_min_order_BK, mmr_order_BK
from atr.reduction.peers.dart import Dart
from atr.reduction.peers.divprune import DivPrune
from atr.reduction.similarity import exact_cosines_BNN


@dataclass(frozen=True)
class FirstChannel:
    """A scorer that records its calls."""

    asked: list[int]
    needs: ClassVar[frozenset[str]] = frozenset({"grid"})
    threshold: ClassVar[None] = None

    def __call__(self, encoded, budget):
        return top_k_BK(self.scores(encoded), budget)

    def scores(self, encoded):
        self.asked.append(len(encoded.features_BND))
        return encoded.features_BND[..., 0].float()


SCORER = FirstChannel([])
GREEDY = [
    DivPrune(),
    DivPrune(on="features"),
    CDPruner(),
    CDPruner(sign=-1, on="features"),
    CDPruner(text=False, on="features"),
    Scope(),
    Scope(alpha=2.0, on="projected"),
    Scope(SCORER),
    MMR(),
    MMR(SCORER, balance=0.3, on="projected"),
]
REDUCERS = [*GREEDY, Dart(), Dart(pivots=3)]
KINDS = ("random", "constant", "repeated", "zero", "some zero", "huge")


def tokens_of(kind, shape, generator):
    features = torch.randn(shape, generator=generator)
    if kind == "constant":
        return features[:, :1].expand(shape).clone()
    if kind == "repeated":
        return features[:, torch.randint(min(3, shape[1]), (shape[1],), generator=generator)]
    if kind == "some zero":
        return features * (torch.rand(*shape[:2], 1, generator=generator) < 0.5)
    return features * {"zero": 0.0, "huge": 1e30}.get(kind, 1.0)


def encode(images, tokens, width, kind="random", dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (images, tokens, width)
    features, projected, keys = (tokens_of(kind, shape, generator).to(dtype) for _ in range(3))
    attention = torch.randn(images, tokens, generator=generator).mul(2).softmax(1)
    words = torch.nn.functional.normalize(torch.randn(images, 4, width, generator=generator), dim=-1)
    if kind == "constant":
        attention = torch.full_like(attention, 1 / tokens)
    return EncoderOutput(
        features,
        (1, tokens),
        attention_BN=attention,
        keys_BND=keys,
        projected_BND=projected,
        text_BD=words.mean(1).to(dtype),
    )


def part(encoded, images):
    """The batch with some of its images."""
    fields = ("features_BND", "attention_BN", "keys_BND", "projected_BND", "text_BD")
    return replace(encoded, **{field: getattr(encoded, field)[images] for field in fields})


def order_of(reducer, encoded):
    """The first image's tokens in the order in which rising budgets add them."""
    kept = [set(reducer(encoded, k)[0].tolist()) for k in range(encoded.tokens + 1)]
    added = [more - fewer for fewer, more in pairwise(kept)]
    assert all(len(new) == 1 for new in added), "a smaller budget keeps a part of a larger one's tokens"
    return [new.pop() for new in added]


def cosines(vectors):
    vectors = vectors.double().numpy()
    units = [v / np.sqrt((v * v).sum()) if v.any() else v for v in vectors]
    return np.array([[a @ b for b in units] for a in units])


def stretched(values):
    values = [float(value) for value in values]
    return [(value - min(values)) / (max(values) - min(values)) for value in values]


def assert_each_is_best(order, score, tolerance=1e-6):
    """Each token has the highest score given those before it, up to rounding."""
    for step, token in enumerate(order):
        rest = [other for other in range(len(order)) if other not in order[:step]]
        scores = {other: score(other, order[:step]) for other in rest}
        assert scores[token] >= max(scores.values()) - tolerance, f"step {step}"


@settings(max_examples=30, deadline=None)
@given(
    images=st.integers(1, 3),
    tokens=st.integers(1, 9),
    width=st.integers(1, 5),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_exact_counts_in_any_batch(images, tokens, width, kind, dtype, seed):
    batch = encode(images, tokens, width, kind, dtype, seed)
    alone = [part(batch, [image]) for image in range(images)]
    for reducer in REDUCERS:
        for k in range(tokens + 1):
            keep = reducer(batch, k)
            assert keep.shape == (images, k) and keep.dtype == torch.int64
            assert (keep.diff(dim=1) > 0).all()
            assert k == 0 or (keep.min() >= 0 and keep.max() < tokens)
            assert torch.equal(keep, torch.cat([reducer(image, k) for image in alone]))


@pytest.mark.parametrize("reducer", REDUCERS, ids=repr)
@pytest.mark.parametrize("kind", ["random", "repeated"])
def test_independent_of_the_batch_at_sizes_at_which_products_are_tiled(reducer, kind):
    batch = encode(5, 67, 131, kind)
    shuffled = torch.tensor([3, 0, 4, 1, 2])
    keep = reducer(batch, 29)
    assert torch.equal(keep[shuffled], reducer(part(batch, shuffled), 29))
    assert torch.equal(keep, torch.cat([reducer(part(batch, [image]), 29) for image in range(5)]))


@pytest.mark.parametrize("reducer", REDUCERS, ids=repr)
def test_bfloat16_input_selects_as_the_same_values_in_float32(reducer):
    low = encode(2, 20, 6, dtype=torch.bfloat16)
    fields = ("features_BND", "keys_BND", "projected_BND", "text_BD")
    high = replace(low, **{field: getattr(low, field).float() for field in fields})
    assert torch.equal(reducer(low, 7), reducer(high, 7))


@pytest.mark.parametrize("reducer", REDUCERS, ids=repr)
@pytest.mark.parametrize("kind", ["constant", "zero"])
def test_ties_go_to_the_lower_index(reducer, kind):
    batch = encode(2, 11, 4, kind)
    if kind == "zero":
        batch = replace(batch, attention_BN=torch.full((2, 11), 1 / 11))
    for k in range(12):
        assert reducer(batch, k).tolist() == [list(range(k))] * 2


@pytest.mark.parametrize("order_BK", [mmr_order_BK, coverage_order_BK, dpp_order_BK])
def test_scores_equal_in_float32_are_a_tie(order_BK):
    """Batched products round the last bits of float64 differently, which must not choose a token."""
    apart_BNN = torch.eye(5, dtype=torch.float64)[None]
    weights_BN = torch.tensor([[0.5, 0.5 + 1e-12, 0.5 + 3e-12, 0.75, 0.5 + 2e-12]], dtype=torch.float64)
    assert order_BK(apart_BNN, weights_BN, 5).tolist() == [[3, 0, 1, 2, 4]]


@pytest.mark.parametrize("reducer", REDUCERS, ids=repr)
def test_unknown_budgets_are_refused(reducer):
    for budget in (-1, 6):
        with pytest.raises(ValueError, match=f"budget: {budget} is out of range, allowed: 0 to 5 tokens"):
            reducer(encode(1, 5, 3), budget)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("width", [3, 8])
def test_divprune_is_max_min(seed, width):
    batch = encode(1, 12, width, seed=seed)
    distance = 1 - cosines(batch.projected_BND[0])

    def score(token, chosen):
        others = chosen or [other for other in range(12) if other != token]
        return min(distance[token, other] for other in others)

    assert_each_is_best(order_of(DivPrune(), batch), score)
    on_features = replace(batch, features_BND=batch.projected_BND, projected_BND=None)
    assert order_of(DivPrune(on="features"), on_features) == order_of(DivPrune(), batch)


def determinant_ratio(kernel, cosine, rank):
    """Factor by which a token changes the determinant of those chosen since the rank was last spent."""

    def score(token, chosen):
        chosen = chosen[len(chosen) // rank * rank :]
        both, explained = [*chosen, token], np.linalg.det(cosine[np.ix_(chosen, chosen)])
        # det L = prod w^2 det S: without the w of the chosen, which may be 0.
        return kernel[token] ** 2 * np.linalg.det(cosine[np.ix_(both, both)]) / explained

    return score


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("width", [2, 3, 8])
@pytest.mark.parametrize("sign", [1, -1])
def test_cdpruner_is_the_greedy_determinant(seed, width, sign):
    batch = encode(1, 9, width, seed=seed)
    cosine = cosines(batch.projected_BND[0])
    text, projected = batch.text_BD[0].double().numpy(), batch.projected_BND[0].double().numpy()
    relevance = stretched([sign * (v @ text) / np.linalg.norm(v) for v in projected])
    score = determinant_ratio(relevance, cosine, min(width, 9))
    assert_each_is_best(order_of(CDPruner(sign=sign), batch), score)
    without = order_of(CDPruner(text=False), batch)
    assert_each_is_best(without, determinant_ratio(np.ones(9), cosine, min(width, 9)))


def test_the_determinant_is_that_of_the_weighted_kernel():
    batch = encode(1, 8, 8)
    weight, similarity = torch.rand(1, 8) + 0.1, exact_cosines_BNN(batch.features_BND)
    order = dpp_order_BK(similarity, weight, 5)[0].tolist()
    kernel = np.diag(weight[0]) @ cosines(batch.features_BND[0]) @ np.diag(weight[0])
    for k in range(1, 6):
        best = max(
            (other for other in range(8) if other not in order[: k - 1]),
            key=lambda other: np.linalg.slogdet(kernel[np.ix_(rows := [*order[: k - 1], other], rows)])[1],
        )
        assert order[k - 1] == best


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("pivots", [1, 4])
@pytest.mark.parametrize("k", [1, 3, 4, 5, 10, 11, 14])
def test_dart_keeps_the_tokens_least_similar_to_its_pivots(seed, pivots, k):
    batch = encode(1, 14, 6, seed=seed)
    cosine, norms = cosines(batch.features_BND[0]), [sum(map(abs, key)) for key in batch.keys_BND[0].tolist()]
    first = sorted(range(14), key=lambda token: -norms[token])[: min(pivots, k)]
    kept = list(first)
    for place, pivot in enumerate(first):
        rest = sorted((t for t in range(14) if t not in kept), key=lambda token: cosine[pivot, token])
        whole, more = divmod(k - len(first), len(first))
        kept += rest[: whole + (place < more)]
    assert Dart(pivots)(batch, k).tolist() == [sorted(kept)]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.0])
def test_scope_is_coverage_times_saliency(seed, alpha):
    batch = encode(1, 12, 5, seed=seed)
    cosine = cosines(batch.features_BND[0])

    def score_by(saliency):
        def score(token, chosen):
            covered = [max([0.0, *(cosine[i, j] for j in chosen)]) for i in range(12)]
            return sum(max(0.0, cosine[i, token] - covered[i]) for i in range(12)) * saliency[token] ** alpha

        return score

    assert_each_is_best(order_of(Scope(alpha=alpha), batch), score_by(batch.attention_BN[0].tolist()))
    learned = stretched(batch.features_BND[0, :, 0])
    assert_each_is_best(order_of(Scope(SCORER, alpha), batch), score_by(learned))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("balance", [0.0, 0.4, 1.0])
def test_mmr_is_importance_less_redundancy(seed, balance):
    batch = encode(1, 12, 5, seed=seed)
    cosine = cosines(batch.features_BND[0])

    def score_by(importance):
        def score(token, chosen):
            if not chosen:
                return importance[token]
            return balance * importance[token] - (1 - balance) * max(cosine[token, j] for j in chosen)

        return score

    assert_each_is_best(order_of(MMR(balance=balance), batch), score_by(stretched(batch.attention_BN[0])))
    learned = stretched(batch.features_BND[0, :, 0])
    assert_each_is_best(order_of(MMR(SCORER, balance), batch), score_by(learned))


def test_copies_are_kept_only_after_all_distinct_tokens():
    """The release of DivPrune keeps 100 distinct tokens for a budget of 200 if each is there twice."""
    batch = encode(2, 100, 120)
    twice = torch.arange(100).repeat_interleave(2)
    batch = replace(
        batch,
        features_BND=batch.features_BND[:, twice],
        projected_BND=batch.projected_BND[:, twice],
        attention_BN=batch.attention_BN[:, twice],
        keys_BND=batch.keys_BND[:, twice],
        grid=None,
    )
    for reducer in (DivPrune(), CDPruner(text=False), Scope(alpha=0.0), MMR(balance=0.0)):
        assert reducer(batch, 100).tolist() == [list(range(0, 200, 2))] * 2
    for reducer in REDUCERS:
        for budget in (150, 200):
            assert [len(set(row)) for row in reducer(batch, budget).tolist()] == [budget] * 2


@pytest.mark.parametrize("text", [True, False])
def test_tokens_beyond_the_rank_are_distinct_and_diverse(text):
    """The release of CDPruner keeps 84 distinct tokens for a budget of 128 if the features are narrower."""
    batch = encode(2, 256, 20)
    keep = CDPruner(text=text)(batch, 128)
    assert [len(set(row)) for row in keep.tolist()] == [128] * 2
    order = dpp_order_BK(exact_cosines_BNN(batch.projected_BND), torch.ones(2, 256), 60)
    for start in (0, 20, 40):
        chosen = batch.projected_BND.take_along_dim(order[:, start : start + 20, None], dim=1)
        assert (torch.linalg.matrix_rank(chosen) == 20).all()
        # Twenty random ones have a least singular value of .03 in the median, above .07 one time in ten.
        assert (torch.linalg.svdvals(torch.nn.functional.normalize(chosen, dim=-1)).amin(-1) > 0.1).all()


def test_dart_counts_its_pivots():
    """The release of DART keeps 132 tokens for a budget of 128."""
    batch = encode(1, 576, 16)
    keep = Dart()(batch, 128)
    assert keep.shape == (1, 128)
    assert set(batch.keys_BND.abs().sum(-1).topk(4).indices[0].tolist()) <= set(keep[0].tolist())


def test_relevance_is_scaled_in_each_image():
    """The release of CDPruner scales over the batch: a narrow range beside a wide one is constant."""
    batch = encode(2, 40, 16)
    narrow = batch.projected_BND[0] + 10 * batch.projected_BND[0].mean(0)
    batch = replace(batch, projected_BND=torch.stack([narrow, batch.projected_BND[1]]))
    together = CDPruner()(batch, 10)
    assert torch.equal(together[:1], CDPruner()(part(batch, [0]), 10))
    assert not torch.equal(together[0], CDPruner(text=False)(batch, 10)[0])


def test_the_question_changes_the_selection_of_cdpruner_alone():
    batch = encode(1, 40, 16)
    other = replace(batch, text_BD=-batch.text_BD)
    assert torch.equal(CDPruner(sign=-1)(batch, 9), CDPruner()(other, 9))
    for reducer, moves in ((CDPruner(), True), (CDPruner(text=False), False), (DivPrune(), False)):
        assert torch.equal(reducer(batch, 9), reducer(other, 9)) != moves


def test_an_order_is_computed_once_for_smaller_budgets():
    batch, asked = encode(3, 20, 6), []
    for make in (MMR, Scope):
        reducer = make(FirstChannel(asked))
        kept = {k: reducer(batch, k) for k in (15, 4, 9)}
        assert asked == [3]
        for k, keep in kept.items():
            assert torch.equal(keep, make(SCORER)(batch, k))
        assert torch.equal(reducer(encode(3, 20, 6, seed=1), 4), make(SCORER)(encode(3, 20, 6, seed=1), 4))
        asked.clear()


def test_a_trained_selector_gives_the_importance():
    torch.manual_seed(0)
    selector = FeatureSelector(width=8, grid=(3, 4), layers=1, heads=2).eval()
    torch.nn.init.normal_(selector.trunk.head.weight)
    trained: Scorer = SelectorReducer(selector)
    batch = replace(encode(3, 12, 8), grid=(3, 4))
    assert torch.equal(MMR(trained, balance=1.0)(batch, 5), trained(batch, 5))
    assert not torch.equal(MMR(trained, balance=0.1)(batch, 5), trained(batch, 5))
    assert MMR(trained).needs == Scope(trained).needs == {"grid"}
    assert Scope(trained, on="projected").needs == {"grid", "projected_BND"}


def test_orders_take_float32_similarity_and_any_importance():
    batch = encode(2, 9, 4)
    similarity, importance = exact_cosines_BNN(batch.features_BND).float(), 7 * batch.attention_BN - 3
    for order in (
        max_min_order_BK(similarity, 9),
        mmr_order_BK(similarity, importance, 9),
        coverage_order_BK(similarity, importance, 9),
        dpp_order_BK(similarity, importance, 9),
    ):
        assert order.sort(dim=1).values.tolist() == [list(range(9))] * 2


@pytest.mark.parametrize(
    ("reducer", "needs"),
    [
        (DivPrune(), {"projected_BND"}),
        (DivPrune(on="features"), set()),
        (CDPruner(), {"projected_BND", "text_BD"}),
        (CDPruner(on="features"), {"projected_BND", "text_BD"}),
        (CDPruner(text=False), {"projected_BND"}),
        (CDPruner(text=False, on="features"), set()),
        (Dart(), {"keys_BND"}),
        (Scope(), {"attention_BN"}),
        (Scope(on="projected"), {"attention_BN", "projected_BND"}),
        (MMR(), {"attention_BN"}),
        (MMR(SCORER), {"grid"}),
    ],
    ids=lambda value: repr(sorted(value) if isinstance(value, set) else value),
)
def test_reducers_read_only_the_fields_they_need(reducer, needs):
    batch = encode(1, 10, 4)
    optional = {"grid", "attention_BN", "keys_BND", "projected_BND", "text_BD"}
    assert reducer.needs == needs
    bare = replace(batch, **dict.fromkeys(optional - needs))
    assert torch.equal(reducer(bare, 4), reducer(batch, 4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DivPrune(on="pixels"), "on: 'pixels' is unknown, allowed: features, projected"),
        (lambda: CDPruner(on="text"), "on: 'text' is unknown"),
        (lambda: CDPruner(sign=0), "sign: 0 is not allowed, allowed: 1, -1"),
        (lambda: Dart(pivots=0), "pivots: 0 is out of range, allowed: 1 or more"),
        (lambda: Scope(alpha=-1.0), "alpha: -1.0 is out of range, allowed: 0 or more"),
        (lambda: MMR(balance=1.5), "balance: 1.5 is out of range, allowed: a fraction 0 <= balance <= 1"),
    ],
)
def test_options_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()
