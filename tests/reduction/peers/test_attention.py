"""Reducers that read attention, against their formulas in plain Python, one image at a time."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atr.reduction.base import Adaptive, Apportioner, EncoderOutput, Merger, Scorer
from atr.reduction.neighbour_merging import PruMerge
from atr.reduction.peers.class_attention import ClassAttention
from atr.reduction.peers.hired import HiRED, apportion
from atr.reduction.peers.holov import HoloV
from atr.reduction.peers.prumerge_plus import PruMergePlus
from atr.reduction.peers.visionzip import VisionZip
from atr.reduction.peers.vispruner import VisPruner
from atr.reduction.quotas import parts_N, quotas_BC

REDUCERS = {
    "class_attention": ClassAttention(),
    "hired": HiRED(),
    "prumerge": PruMerge(neighbours=5),
    "prumerge-release": PruMerge(neighbours=5, variant="release"),
    "prumerge_plus": PruMergePlus(neighbours=3),
    "prumerge-plus-half": PruMergePlus(uniform=0.5),
    "visionzip": VisionZip(),
    "visionzip-more": VisionZip(contextual=0.4),
    "visionzip-release": VisionZip(contextual=0.5, variant="release"),
    "vispruner": VisPruner(),
    "vispruner-distinct": VisPruner(important=0.0, step=3),
    "vispruner-important": VisPruner(important=1.0),
    "holov": HoloV(),
    "holov-release": HoloV(variant="release"),
    "holov-variance": HoloV(side=2, beta=5.0),
}
EVERY = pytest.mark.parametrize("name", REDUCERS)


def encoded(images=2, grid=(6, 6), width=8, seed=0, tokens="random", attention="random", dtype=torch.float32):
    """Random images; each depends only on the seed and its number."""
    rows = [one(grid, width, 100 * seed + image, tokens, attention) for image in range(images)]
    features_BND, attention_BN, first_BN, keys_BND = (torch.stack(part) for part in zip(*rows, strict=True))
    return EncoderOutput(features_BND.to(dtype), grid, attention_BN, first_BN, keys_BND.to(dtype))


def one(grid, width, seed, tokens, attention):
    generator, count = torch.Generator().manual_seed(seed), math.prod(grid)
    vectors = torch.randn(2, count, width, generator=generator)
    if tokens == "duplicated":
        vectors = vectors[:, torch.randint(0, 1 + count // 4, (count,), generator=generator)]
    elif tokens == "constant":
        vectors = vectors[:, :1].repeat(1, count, 1)
    elif tokens == "zero":
        vectors = torch.zeros_like(vectors)
    weights = torch.randn(2, count, generator=generator)
    if attention == "equal":
        weights = torch.zeros_like(weights)
    elif attention == "levels":
        weights = weights.round()
    elif attention == "concentrated":
        weights = torch.full_like(weights, -torch.inf)
        weights[:, int(torch.randint(0, count, (1,), generator=generator))] = 0
    own, first = weights.softmax(1)
    return vectors[0], own, first, vectors[1]


def row_of(batch, image):
    fields = ("features_BND", "attention_BN", "first_attention_BN", "keys_BND")
    features, *others = (getattr(batch, field)[image : image + 1] for field in fields)
    return EncoderOutput(features, batch.grid, *others)


batches = st.builds(
    encoded,
    images=st.integers(1, 3),
    grid=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    width=st.integers(1, 4),
    seed=st.integers(0, 10_000),
    tokens=st.sampled_from(["random", "duplicated", "constant", "zero"]),
    attention=st.sampled_from(["random", "equal", "levels", "concentrated"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)


@EVERY
@settings(deadline=None, max_examples=60)
@given(batch=batches, data=st.data())
def test_exactly_k_distinct_tokens_in_raster_order_in_any_batch(name, batch, data):
    reducer, k = REDUCERS[name], data.draw(st.integers(1, batch.tokens))
    keep = reducer(batch, k)
    assert keep.shape == (len(batch.features_BND), k) and keep.dtype == torch.int64
    assert (keep.diff(dim=1) > 0).all() and keep.min() >= 0 and keep.max() < batch.tokens
    for image in range(len(keep)):
        assert torch.equal(reducer(row_of(batch, image), k)[0], keep[image])


@pytest.mark.parametrize("name", [name for name in REDUCERS if isinstance(REDUCERS[name], Merger)])
@settings(deadline=None, max_examples=40)
@given(batch=batches, data=st.data())
def test_merged_features_do_not_depend_on_the_batch(name, batch, data):
    reducer, k = REDUCERS[name], data.draw(st.integers(1, batch.tokens))
    keep, merged = reducer.merge(batch, k)
    assert torch.equal(keep, reducer(batch, k))
    assert merged.shape == (*keep.shape, batch.features_BND.shape[2])
    assert merged.dtype == batch.features_BND.dtype and merged.isfinite().all()
    for image in range(len(keep)):
        assert torch.equal(reducer.merge(row_of(batch, image), k)[1][0], merged[image])


@pytest.mark.parametrize("name", REDUCERS)
def test_every_budget_of_images_with_duplicates_and_more_tokens_than_channels(name):
    for tokens, attention in (("duplicated", "levels"), ("constant", "equal"), ("random", "concentrated")):
        batch = encoded(3, (5, 7), 2, tokens=tokens, attention=attention)
        for k in range(1, 36):
            keep = REDUCERS[name](batch, k)
            assert keep.shape == (3, k) and (keep.diff(dim=1) > 0).all() and keep.max() < 35


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["prumerge", "prumerge_plus", "visionzip", "visionzip-release"])
def test_nothing_is_merged_if_all_tokens_are_kept(name, dtype):
    batch = encoded(dtype=dtype)
    keep, merged = REDUCERS[name].merge(batch, 36)
    assert torch.equal(merged, batch.features_BND)
    assert keep.tolist() == [list(range(36))] * 2


@EVERY
def test_impossible_budgets_and_missing_fields_are_refused(name):
    reducer, batch = REDUCERS[name], encoded()
    for k in (-1, 37):
        with pytest.raises(ValueError, match=rf"{k} is out of range, allowed: .*36 tokens"):
            reducer(batch, k)
    assert reducer(batch, 0).shape == (2, 0)
    with pytest.raises(ValueError, match="attention_BN was not encoded"):
        reducer(EncoderOutput(batch.features_BND, batch.grid), 5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HiRED(alpha=1.1), "alpha: 1.1 is out of range, allowed: a fraction 0 <= alpha <= 1"),
        (lambda: PruMerge(variant="ours"), "variant: 'ours' is unknown, allowed: paper, release"),
        (lambda: PruMerge(neighbours=-1), "neighbours: -1 is out of range"),
        (lambda: PruMergePlus(uniform=-0.1), "uniform: -0.1 is out of range"),
        (lambda: VisionZip(contextual=2), "contextual: 2 is out of range"),
        (lambda: VisionZip(variant="mean"), "variant: 'mean' is unknown"),
        (lambda: VisPruner(important=1.5), "important: 1.5 is out of range"),
        (lambda: VisPruner(step=0), "step: 0 is out of range, allowed: 1 or more"),
        (lambda: HoloV(side=0), "side: 0 is out of range, allowed: 1 or more"),
        (lambda: HoloV(beta=-1.0), "beta: -1.0 is out of range, allowed: 0 or more"),
        (lambda: HoloV(variant="v2"), "variant: 'v2' is unknown"),
    ],
)
def test_options_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_protocols_of_each_reducer():
    can = {
        name: [kind.__name__ for kind in (Scorer, Merger, Adaptive, Apportioner) if isinstance(reducer, kind)]
        for name, reducer in REDUCERS.items()
    }
    assert can["class_attention"] == ["Scorer"] and can["hired"] == ["Scorer", "Apportioner"]
    assert can["prumerge"] == ["Merger", "Adaptive"]
    assert can["prumerge_plus"] == can["visionzip"] == ["Merger"]
    assert can["vispruner"] == can["holov"] == []


def best(values, k):
    """Indices of the k highest values, highest first, ties to the lower index."""
    return sorted(range(len(values)), key=lambda place: (-values[place], place))[:k]


def cosine(one, other):
    return float(one @ other / np.sqrt((one @ one) * (other @ other)))


def numbers(batch, image):
    fields = (batch.features_BND, batch.keys_BND, batch.attention_BN)
    return (field[image].double().numpy() for field in fields)


def floor(fraction, k):
    return math.floor(Fraction(str(fraction)) * k)


def spread(count, places):
    """Elements at an even stride."""
    return [places[index * len(places) // count] for index in range(count)]


def with_neighbours(features, keys, attention, keep, neighbours, among_all):
    merged = []
    for i in keep:
        others = [j for j in range(len(features)) if (j != i if among_all else j not in keep)]
        near = [others[place] for place in best([cosine(keys[i], keys[j]) for j in others], neighbours)]
        merged.append(features[i] + sum((attention[j] * features[j] for j in near), np.zeros(1)))
    return np.stack(merged)


def prumerge(reducer, batch, image, k):
    features, keys, attention = numbers(batch, image)
    keep = sorted(best(attention, k))
    among_all = reducer.variant == "release"
    return keep, with_neighbours(features, keys, attention, keep, reducer.neighbours, among_all)


def prumerge_plus(reducer, batch, image, k):
    features, keys, attention = numbers(batch, image)
    samples = floor(reducer.uniform, k)
    top = best(attention, k - samples)
    keep = sorted([*top, *spread(samples, [j for j in range(len(attention)) if j not in top])])
    return keep, with_neighbours(features, keys, attention, keep, reducer.neighbours, False)


def visionzip(reducer, batch, image, k):
    features, keys, attention = numbers(batch, image)
    contextual = floor(reducer.contextual, k)
    dominant = best(attention, k - contextual)
    rest = [j for j in range(len(attention)) if j not in dominant]
    targets = spread(contextual, rest)
    groups = {target: [] for target in targets}
    for j in rest:
        if j not in targets and targets:
            groups[max(targets, key=lambda target: cosine(keys[j], keys[target]))].append(j)
    merged = {i: features[i] for i in dominant}
    for target, group in groups.items():
        if reducer.variant == "paper":
            merged[target] = np.mean([features[j] for j in [target, *group]], axis=0)
        else:
            mean = np.mean([features[j] for j in group], axis=0) if group else 0
            merged[target] = features[target] + mean
    keep = sorted(merged)
    return keep, np.stack([merged[i] for i in keep])


def vispruner(reducer, batch, image, k):
    features, _, attention = numbers(batch, image)
    order, first = best(attention, len(attention)), floor(reducer.important, k)
    important, rest = order[:first], order[first:]
    wanted = k - len(important)
    while wanted and len(rest) > wanted:
        even, odd = rest[::2], rest[1::2]
        nearest = [max(cosine(features[i], features[j]) for j in odd) for i in even]
        gone = min(reducer.step, len(rest) - wanted)
        rest = [even[place] for place in best(nearest, len(even))[gone:]] + odd
    return sorted([*important, *(rest if wanted else [])]), None


def quotas(total, weights, sizes):
    """The split in exact fractions: parts that overflow are filled first, then the largest remainders."""
    weights, full = [Fraction(weight) for weight in weights], set()
    while True:
        left = total - sum(sizes[part] for part in full)
        free = [part for part in range(len(sizes)) if part not in full]
        if not any(weights[part] for part in free):
            weights = [Fraction(size) for size in sizes]
        shares = {part: left * weights[part] / sum(weights[p] for p in free) for part in free if left}
        over = {part for part, share in shares.items() if share >= sizes[part]}
        if not over:
            break
        full |= over
    counts = [sizes[part] if part in full else math.floor(shares.get(part, 0)) for part in range(len(sizes))]
    rests = [shares.get(part, 0) - counts[part] if part not in full else 0 for part in range(len(sizes))]
    for part in best(rests, total - sum(counts)):
        counts[part] += 1
    return counts


def holov(reducer, batch, image, k):
    features, _, attention = numbers(batch, image)
    rows, columns = batch.grid
    if reducer.variant == "paper":
        high, wide = min(reducer.side, rows), min(reducer.side, columns)
        crop_of = [r * high // rows * wide + c * wide // columns for r in range(rows) for c in range(columns)]
    else:
        crops = min(reducer.side**2, rows * columns)
        crop_of = [token * crops // (rows * columns) for token in range(rows * columns)]
    crops = [[t for t, crop in enumerate(crop_of) if crop == c] for c in range(max(crop_of) + 1)]
    variance = np.zeros(len(attention))
    for crop in crops:
        for i in crop:
            similar = [cosine(features[i], features[j]) for j in crop if j != i]
            variance[i] = np.var(similar) if similar else 0
    scores = []
    for crop in crops:
        whole = range(len(attention)) if reducer.variant == "paper" else crop
        scale = np.mean(attention[list(whole)]) / (np.mean(variance[list(whole)]) + 1e-6)
        scores.append(np.mean([attention[i] + reducer.beta * scale * variance[i] for i in crop]))
    counts = quotas(k, scores, [len(crop) for crop in crops])
    kept = [crop[p] for crop, n in zip(crops, counts, strict=True) for p in best(attention[crop], n)]
    return sorted(kept), None


def class_attention(reducer, batch, image, k):
    return sorted(best(batch.attention_BN[image].tolist(), k)), None


LITERAL = {
    ClassAttention: class_attention,
    HiRED: class_attention,
    PruMerge: prumerge,
    PruMergePlus: prumerge_plus,
    VisionZip: visionzip,
    VisPruner: vispruner,
    HoloV: holov,
}


@EVERY
@pytest.mark.parametrize(("grid", "seed"), [((6, 6), 0), ((5, 7), 1), ((3, 9), 2), ((1, 6), 3)])
def test_each_reducer_equals_its_transcribed_formula(name, grid, seed):
    reducer, batch = REDUCERS[name], encoded(2, grid, seed=seed)
    for k in range(1, batch.tokens + 1):
        keep = reducer(batch, k)
        merged = reducer.merge(batch, k)[1].double() if isinstance(reducer, Merger) else None
        for image in range(2):
            expected, features = LITERAL[type(reducer)](reducer, batch, image, k)
            assert keep[image].tolist() == expected
            if merged is not None:
                np.testing.assert_allclose(merged[image], features, rtol=1e-5, atol=1e-6)


def test_the_released_splits_of_visionzip():
    for k, contextual in ((64, 10), (128, 20), (192, 30)):
        batch = encoded(1, (24, 24), 4, tokens="constant")
        keep, merged = VisionZip().merge(batch, k)
        dominant = set(best(batch.attention_BN[0].tolist(), k - contextual))
        assert dominant < set(keep[0].tolist()) and keep.shape == (1, k)
        assert merged.shape == (1, k, 4)
        assert not dominant < set(VisionZip(contextual=(contextual + 1) / k)(batch, k)[0].tolist())


def test_prumerge_counts_the_outliers_of_each_image_alone():
    batch = encoded(4, (8, 9), attention="levels")
    counts = PruMerge().counts(batch)
    expected = []
    for attention in batch.attention_BN.double().numpy():
        low, high = np.percentile(attention, [25, 75])
        expected.append(int((attention > high + 1.5 * (high - low)).sum()))
    assert counts.tolist() == expected and counts.dtype == torch.int64
    assert min(expected) > 0 and len(set(expected)) > 1
    sharp = batch.attention_BN.clone()
    sharp[1:] = 1e6 * sharp[1:]  # would raise the quartiles of the batch
    again = PruMerge().counts(EncoderOutput(batch.features_BND, batch.grid, sharp))
    assert again[0] == counts[0] and torch.equal(again, counts)
    assert PruMerge().counts(encoded(2, attention="equal")).tolist() == [0, 0]


def test_prumerge_weighs_the_nearest_neighbours_by_their_attention():
    keys = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.5, 0.5]])
    features = torch.eye(4)[None]
    batch = EncoderOutput(features, (2, 2), torch.tensor([[0.5, 0.2, 0.1, 0.2]]), keys_BND=keys[None])
    keep, merged = PruMerge(neighbours=2).merge(batch, 1)
    assert keep.tolist() == [[0]]
    torch.testing.assert_close(merged, torch.tensor([[[1.0, 0.2, 0.0, 0.2]]]))
    _, merged = PruMerge(neighbours=2).merge(batch, 2)
    torch.testing.assert_close(merged, torch.tensor([[[1.0, 0, 0.1, 0.2], [0, 1.0, 0.1, 0.2]]]))
    _, merged = PruMerge(neighbours=1, variant="release").merge(batch, 2)
    torch.testing.assert_close(merged, torch.tensor([[[1.0, 0.2, 0, 0], [0.5, 1.0, 0, 0]]]))


def test_prumerge_outliers_depend_on_the_spread_of_attention():
    attention = torch.cat([torch.linspace(1000, 1100, 9), torch.tensor([1149.0, 1200.0, 1300.0])])[None]
    low, high = np.percentile(attention.numpy(), [25, 75])
    assert 1149 < high + 1.5 * (high - low) < 1300
    expected = int((attention > high + 1.5 * (high - low)).sum())
    batch = EncoderOutput(torch.ones(1, 12, 4), (3, 4), attention_BN=attention)
    assert PruMerge().counts(batch).tolist() == [expected] and expected > 0


def test_prumerge_plus_keeps_its_count_if_attention_chose_the_evenly_spread_tokens():
    batch = encoded(1, (6, 6))
    attention = torch.rand(1, 36)
    attention[:, ::4] += 1
    batch = EncoderOutput(batch.features_BND, batch.grid, attention, keys_BND=batch.keys_BND)
    keep = PruMergePlus(uniform=0.5)(batch, 18)[0]
    assert len(keep) == 18 and set(range(0, 36, 4)) <= set(keep.tolist())


def test_holov_keeps_its_count_under_concentrated_attention():
    attention = torch.full((1, 64), 1e-6)
    attention[:, :2] = 0.4  # the crop of tokens 0, 1, 8 and 9
    batch = EncoderOutput(encoded(1, (8, 8)).features_BND, (8, 8), attention)
    for beta in (0.0, 0.09):
        keep = HoloV(beta=beta)(batch, 34)[0].tolist()
        assert {0, 1, 8, 9} < set(keep) and len(set(keep)) == 34
    keep = HoloV(beta=0.0)(batch, 34)[0]
    per_crop = torch.bincount(parts_N((8, 8), (4, 4))[keep])
    assert per_crop.tolist() == [4] + [2] * 15
    nothing = EncoderOutput(batch.features_BND, (8, 8), (torch.arange(64) == 9).float()[None])
    assert len(set(HoloV(beta=0.0)(nothing, 50)[0].tolist())) == 50


def test_holov_of_the_release_does_not_depend_on_the_variance():
    batch = encoded(3, (8, 8))
    kept = [HoloV(beta=beta, variant="release")(batch, 20) for beta in (0.0, 0.09)]
    assert torch.equal(*kept)
    assert not torch.equal(HoloV(beta=0.0)(batch, 20), HoloV(beta=5.0)(batch, 20))


def test_vispruner_keeps_one_of_several_equal_tokens():
    """Nine kinds of four equal tokens each: none is kept twice among nine diverse tokens."""
    kinds = torch.eye(9).repeat_interleave(4, 0)
    features = torch.stack(
        [kinds[torch.randperm(36, generator=torch.Generator().manual_seed(s))] for s in (1, 2)]
    )
    batch = EncoderOutput(features, (6, 6), torch.linspace(2, 1, 36).repeat(2, 1))
    keep = VisPruner(important=0.0, step=1)(batch, 9)
    for image in range(2):
        assert len(features[image][keep[image]].argmax(1).unique()) == 9


@settings(deadline=None)
@given(st.data())
def test_quotas_equal_the_split_in_exact_fractions(data):
    parts = data.draw(st.integers(1, 8))
    weights = data.draw(st.lists(st.integers(0, 9), min_size=parts, max_size=parts))
    sizes = data.draw(st.lists(st.integers(0, 12), min_size=parts, max_size=parts))
    total = data.draw(st.integers(0, sum(sizes)))
    rows = torch.tensor([weights, weights[::-1]])
    counts = quotas_BC(total, rows, torch.tensor(sizes))
    assert counts[0].tolist() == quotas(total, weights, sizes)
    for row in counts.tolist():
        assert sum(row) == total
        assert all(0 <= count <= size for count, size in zip(row, sizes, strict=True))
    with pytest.raises(ValueError, match=rf"budget: {sum(sizes) + 1} is out of range"):
        quotas_BC(sum(sizes) + 1, rows, torch.tensor(sizes))


def test_parts_of_a_grid_are_even_and_none_is_empty():
    assert parts_N((2, 4), (2, 2)).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert parts_N((3, 3), (2, 1)).tolist() == [0] * 6 + [1] * 3
    for rows in range(1, 9):
        for parts in range(1, rows + 1):
            sizes = torch.bincount(parts_N((rows, 1), (parts, 1)))
            assert len(sizes) == parts and sizes.min() >= 1 and sizes.max() - sizes.min() <= 1


def hired(budget, first, grid, arrangement, sizes, alpha):
    """HiRED's budgets: alpha for the whole image, the rest by the sums of attention over the regions."""
    whole = max(min(math.floor(alpha * budget), sizes[0]), budget - sum(sizes[1:]))
    (rows, columns), (high, wide) = grid, arrangement
    mass = [0.0] * (high * wide)
    for row in range(rows):
        for column in range(columns):
            mass[row * high // rows * wide + column * wide // columns] += first[row * columns + column]
    return [whole, *quotas(budget - whole, mass, sizes[1:])]


@settings(deadline=None)
@given(st.data())
def test_hired_budgets_equal_their_transcription(data):
    grid = data.draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    arrangement = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    # Whole numbers, so that the sums are exact.
    count = math.prod(grid)
    first = data.draw(st.lists(st.integers(0, 9), min_size=count, max_size=count))
    most = st.integers(0, count)
    sizes = [count, *(data.draw(most) for _ in range(math.prod(arrangement)))]
    budget = data.draw(st.integers(0, sum(sizes)))
    alpha = data.draw(st.sampled_from([0.0, 0.25, 0.5, 1.0]))
    counts = apportion(budget, torch.tensor(first).float(), grid, arrangement, sizes, alpha)
    assert counts == hired(budget, first, grid, arrangement, sizes, alpha)
    assert sum(counts) == budget
    assert all(0 <= kept <= size for kept, size in zip(counts, sizes, strict=True))


def test_hired_redistributes_remainders_and_the_excess_of_a_tile():
    first = torch.zeros(36)
    first[:3], first[3:6] = 2.0, 1.0  # the upper tiles
    grid, arrangement = (6, 6), (2, 2)
    assert apportion(21, first, grid, arrangement, [36] * 5) == [10, 7, 4, 0, 0]  # 7.33 and 3.67
    assert apportion(96, first, grid, arrangement, [36] * 5) == [36, 36, 24, 0, 0]
    assert apportion(120, first, grid, arrangement, [36] * 5) == [36, 36, 36, 6, 6]
    assert apportion(170, first, grid, arrangement, [36, 30, 36, 32, 36]) == [36, 30, 36, 32, 36]
    assert apportion(20, first, grid, (0, 0), [36]) == [20]
    with pytest.raises(ValueError, match="budget: 37 is out of range, allowed: 0 to 36 tokens"):
        apportion(37, first, grid, (0, 0), [36])


def test_hired_reads_the_first_layer_of_the_tile_that_shows_the_image():
    batch = encoded(5, (4, 4))
    counts = HiRED(alpha=0.25).apportion(batch, 2, (1, 2), 20, [16, 16, 16])
    halves = batch.first_attention_BN[2].reshape(4, 4).double().numpy()
    mass = [halves[:, :2].sum(), halves[:, 2:].sum()]
    assert counts == [5, *quotas(15, mass, [16, 16])]
    with pytest.raises(ValueError, match="first_attention_BN was not encoded"):
        HiRED().apportion(
            EncoderOutput(batch.features_BND, (4, 4), batch.attention_BN), 0, (1, 2), 20, [16] * 3
        )
