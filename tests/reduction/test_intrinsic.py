"""The measures against plain arithmetic, on reducers and nets whose answers are known."""

import weakref
from dataclasses import dataclass, field
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atr.core.tokens import budget
from atr.reduction import FeatureSelector, SelectorReducer, intrinsic
from atr.reduction.intrinsic import HeldOutBatch, Selection
from atr.reduction.peers.random import Random
from atr.reduction.registry import build_reducer

GRID, TOKENS, WIDTH = (3, 4), 12, 8


class Echo:
    """Restores what it is shown, and nothing of the rest; features of variance 2."""

    selector = SimpleNamespace(standardise=SimpleNamespace(variance=torch.tensor(2.0)))

    def restore(self, features_BND, mask_BN, grid):
        return features_BND * mask_BN[..., None]


@dataclass(frozen=True)
class First:
    """The first tokens, of those from `start` on."""

    start: int = 0
    needs: frozenset = field(default=frozenset())

    def __call__(self, encoded, budget):
        return torch.arange(self.start, self.start + budget).repeat(len(encoded.features_BND), 1)


@dataclass(frozen=True)
class Doubling(First):
    """Merges, by doubling the tokens that it keeps."""

    def merge(self, encoded, budget):
        keep_BK = self(encoded, budget)
        return keep_BK, 2 * encoded.features_BND[:, :budget]


def images(*sizes, written=((0.1, 0.1), (0.9, 0.9), (0.9, 0.95), (0.3, 0.0))):
    """Batches of these sizes; all the same images however they are batched."""
    features_IND = torch.randn(sum(sizes), TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    parts = features_IND.bfloat16().split(sizes)
    return [HeldOutBatch.of({"features_BND": part, "grid": GRID}, [written] * len(part)) for part in parts]


def test_what_is_not_restored_is_the_energy_of_what_was_dropped_over_the_variance():
    (batch,) = images(5)
    for count in range(1, TOKENS + 1):
        dropped = batch.encoded.features_BND[:, count:].float().square().sum() / (5 * TOKENS * WIDTH)
        kept = Selection.of(First(), batch.encoded, count / TOKENS)
        assert intrinsic.unexplained(Echo(), batch, kept) / 5 == pytest.approx(dropped.item() / 2, rel=1e-5)


def test_a_merger_is_judged_by_its_own_tokens_and_has_no_coverage_and_no_masks():
    batches = images(5)
    features_BND = batches[0].encoded.features_BND.float()
    # A token that is doubled leaves an error of its own size: as much as one that is dropped.
    expected = features_BND.square().sum().item() / (5 * TOKENS * WIDTH) / 2
    lines = intrinsic.measure_lines([Doubling()], {"echo": Echo()}, batches, [0.5])
    assert lines == {"echo": [pytest.approx(expected, rel=1e-5)], "text_coverage": None}
    assert intrinsic.kept_indices([Doubling()], batches, 0.5) is None


def test_a_character_is_covered_where_the_token_its_centre_lies_in_is_kept():
    (batch,) = images(2)
    assert batch.text_BN.tolist() == [[1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]] * 2
    lines = intrinsic.measure_lines([First()], {}, [batch], [1 / 12, 2 / 12, 11 / 12, 1.0])
    assert lines["text_coverage"] == [0.25, 0.5, 0.5, 1.0]
    assert intrinsic.measure_lines([First(11)], {}, [batch], [1 / 12])["text_coverage"] == [0.5]


@given(x=st.floats(0, 1, exclude_max=True), y=st.floats(0, 1, exclude_max=True))
def test_the_patch_of_a_centre_is_the_one_that_holds_it(x, y):
    (batch,) = images(1, written=((x, y),))
    ((_, place),) = batch.text_BN.nonzero().tolist()
    row, column = divmod(place, GRID[1])
    assert row <= y * GRID[0] < row + 1 and column <= x * GRID[1] < column + 1


def test_without_text_there_is_no_coverage():
    assert intrinsic.measure_lines([First()], {}, images(2, written=()), [0.5])["text_coverage"] is None


def test_one_that_draws_has_the_mean_of_its_seeds():
    batches = images(4, 3)
    reducers = [Random(seed) for seed in range(3)]
    together = intrinsic.measure_lines(reducers, {"echo": Echo()}, batches, [0.3, 0.6])
    alone = [
        intrinsic.measure_lines([reducer], {"echo": Echo()}, batches, [0.3, 0.6]) for reducer in reducers
    ]
    for name in together:
        means = [sum(values) / 3 for values in zip(*(lines[name] for lines in alone), strict=True)]
        assert together[name] == pytest.approx(means)
        assert len({tuple(lines[name]) for lines in alone}) == 3


def test_batches_do_not_matter():
    once, parts = (
        intrinsic.measure_lines([Random()], {"echo": Echo()}, batches, [0.4])
        for batches in (images(7), images(3, 4))
    )
    assert once["echo"] == pytest.approx(parts["echo"], rel=1e-6)
    assert once["text_coverage"] == pytest.approx(parts["text_coverage"])


@given(sets=st.lists(st.tuples(*[st.sets(st.integers(0, TOKENS - 1), min_size=1)] * 2), min_size=1))
def test_overlap_is_that_of_sets(sets):
    one, other = (
        torch.tensor([[token in pair[side] for token in range(TOKENS)] for pair in sets]) for side in (0, 1)
    )
    expected = sum(len(a & b) / len(a | b) for a, b in sets) / len(sets)
    assert intrinsic.iou([one], [other]) == pytest.approx(expected)


def test_kept_indices_come_by_seed_and_by_image_whatever_the_batches():
    drawn = [Random(0), Random(1)]
    kept = intrinsic.kept_indices(drawn, images(4, 3), 0.5)
    assert kept == intrinsic.kept_indices(drawn, images(7), 0.5)
    (batch,) = images(7)
    assert kept == [reducer(batch.encoded, 6).tolist() for reducer in drawn]


def selectors(count):
    made = []
    for seed in range(count):
        torch.manual_seed(seed)
        made.append(FeatureSelector(WIDTH, GRID, layers=1, heads=2))
        torch.nn.init.normal_(made[-1].trunk.head.weight)
    return made


def test_stability_is_the_mean_over_pairs_of_selectors():
    batches, made = images(3), selectors(3)
    found = intrinsic.selector_stability(made, batches, [0.25, 1.0])
    assert (found["keep"], found["seeds"], found["iou"][1]) == ([0.25, 1.0], 3, 1.0)
    kept = [SelectorReducer(selector)(batches[0].encoded, budget(0.25, TOKENS)).tolist() for selector in made]
    ratios = [
        len(set(a) & set(b)) / len(set(a) | set(b))
        for one, other in combinations(kept, 2)
        for a, b in zip(one, other, strict=True)
    ]
    assert found["iou"][0] == pytest.approx(sum(ratios) / len(ratios)) and found["iou"][0] < 1
    assert intrinsic.selector_stability([made[0], made[0]], batches, [0.25])["iou"] == [1.0]


def test_a_reducer_that_needs_a_language_model_cannot_be_measured():
    available = {"grid", "attention_BN"}
    assert intrinsic.why_not_measurable(First(needs=frozenset(available)), available) == ""
    asking = First(needs=frozenset({"text_BD", "projected_BND", "grid"}))
    reason = "needs projected_BND, text_BD, which a language model gives"
    assert intrinsic.why_not_measurable(asking, available) == reason
    reason = "chooses between the layers of a language model"
    assert intrinsic.why_not_measurable(build_reducer("fastv"), available) == reason


class Jealous(Echo):
    """Restores only where the features that it was shown before are no longer held."""

    def __init__(self):
        self.shown = []

    def restore(self, features_BND, mask_BN, grid):
        assert not any(reference() is not None for reference in self.shown)
        self.shown.append(weakref.ref(features_BND))
        return super().restore(features_BND, mask_BN, grid)


@pytest.mark.parametrize("drawn", [[Random(0), Random(1)], [Doubling()]])
def test_the_features_of_one_batch_alone_are_held_whatever_the_budgets_and_seeds(drawn):
    batches, keep = images(3, 4), [0.25, 0.5, 1.0]
    nets = {"one": Jealous(), "other": Jealous()}
    lines = intrinsic.measure_lines(drawn, nets, batches, keep)
    assert {len(net.shown) for net in nets.values()} == {len(drawn) * len(batches) * len(keep)}
    assert (
        lines["one"]
        == lines["other"]
        == intrinsic.measure_lines(drawn, {"echo": Echo()}, batches, keep)["echo"]
    )


def test_what_merges_is_held_for_one_batch_and_budget_at_a_time():
    made = []

    class Counted(Doubling):
        def merge(self, encoded, budget):
            keep_BK, merged_BKD = super().merge(encoded, budget)
            assert all(reference() is None for _, reference in made)
            made.append((budget, weakref.ref(merged_BKD)))
            return keep_BK, merged_BKD

    intrinsic.measure_lines([Counted()], {"echo": Echo()}, images(3, 4), [0.25, 0.5, 1.0])
    assert [budget for budget, _ in made] == [3, 6, 12, 3, 6, 12]


def test_a_batch_is_scored_once_for_all_fractions(monkeypatch):
    scored = []
    monkeypatch.setattr(
        FeatureSelector, "rank", lambda self, features_BND, grid: scored.append(1) or features_BND[..., 0]
    )
    (selector,) = selectors(1)
    intrinsic.measure_lines([SelectorReducer(selector)], {"echo": Echo()}, images(3, 4), [0.25, 0.5, 1.0])
    assert len(scored) == 2


def test_what_is_measured_becomes_curves():
    keep, batches = [0.25, 0.5], images(4)
    lines = intrinsic.measure_lines([First()], {"echo": Echo()}, batches, keep)
    stability = intrinsic.selector_stability(selectors(2), batches, keep)
    curves = dict(intrinsic.intrinsic_curves({"keep": keep, "lines": lines, "stability": stability}))
    assert set(curves[0.5]) == {"echo", "text_coverage", "stability"}
    assert curves[0.5]["echo"] == lines["echo"][1] and curves[0.25]["stability"] == stability["iou"][0]
    merged = intrinsic.measure_lines([Doubling()], {"echo": Echo()}, batches, keep)
    alone = dict(intrinsic.intrinsic_curves({"keep": keep, "lines": merged, "stability": None}))
    assert set(alone[0.25]) == {"echo"}
