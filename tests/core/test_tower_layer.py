"""What may stand for a layer of a tower."""

import pytest

from atr.core.tower_layer import MERGED, check_layer


@pytest.mark.parametrize("layer", [-2, 1, MERGED, None])
def test_an_index_merged_and_none_are_layers(layer):
    check_layer(layer)


@pytest.mark.parametrize("layer", ["last", "", "Merged"])
def test_other_texts_are_refused(layer):
    with pytest.raises(ValueError, match=rf"^layer: '{layer}' is not allowed, allowed: int, 'merged'$"):
        check_layer(layer)
