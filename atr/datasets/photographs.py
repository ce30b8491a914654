"""Twelve photographs that come with scikit-image and scikit-learn: the same on every machine."""

from importlib.resources import files

from PIL import Image

PHOTOGRAPHS = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "cat": ("skimage", "data/chelsea.png"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "brick": ("skimage", "data/brick.png"),
    "grass": ("skimage", "data/grass.png"),
    "gravel": ("skimage", "data/gravel.png"),
    "camera": ("skimage", "data/camera.png"),
    "coins": ("skimage", "data/coins.png"),
    "moon": ("skimage", "data/moon.png"),
    "china": ("sklearn", "datasets/images/china.jpg"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
}
"""Package and path of each photograph by name."""


def photograph(name: str) -> Image.Image:
    """One of PHOTOGRAPHS, uncropped, in RGB."""
    package, path = PHOTOGRAPHS[name]
    with files(package).joinpath(path).open("rb") as file:
        return Image.open(file).convert("RGB")
