"""PCA colours against eigenvectors of the covariance matrix, and the picture made of them."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from atr.features.pca import pca_colours, pca_picture


def features(rows=9, columns=7, width=12):
    noise = np.random.default_rng(0)
    return noise.normal(size=(rows, columns, 3)) @ np.diag([5.0, 3.0, 1.5]) @ noise.normal(size=(3, width))


def test_colours_are_the_first_three_components_up_to_scale_and_sign():
    features_RCD = features() + 0.1 * np.random.default_rng(1).normal(size=(9, 7, 12))
    features_ND = features_RCD.reshape(-1, 12)
    _, eigenvectors_DD = np.linalg.eigh(np.cov(features_ND.T))  # in ascending order
    expected = (features_ND - features_ND.mean(0)) @ eigenvectors_DD[:, ::-1]
    found = pca_colours(features_RCD).reshape(-1, 3)
    for component in range(3):
        inside = (found[:, component] > 0) & (found[:, component] < 1)
        assert inside.mean() > 0.9
        agreement = np.corrcoef(found[inside, component], expected[inside, component])[0, 1]
        assert abs(agreement) > 1 - 1e-9
    assert found.min() == 0 and found.max() == 1


def test_an_object_and_its_background_differ_in_colour():
    features_RCD = features() * 0.1
    features_RCD[3:6, 2:5, 0] += 100
    red = pca_colours(features_RCD)[..., 0]
    inside = np.zeros((9, 7), bool)
    inside[3:6, 2:5] = True
    assert red[inside].min() > 0.9 and red[~inside].max() < 0.1


def test_colours_follow_the_tokens_and_are_invariant_to_offset_and_scale():
    features_RCD = features()
    np.testing.assert_allclose(pca_colours(3 * features_RCD + 7), pca_colours(features_RCD), atol=1e-9)
    np.testing.assert_allclose(pca_colours(features_RCD[::-1]), pca_colours(features_RCD)[::-1], atol=1e-9)


@pytest.mark.parametrize("kind", ["float16", "float32"])
def test_other_dtypes_and_constant_features_are_accepted(kind):
    assert np.isfinite(pca_colours(features().astype(kind))).all()
    assert not pca_colours(np.full((2, 3, 4), 0.1, kind)).any()


@pytest.mark.parametrize(("shape", "coloured"), [((1, 2, 8), 1), ((1, 1, 8), 0), ((4, 4, 2), 2)])
def test_missing_components_are_zero(shape, coloured):
    found = pca_colours(np.random.default_rng(0).normal(size=shape))
    assert [channel for channel in range(3) if np.ptp(found[..., channel])] == list(range(coloured))
    assert not found[..., coloured:].any()


class CellMeans(torch.nn.Module):
    """A fake encoder: the mean colour of each cell of a grid, from pixels in 0..1."""

    is_ragged = False

    def __init__(self, grid):
        super().__init__()
        self.grid = grid

    def preprocess(self, images):
        return torch.stack([torch.tensor(np.asarray(image)).permute(2, 0, 1) / 255 for image in images])

    def forward(self, pixel_values_BCHW):
        cells_BDRC = torch.nn.functional.adaptive_avg_pool2d(pixel_values_BCHW, self.grid)
        return cells_BDRC.flatten(2).transpose(1, 2)


def test_each_image_is_followed_by_its_patches():
    rows, columns = grid = (2, 3)
    wide, tall = Image.new("L", (400, 90), 90), Image.new("RGB", (60, 300), (0, 200, 0))
    wide.paste(200, (200, 0, 400, 90))
    tall.paste((250, 0, 0), (0, 0, 60, 150))
    drawn = np.asarray(Image.open(io.BytesIO(pca_picture(CellMeans(grid), [wide, tall]))))
    cell = 384 // 3
    height, width = rows * cell, columns * cell
    assert drawn.shape == (height, 4 * width, 3)
    first, patches, second, others = np.split(drawn, 4, axis=1)
    assert (first[:, :180] == 90).all() and (first[:, 220:] == 200).all()
    assert (second[: height // 2 - 9] == (250, 0, 0)).all() and (
        second[height // 2 + 9 :] == (0, 200, 0)
    ).all()
    for shown in (patches, others):
        cells = shown.reshape(rows, cell, columns, cell, 3).swapaxes(1, 2)
        assert (cells == cells[:, :, :1, :1]).all()
    # The centre crops: dark to bright from left to right, and red above green.
    across, down = patches[0, cell // 2 :: cell, 0], others[cell // 2 :: cell, 0, 0]
    assert sorted({0, 255} & set(across.tolist())) == [0, 255] and across[1] not in (0, 255)
    assert abs(int(down[0]) - int(down[1])) == 255


def test_drawing_is_deterministic():
    image = Image.effect_noise((64, 64), 50).convert("RGB")
    assert pca_picture(CellMeans((4, 4)), [image]) == pca_picture(CellMeans((4, 4)), [image])


class OwnGrids(CellMeans):
    """A fake encoder that gives each image a cell for every 10 pixels."""

    is_ragged = True

    def __init__(self):
        super().__init__(None)

    def preprocess(self, images):
        return [super(OwnGrids, self).preprocess([image]) for image in images]

    def images(self, pixel_values):
        return [self._encode(pixels_1CHW) for pixels_1CHW in pixel_values]

    def _encode(self, pixels_1CHW):
        grid = (pixels_1CHW.shape[2] // 10, pixels_1CHW.shape[3] // 10)
        cells_1DRC = torch.nn.functional.adaptive_avg_pool2d(pixels_1CHW, grid)
        return cells_1DRC[0].flatten(1).T, grid


def test_an_image_of_its_own_grid_is_drawn_whole_beside_its_patches():
    wide, tall = Image.new("RGB", (60, 20), (0, 90, 0)), Image.new("RGB", (10, 40), (0, 0, 80))
    wide.paste((200, 0, 0), (0, 0, 30, 20))
    drawn = np.asarray(Image.open(io.BytesIO(pca_picture(OwnGrids(), [wide, tall]))))
    assert drawn.shape == (384, 2 * 384 + 2 * 96, 3)
    first, patches, second, others = np.split(drawn, [384, 768, 864], axis=1)
    assert (first[:128, :180] == (200, 0, 0)).all() and (first[:128, 220:] == (0, 90, 0)).all()
    assert not first[128:].any() and not patches[128:].any()
    assert (second == (0, 0, 80)).all() and not others.any()  # of equal patches no component differs
    cells = patches[:128].reshape(2, 64, 6, 64, 3).swapaxes(1, 2)
    assert (cells == cells[:, :, :1, :1]).all()
    red = cells[:, :, 0, 0, 0]
    assert (red[:, :3] == red[0, 0]).all() and (red[:, 3:] == red[0, 3]).all() and red[0, 0] != red[0, 3]
