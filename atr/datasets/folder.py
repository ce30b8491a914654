"""A folder of picture files as a source of pretraining images."""

import random
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from atr.datasets.decoding import decode

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


def images(folder: Path, count: int, seed: int) -> Iterator[tuple[str, Image.Image]]:
    """A seeded sample of `count` pictures below the folder, as (relative path, RGB image).

    Raises ValueError naming the folder when it holds fewer, or the file of a picture that cannot be read.
    """
    folder = Path(folder)
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if len(paths) < count:
        raise ValueError(f"{folder} holds {len(paths)} pictures, prepare.images asks for {count}")
    for path in sorted(random.Random(seed).sample(paths, count)):
        yield path.relative_to(folder).as_posix(), decode(path, str(path))
