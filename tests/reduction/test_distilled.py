"""The reducer made of a selector that a language model taught."""

import pytest
import torch

from atr.reduction import REDUCERS, DistilledReducer, Encoded, FeatureSelector, SelectorReducer
from atr.reduction.diversity import Scope


@pytest.fixture
def selector():
    torch.manual_seed(0)
    return FeatureSelector(24, (4, 5), layers=1, heads=2)


def encoded(**fields):
    torch.manual_seed(1)
    return Encoded(torch.randn(3, 20, 24), (4, 5), **fields)


def test_it_covers_what_the_language_model_reads_by_the_scores_of_the_selector(selector):
    given = encoded(projected_BND=torch.randn(3, 20, 8))
    covering = Scope(SelectorReducer(selector), on="projected")
    for budget in (1, 7, 20):
        assert torch.equal(DistilledReducer(selector)(given, budget), covering(given, budget))


def test_of_tokens_that_are_alike_one_is_enough(selector):
    """The best token's copies are kept after all others, whatever their scores."""
    given = encoded(projected_BND=torch.eye(20).expand(3, -1, -1).clone())
    best = SelectorReducer(selector).scores(given)[0].topk(4).indices
    given.projected_BND[0, best] = given.projected_BND[0, best[0]].clone()
    kept = DistilledReducer(selector)(given, 17)[0]
    assert torch.isin(best, kept).sum() == 1


def test_its_scores_are_the_selectors_and_none_is_a_threshold(selector):
    given = encoded()
    assert torch.equal(DistilledReducer(selector).scores(given), SelectorReducer(selector).scores(given))
    assert DistilledReducer.threshold is None


def test_the_ranking_alone_has_a_name_as_well(selector, tmp_path):
    selector.save_pretrained(tmp_path)
    given = encoded(projected_BND=torch.randn(3, 20, 8))
    ranking = REDUCERS["distilled-ranking"](0, tmp_path)
    assert torch.equal(ranking(given, 6), selector.select(given.features_BND, 6))
