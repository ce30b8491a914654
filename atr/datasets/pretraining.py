"""The images to pretrain on, by the name of their source."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from atr.config import BENCHMARKS, Prepare
from atr.datasets import folder, micro, parquet
from atr.datasets.decoding import decode

COCO = ("detection-datasets/coco", "data/train-*.parquet")
"""The 117,266 training images of COCO 2017 (Lin et al., 2014), 19 GB, with their `image_id`."""


def images(prepare: Prepare, seed: int) -> Iterator[tuple[str, Image.Image]]:
    """`prepare.images` pictures with their names: of the micro world, of COCO, or of the user's folder.

    Raises ValueError naming the folder that holds fewer, or the picture that cannot be read.
    """
    if prepare.source == "micro":
        drawn = [name for name in prepare.benchmarks if name in BENCHMARKS]
        return _micro(drawn or list(BENCHMARKS), prepare.images, seed)
    if prepare.source == "coco":
        return coco(parquet.find(prepare.repository, *COCO), prepare.images, seed)
    return folder.images(Path(prepare.source), prepare.images, seed)


def _micro(benchmarks: Sequence[str], count: int, seed: int) -> Iterator[tuple[str, Image.Image]]:
    """Images of all the benchmarks in turn."""
    for index in range(count):
        benchmark = benchmarks[index % len(benchmarks)]
        yield f"{benchmark}/{index:06d}", micro.sample(benchmark, "pretrain", index, seed).image


def coco(paths: Sequence[Path], count: int, seed: int) -> Iterator[tuple[str, Image.Image]]:
    """A seeded sample of `count` images of COCO's parquet files, in their order."""
    rows = list(parquet.rows(paths, ("image_id", "image")))
    if len(rows) < count:
        raise ValueError(f"{paths[0].parent} holds {len(rows)} pictures, prepare.images asks for {count}")
    for index in sorted(random.Random(seed).sample(range(len(rows)), count)):
        cell = rows[index]["image"]
        yield f"coco/{rows[index]['image_id']:012d}", decode(cell.read(), str(cell))
