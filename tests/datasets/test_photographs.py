from PIL import Image

from atr.datasets.photographs import PHOTOGRAPHS, photograph
from atr.micro import world


def test_each_photograph_is_a_large_picture_in_rgb():
    for name in PHOTOGRAPHS:
        picture = photograph(name)
        assert isinstance(picture, Image.Image) and picture.mode == "RGB" and min(picture.size) > 160
    assert len(PHOTOGRAPHS) == 12


def test_they_are_the_scenes_of_the_micro_world():
    assert {world.sample("scenes", "pretrain", index, 0).turns[0][1] for index in range(200)} == set(
        PHOTOGRAPHS
    )
