"""Twelve photographs that come with scikit-image and scikit-learn: the same on every machine."""

from importlib.util import find_spec
from pathlib import Path

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
    with Image.open(package_file(*PHOTOGRAPHS[name])) as image:
        return image.convert("RGB")


def package_file(package: str, path: str) -> Path:
    """A file of an installed package, which is not imported: scikit-learn alone takes over a second.

    Raises ValueError naming a package that is not installed.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"package {package} is not installed, {path} is read from it")
    return Path(spec.submodule_search_locations[0], path)
