"""The images to pretrain on, by the name of their source."""

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from atr.core.typed_json import short
from atr.datasets import folder, parquet
from atr.datasets.decoding import decode
from atr.micro import world

if TYPE_CHECKING:
    from atr.config.prepare import Prepare

COCO = ("detection-datasets/coco", "data/train-*.parquet")
"""The 117,266 training images of COCO 2017 (Lin et al., 2014), 19 GB, with their `image_id`."""


def images(prepare: "Prepare", seed: int) -> Iterator[tuple[str, Image.Image]]:
    """`prepare.images` pictures with their names: of the micro world, of COCO, or of the user's folder.

    Raises ValueError naming the folder that holds fewer, or the picture that cannot be read.
    """
    if prepare.source == "micro":
        drawn = [name for name in prepare.benchmarks if name in world.DRAW]
        return _micro(drawn or list(world.DRAW), prepare.images, seed)
    if prepare.source == "coco":
        return coco(parquet.find(prepare.repository, *COCO), prepare.images, seed)
    return folder.images(Path(prepare.source), prepare.images, seed)


def prompts(image: str, prepared: Mapping[str, Any]) -> list[str]:
    """What an image of `images` is to be asked, by its name and the parameters in their manifest.

    One of the micro world is drawn again for its own questions; any other is asked `prepare.prompts`.
    """
    if prepared["prepare"]["source"] != "micro":
        return list(prepared["prepare"]["prompts"])
    benchmark, _, index = image.partition("/")
    if benchmark not in world.DRAW or not index.isdecimal():
        allowed = f"a number after one of {', '.join(world.DRAW)}"
        raise ValueError(f"image {short(image)} is none of the micro world, allowed: {allowed}")
    return [
        question for question, _ in world.sample(benchmark, "pretrain", int(index), prepared["seed"]).turns
    ]


class AskedImages:
    """The names of images, each with its `prompts`, by index."""

    def __init__(self, names: Sequence[str], prepared: Mapping[str, Any]) -> None:
        self.names, self.prepared = names, prepared

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[str, list[str]]:
        return self.names[index], prompts(self.names[index], self.prepared)


def _micro(benchmarks: Sequence[str], count: int, seed: int) -> Iterator[tuple[str, Image.Image]]:
    """Images of all the benchmarks in turn."""
    for index in range(count):
        benchmark = benchmarks[index % len(benchmarks)]
        yield f"{benchmark}/{index:06d}", world.sample(benchmark, "pretrain", index, seed).image


def coco(paths: Sequence[Path], count: int, seed: int) -> Iterator[tuple[str, Image.Image]]:
    """A seeded sample of `count` images of COCO's parquet files, in their order."""
    rows = list(parquet.rows(paths, ("image_id", "image")))
    if len(rows) < count:
        raise ValueError(f"{paths[0].parent} holds {len(rows)} pictures, prepare.images asks for {count}")
    for index in sorted(random.Random(seed).sample(range(len(rows)), count)):
        cell = rows[index]["image"]
        yield f"coco/{rows[index]['image_id']:012d}", decode(cell.read(), str(cell))
