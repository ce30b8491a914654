"""Images and questions drawn by a Python module that is looked up by name, such as the micro world.

The module has `DRAW`, whose keys name its benchmarks, and `sample(benchmark, split, index, seed)`: an object
with `image` (RGB), `turns` (pairs of a question and its answer) and `characters` (of written text, each with
its centre `x`, `y` in pixels). No import statement names such a module, so that only stage prepare depends on
it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import count
from typing import Any

from PIL import Image

MICRO = "atr.micro.world"
"""The module that `prepare.source: micro` draws with."""


@dataclass(frozen=True)
class DrawnImage:
    """An image of a drawing module, with the centres (x, y) of its characters as fractions of its sides."""

    name: str
    """Unique within its benchmark and split."""
    image: Image.Image
    text_centres: list[tuple[float, float]]


def load_drawing_module(name: str) -> Any:
    """Import a drawing module; raises ValueError naming it if it is missing or has no sample()."""
    try:
        module = import_module(name)
    except ImportError as error:
        raise ValueError(f"drawing module {name} cannot be imported: {error}") from error
    if not callable(getattr(module, "sample", None)):
        raise ValueError(f"drawing module {name} has no sample(), allowed: see atr/datasets/drawn.py")
    return module


def draw_rows(module: str, benchmark: str, split: str, seed: int) -> Iterator[dict[str, Any]]:
    """Endless rows with `id`, `question`, `answer` and `image`: the first question of samples 0, 1, ..."""
    drawing = load_drawing_module(module)

    def rows() -> Iterator[dict[str, Any]]:
        for index in count():
            sample, name = drawing.sample(benchmark, split, index, seed), f"{index:06d}"
            question, answer = sample.turns[0]
            image = DrawnImage(name, sample.image, _text_centres(sample))
            yield {"id": f"{name}#0", "question": question, "answer": answer, "image": image}

    return rows()


def _text_centres(sample: Any) -> list[tuple[float, float]]:
    width, height = sample.image.size
    return [(character.x / width, character.y / height) for character in sample.characters]


def draw_training_images(
    module: str, benchmarks: Sequence[str], count: int, seed: int
) -> Iterator[tuple[str, Image.Image, list[str]]]:
    """Ids, images and questions of `count` images of split `pretrain`, cycling through the benchmarks.

    Benchmarks that the module does not draw are left out; if none is left, all that it draws are used.
    """
    drawing = load_drawing_module(module)
    names = [name for name in benchmarks if name in drawing.DRAW] or list(drawing.DRAW)
    for index in range(count):
        benchmark = names[index % len(names)]
        sample = drawing.sample(benchmark, "pretrain", index, seed)
        yield f"{benchmark}/{index:06d}", sample.image, [question for question, _ in sample.turns]
