import numpy as np
import pytest
from scipy import stats

from atr.core import bootstrap


def test_equal_questions_are_drawn_for_equal_arguments_and_others_for_others():
    drawn = bootstrap.draw("docs", 40, 30, 7)
    assert drawn.shape == (30, 40) and set(drawn.flat) <= set(range(40))
    other = bootstrap.draw("signs", 40, 30, 7)
    assert not np.array_equal(drawn, other)
    assert not np.array_equal(drawn, bootstrap.draw("docs", 40, 30, 8))
    np.testing.assert_array_equal(drawn, bootstrap.draw("docs", 40, 30, 7))
    with pytest.raises(ValueError, match="read-only"):
        drawn[0, 0] = 1


def test_resampled_means_are_those_of_the_questions_drawn():
    scores = np.random.default_rng(0).random(9)
    drawn = bootstrap.draw("docs", 9, 20, 1)
    expected = [sum(scores[index] for index in resample) / 9 for resample in drawn.tolist()]
    np.testing.assert_allclose(bootstrap.resampled(scores, "docs", 20, 1), expected, rtol=1e-12)


def test_the_interval_is_that_of_scipy():
    scores = np.random.default_rng(3).gamma(2.0, size=200)
    ours = bootstrap.interval(bootstrap.resampled(scores, "docs", 20000, 0))
    theirs = stats.bootstrap((scores,), np.mean, n_resamples=20000, method="percentile", rng=1)
    assert ours == pytest.approx(tuple(theirs.confidence_interval), abs=0.01 * scores.std())
