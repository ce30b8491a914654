"""Features as colours, against scikit-learn's principal components."""

import numpy as np
import pytest
from sklearn.decomposition import PCA

from atr.reporting.components import colours


def features(rows=9, columns=7, width=12):
    noise = np.random.default_rng(0)
    return noise.normal(size=(rows, columns, 3)) @ np.diag([5.0, 3.0, 1.5]) @ noise.normal(size=(3, width))


def test_colours_are_the_first_three_components_up_to_scale_and_sign():
    features_RCD = features() + 0.1 * np.random.default_rng(1).normal(size=(9, 7, 12))
    expected = PCA(3).fit_transform(features_RCD.reshape(-1, 12))
    found = colours(features_RCD).reshape(-1, 3)
    for component in range(3):
        inside = (found[:, component] > 0) & (found[:, component] < 1)
        assert inside.mean() > 0.9
        agreement = np.corrcoef(found[inside, component], expected[inside, component])[0, 1]
        assert abs(agreement) > 1 - 1e-9
    assert found.min() == 0 and found.max() == 1


def test_an_object_has_another_colour_than_what_surrounds_it():
    features_RCD = features() * 0.1
    features_RCD[3:6, 2:5, 0] += 100
    red = colours(features_RCD)[..., 0]
    inside = np.zeros((9, 7), bool)
    inside[3:6, 2:5] = True
    assert red[inside].min() > 0.9 and red[~inside].max() < 0.1


def test_colours_stay_where_the_tokens_are_and_do_not_change_with_offset_or_unit():
    features_RCD = features()
    np.testing.assert_allclose(colours(3 * features_RCD + 7), colours(features_RCD), atol=1e-9)
    np.testing.assert_allclose(colours(features_RCD[::-1]), colours(features_RCD)[::-1], atol=1e-9)


@pytest.mark.parametrize("kind", ["float16", "float32"])
def test_other_dtypes_and_constant_features_are_taken(kind):
    assert np.isfinite(colours(features().astype(kind))).all()
    assert np.isfinite(colours(np.ones((2, 3, 4), kind))).all()


@pytest.mark.parametrize("shape", [(1, 2, 8), (4, 4, 2)])
def test_too_few_patches_or_channels_are_refused(shape):
    with pytest.raises(ValueError, match="have no three components"):
        colours(np.zeros(shape))
