"""Images and questions that a Python module draws: the one way into the micro world, by the module's name.

The module has `DRAW`, whose keys name its benchmarks, and `sample(benchmark, split, index, seed)`: an object
with `image` (RGB), `turns` (pairs of a question and its answer) and `characters` (the written ones, each with
its centre `x`, `y` in pixels). Nothing here imports such a module by an import statement, so that no stage
but prepare depends on one.
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
    """Distinct within its benchmark and split."""
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
    """Endless rows `id`, `question`, `answer`, `image`: the first question of sample 0, 1, and so on."""
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
    """`count` images of split `pretrain` with their ids and questions, of the benchmarks in turn.

    Benchmarks that the module does not draw are left out; if it draws none of them, all of its own are drawn.
    """
    drawing = load_drawing_module(module)
    names = [name for name in benchmarks if name in drawing.DRAW] or list(drawing.DRAW)
    for index in range(count):
        benchmark = names[index % len(names)]
        sample = drawing.sample(benchmark, "pretrain", index, seed)
        yield f"{benchmark}/{index:06d}", sample.image, [question for question, _ in sample.turns]
