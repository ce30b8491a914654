"""Pictures of masks: what is kept is shown as it is, what is dropped is grey."""

import torch
from PIL import Image

from atr.reduction.mask_pictures import mask_picture


def test_kept_patches_are_unchanged_and_dropped_ones_grey():
    images = [Image.new("RGB", (30, 20), (255, 0, 0)), Image.new("RGB", (30, 20), (0, 0, 255))]
    mask = torch.tensor([[1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1]])
    picture = mask_picture(
        [(image, mask_N.reshape(2, 3)) for image, mask_N in zip(images, mask, strict=True)]
    )
    width, height = picture.width // 2, picture.height // 2
    centres = [
        ((2 * column + 1) * width // 6, (2 * row + 1) * height // 4) for row in (0, 1) for column in (0, 1, 2)
    ]
    for image, colour in enumerate([(255, 0, 0), (0, 0, 255)]):
        for cell, (x, y) in enumerate(centres):
            assert picture.getpixel((image * width + x, y)) == colour
            below = picture.getpixel((image * width + x, height + y))
            assert (below == colour) == bool(mask[image, cell])
            assert bool(mask[image, cell]) or max(below) - min(below) < 40


def test_images_of_grids_of_their_own_stand_beside_each_other():
    wide, tall = Image.new("RGB", (30, 20), (255, 0, 0)), Image.new("RGB", (10, 40), (0, 0, 255))
    picture = mask_picture([(wide, torch.tensor([[1, 0, 0]])), (tall, torch.tensor([[0], [1]]))])
    assert picture.size == (3 * 72 + 108, 2 * 216)
    assert picture.getpixel((100, 30)) == picture.getpixel((30, 216 + 30)) == (255, 0, 0)
    assert picture.getpixel((100, 216 + 30)) != (255, 0, 0)
    assert (
        picture.getpixel((3 * 72 + 50, 216 + 150)) == (0, 0, 255) != picture.getpixel((3 * 72 + 50, 216 + 50))
    )
