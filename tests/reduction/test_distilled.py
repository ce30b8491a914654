"""The reducer of a selector distilled from a language model."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from atr.reduction import EncoderOutput, FeatureSelector, SelectorReducer
from atr.reduction.coverage import Scope
from atr.reduction.distilled import DistilledReducer
from atr.reduction.registry import build_reducer


@pytest.fixture
def selector():
    torch.manual_seed(0)
    selector = FeatureSelector(24, (4, 5), layers=1, heads=2)
    torch.nn.init.normal_(selector.trunk.head.weight)  # untrained, it scores all tokens alike
    return selector


def encoded(**fields):
    torch.manual_seed(1)
    return EncoderOutput(torch.randn(3, 20, 24), (4, 5), **fields)


def test_coverage_chooses_a_tenth_of_the_tokens_and_scores_choose_the_others(selector):
    given = encoded(projected_BND=torch.randn(3, 20, 8))
    covering, ranking = Scope(SelectorReducer(selector), on="projected"), SelectorReducer(selector)
    first = covering(given, 2)
    for budget in (1, 2):
        assert torch.equal(DistilledReducer(selector)(given, budget), covering(given, budget))
    best = ranking.scores(given).argsort(dim=1, descending=True)
    assert not torch.equal(first, best[:, :2].sort(dim=1).values), "else the test says nothing"
    for budget in (3, 7, 20):
        kept = DistilledReducer(selector)(given, budget)
        for image in range(3):
            rest = [token for token in best[image].tolist() if token not in first[image]]
            assert kept[image].tolist() == sorted([*first[image].tolist(), *rest[: budget - 2]])


def test_budgets_are_nested(selector):
    given = encoded(projected_BND=torch.randn(3, 20, 8))
    kept = [DistilledReducer(selector)(given, budget) for budget in range(21)]
    for fewer, more in pairwise(kept):
        assert all(set(one.tolist()) < set(two.tolist()) for one, two in zip(fewer, more, strict=True))
    with pytest.raises(ValueError, match="20 tokens"):
        DistilledReducer(selector)(given, 21)


def test_coverage_takes_one_of_two_equal_tokens(selector):
    """The two highest scores belong to copies; the second is not among the tenth chosen by coverage."""
    given = encoded(projected_BND=torch.eye(20).expand(3, -1, -1).clone())
    best = SelectorReducer(selector).scores(given)[0].topk(2).indices
    given.projected_BND[0, best] = given.projected_BND[0, best[0]].clone()
    kept = DistilledReducer(selector)(given, 2)[0]
    assert torch.isin(best, kept).sum() == 1
    assert torch.isin(best, DistilledReducer(selector)(given, 3)[0]).all(), "which the scores then take"


def test_a_change_of_the_coverage_does_not_change_tokens_chosen_by_scores(selector):
    """At most as many tokens of a larger budget change as coverage chooses."""
    one = encoded(projected_BND=torch.randn(3, 20, 8))
    other = replace(one, projected_BND=torch.randn(3, 20, 8, generator=torch.Generator().manual_seed(7)))
    for budget in (5, 10):
        kept = [DistilledReducer(selector)(given, budget) for given in (one, other)]
        common = [len(set(a.tolist()) & set(b.tolist())) for a, b in zip(*kept, strict=True)]
        assert min(common) >= budget - 2


def test_its_scores_are_the_selectors_without_a_threshold(selector):
    given = encoded()
    assert torch.equal(DistilledReducer(selector).scores(given), SelectorReducer(selector).scores(given))
    assert DistilledReducer.threshold is None


def test_distilled_ranking_is_the_top_k(selector, tmp_path):
    selector.save_pretrained(tmp_path)
    given = encoded(projected_BND=torch.randn(3, 20, 8))
    ranking = build_reducer("distilled_ranking", 0, tmp_path)
    assert torch.equal(ranking(given, 6), selector.select(given.features_BND, 6))


def test_a_batch_is_scored_once_for_coverage_and_ranking_at_all_budgets(selector, monkeypatch):
    scored, rank = [], selector.rank
    monkeypatch.setattr(selector, "rank", lambda *given: scored.append(1) or rank(*given))
    given, reducer = encoded(projected_BND=torch.randn(3, 20, 8)), DistilledReducer(selector)
    for budget in (20, 7, 1):
        reducer(given, budget)
    assert scored == [1]
