"""The images to pretrain on and the prompts that stage distill asks about them, by source."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image

from atr.datasets import drawn, folder, parquet
from atr.datasets.decoding import decode

if TYPE_CHECKING:
    from atr.config.prepare import Prepare

COCO = ("detection-datasets/coco", "data/train-*.parquet")
"""The 117,266 training images of COCO 2017 (Lin et al., 2014), 19 GB, with their `image_id`."""


class TrainingImage(NamedTuple):
    """An image to pretrain on."""

    id: str
    image: Image.Image
    prompts: list[str]
    """Prompts that stage distill asks about it: its own questions if it was drawn, else `prepare.prompts`."""


def training_images(prepare: "Prepare", seed: int) -> Iterator[TrainingImage]:
    """`prepare.images` images of the micro world, of COCO or of the user's folder, drawn or sampled by seed.

    Raises ValueError naming a folder with too few images, or an image that cannot be read.
    """
    if prepare.source == "micro":
        samples = drawn.draw_training_images(drawn.MICRO, prepare.benchmarks, prepare.images, seed)
        return (TrainingImage(*sample) for sample in samples)
    if prepare.source == "coco":
        pictures = coco(parquet.find_files(prepare.repository, *COCO), prepare.images, seed)
    else:
        pictures = folder.sample_pictures(Path(prepare.source), prepare.images, seed)
    return (TrainingImage(name, picture, list(prepare.prompts)) for name, picture in pictures)


def coco(paths: Sequence[Path], count: int, seed: int) -> Iterator[tuple[str, Image.Image]]:
    """A seeded sample of `count` images of COCO's parquet files, in their order."""
    rows = list(parquet.read_rows(paths, ("image_id", "image")))
    if len(rows) < count:
        raise ValueError(f"{paths[0].parent} holds {len(rows)} pictures, prepare.images asks for {count}")
    for index in sorted(random.Random(seed).sample(range(len(rows)), count)):
        cell = rows[index]["image"]
        yield f"coco/{rows[index]['image_id']:012d}", decode(cell.read(), str(cell))
