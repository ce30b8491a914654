import subprocess
import sys

import pytest
from PIL import Image

from atr.datasets.photographs import PHOTOGRAPHS, package_file, photograph
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


def test_a_package_is_not_imported_for_its_files():
    code = (
        "import sys; from atr.datasets.photographs import photograph; photograph('flower'); "
        "sys.exit('sklearn' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_package_that_is_not_installed_is_named():
    with pytest.raises(ValueError, match=r"package no_such_package is not installed, a\.png is read from it"):
        package_file("no_such_package", "a.png")
