"""Ragged batches: what belongs to which image, and what is refused."""

import pytest
import torch

from atr.core.ragged import RaggedFeatures, RaggedGrids, of_each_image

GRIDS = ((2, 3), (1, 1), (4, 2))


def images():
    return [(torch.randn(rows * columns, 5), (rows, columns)) for rows, columns in GRIDS]


def test_the_parts_of_a_batch_are_the_images_and_views_of_it():
    given = images()
    batch = RaggedFeatures.of(given)
    assert (len(batch), batch.grids.each, batch.grids.tokens) == (3, GRIDS, (6, 1, 8))
    parts = batch.grids.split(batch.features_1TD)
    for part, (features_ND, _) in zip(parts, given, strict=True):
        assert torch.equal(part[0], features_ND)
        assert part.untyped_storage().data_ptr() == batch.features_1TD.untyped_storage().data_ptr()
    assert [len(part) for part in batch.grids.split(batch.features_1TD[0], dim=0)] == [6, 1, 8]


def test_a_rectangular_batch_is_one_part():
    features_BND = torch.randn(2, 6, 5)
    assert of_each_image(features_BND, None) == (features_BND,)
    assert [part.shape for part in of_each_image(torch.ones(1, 7), RaggedGrids(GRIDS[:2]))] == [
        (1, 6),
        (1, 1),
    ]


def test_it_moves_and_casts_like_a_tensor():
    batch = RaggedFeatures.of((features_ND.bfloat16(), grid) for features_ND, grid in images())
    cast = batch.to(torch.device("cpu")).float()
    assert cast.features_1TD.dtype == torch.float32 and cast.grids is batch.grids
    assert torch.equal(cast.features_1TD, batch.features_1TD.float())
    assert batch.to(torch.device("meta")).features_1TD.device.type == "meta"


@pytest.mark.parametrize("grids", [(), ((2, 0),), ((3, 2), (-1, 4))])
def test_no_image_or_a_grid_without_tokens_is_refused(grids):
    with pytest.raises(ValueError, match=r"^grids: .* are not allowed, allowed: one or more of 1 x 1"):
        RaggedGrids(grids)


@pytest.mark.parametrize("shape", [(1, 14, 5), (2, 15, 5), (15, 5)])
def test_features_that_do_not_fit_the_grids_are_refused(shape):
    with pytest.raises(ValueError, match=r"features: shape .* does not fit, allowed: \(1, 15, width\)"):
        RaggedFeatures(torch.zeros(shape), RaggedGrids(GRIDS))
