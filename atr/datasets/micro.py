"""The micro world: six procedural benchmarks on real photographs, fonts and handwriting.

Sample `index` of a split is a pure function of (seed, benchmark, split, index), so any part of the world can
be made alone, in parallel, or again. The held-out split `evaluate` shares no photograph region and no
handwriting sample with the other splits, and one font occurs only there.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFont

T = TypeVar("T")

SIZE = 168
SPLITS = ("train", "pretrain", "validation", "evaluate")

# fmt: off
WORDS = (
    "apple", "bread", "chair", "delta", "eagle", "flame", "grape", "house", "igloo", "jelly",
    "knife", "lemon", "mango", "night", "ocean", "piano", "queen", "river", "stone", "tiger",
    "umbra", "violet", "water", "xenon", "yacht", "zebra", "anchor", "basket", "candle", "dragon",
    "engine", "forest", "garden", "hammer", "island", "jacket", "kettle", "ladder", "magnet",
    "needle",
)
KEYS = (
    "name", "city", "date", "code", "room", "total", "price", "phone", "order", "model", "color",
    "size", "unit", "page", "bank", "team", "gate", "seat", "road", "plan",
)
LABELS = (
    "jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec",
)
# fmt: on
COLOURS = {
    "red": (214, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (245, 220, 40),
    "orange": (245, 140, 20),
    "purple": (140, 50, 180),
    "white": (250, 250, 250),
}
KINDS = ("circle", "square", "triangle")
SIDES = ("left", "right")
TRANSCRIBE = "transcribe"

FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
)
HELD_OUT_FONT = "DejaVuSansMono-Bold"
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
# The left part of every photograph is for training, the right part is held out; both are wider than a crop.
PHOTOGRAPH_SPLIT = 0.55
SMALLEST_CROP = 160
HANDWRITING = {
    "train": (0, 1300),
    "pretrain": (0, 1300),
    "validation": (1300, 1500),
    "evaluate": (1500, 1797),
}


class Character(NamedTuple):
    """A written character, its centre in pixels, and the question that its line answers."""

    character: str
    x: float
    y: float
    question: str


@dataclass(frozen=True)
class Sample:
    """One image, its questions with their one answer each, and what is written on it."""

    image: Image.Image
    turns: tuple[tuple[str, str], ...]
    characters: tuple[Character, ...] = ()


@dataclass(frozen=True)
class _Scene:
    """What a drawing function draws from: the random stream and the split's own resources."""

    rng: np.random.Generator
    split: str

    def one_of(self, items: Sequence[T]) -> T:
        return items[int(self.rng.integers(len(items)))]

    def some_of(self, items: Sequence[str], count: int) -> list[str]:
        return [items[int(i)] for i in self.rng.permutation(len(items))[:count]]

    def integer(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return int(self.rng.integers(low, high + 1))

    def font(self, low: int, high: int) -> ImageFont.FreeTypeFont:
        names = (*FONTS, HELD_OUT_FONT) if self.split == "evaluate" else FONTS
        return _font(self.one_of(names), self.integer(low, high))

    def photograph(self, name: str | None = None) -> Image.Image:
        photograph = _photograph(name or self.one_of(tuple(PHOTOGRAPHS)), held_out=self.split == "evaluate")
        side = self.integer(SMALLEST_CROP, min(photograph.size))
        left, top = self.integer(0, photograph.width - side), self.integer(0, photograph.height - side)
        crop = photograph.resize(
            (SIZE, SIZE), Image.Resampling.BILINEAR, (left, top, left + side, top + side)
        )
        return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.rng.random() < 0.5 else crop

    def ground(self) -> Image.Image:
        """A photograph or a plain ground, each half of the time."""
        if self.rng.random() < 0.5:
            return self.photograph()
        return Image.new("RGB", (SIZE, SIZE), tuple(int(v) for v in self.rng.integers(60, 200, 3)))

    def paper(self) -> Image.Image:
        return Image.new("RGB", (SIZE, SIZE), tuple(int(v) for v in self.rng.integers(215, 256, 3)))

    def ink(self, dark: bool = True) -> tuple[int, int, int]:
        low, high = (0, 91) if dark else (215, 256)
        red, green, blue = (int(v) for v in self.rng.integers(low, high, 3))
        return red, green, blue

    def value(self) -> str:
        """A number of two to four digits."""
        digits = self.integer(2, 4)
        return str(self.integer(10 ** (digits - 1), 10**digits - 1))


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf", size)


def photograph(name: str) -> Image.Image:
    """The whole of one of PHOTOGRAPHS, RGB."""
    from importlib.resources import files

    package, path = PHOTOGRAPHS[name]
    with files(package).joinpath(path).open("rb") as file:
        return Image.open(file).convert("RGB")


@cache
def _photograph(name: str, held_out: bool) -> Image.Image:
    whole = photograph(name)
    cut = round(whole.width * PHOTOGRAPH_SPLIT)
    return whole.crop((cut, 0, whole.width, whole.height) if held_out else (0, 0, cut, whole.height))


@cache
def _handwriting() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    pixels, digits = load_digits(return_X_y=True)
    return (pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8), digits


def _write(
    draw: ImageDraw.ImageDraw,
    at: tuple[float, float],
    text: str,
    font: ImageFont.FreeTypeFont,
    fill: tuple[int, ...],
    question: str,
) -> list[Character]:
    """Draw one line of text, which answers `question`, with its top left at `at`; return its characters."""
    left, top = at
    draw.text((left, top), text, font=font, fill=fill)
    middle = top + font.size * 0.65
    ends = [font.getlength(text[: i + 1]) for i in range(len(text))]
    starts = [0.0, *ends[:-1]]
    return [
        Character(character, left + (start + end) / 2, middle, question)
        for character, start, end in zip(text, starts, ends, strict=True)
        if character != " "
    ]


def _docs(scene: _Scene) -> Sample:
    """Two to five lines `key: value` on paper; the question is a key."""
    page = scene.paper()
    draw, font, ink = ImageDraw.Draw(page), scene.font(13, 16), scene.ink()
    keys = scene.some_of(KEYS, scene.integer(2, 5))
    values = [scene.value() if scene.rng.random() < 0.5 else scene.one_of(WORDS) for _ in keys]
    lines = [f"{key}: {value}" for key, value in zip(keys, values, strict=True)]
    pitch = scene.integer(int(font.size * 1.25), min(SIZE // len(lines), 34))
    left = scene.integer(2, max(2, int(SIZE - 2 - max(font.getlength(line) for line in lines))))
    top = scene.integer(0, SIZE - pitch * len(lines))
    characters = [
        character
        for row, (key, line) in enumerate(zip(keys, lines, strict=True))
        for character in _write(draw, (left, top + row * pitch), line, font, ink, key)
    ]
    return Sample(page, tuple(zip(keys, values, strict=True)), tuple(characters))


def _signs(scene: _Scene) -> Sample:
    """A word or a number on a plate, somewhere on a photograph."""
    image = scene.photograph()
    draw, font = ImageDraw.Draw(image), scene.font(14, 20)
    text = scene.value() if scene.rng.random() < 0.5 else scene.one_of(WORDS)
    width, height = int(font.getlength(text)) + 12, int(font.size * 1.2) + 8
    left, top = scene.integer(0, SIZE - width - 1), scene.integer(0, SIZE - height - 1)
    dark_text = scene.rng.random() < 0.5
    draw.rectangle(
        (left, top, left + width, top + height), fill=scene.ink(not dark_text), outline=scene.ink(dark_text)
    )
    characters = _write(draw, (left + 6, top + 4), text, font, scene.ink(dark_text), "sign")
    return Sample(image, (("sign", text),), tuple(characters))


def _charts(scene: _Scene) -> Sample:
    """Three to five bars, a label under each and its value printed above it; the question is a label."""
    page = scene.paper()
    draw, font, ink = ImageDraw.Draw(page), scene.font(12, 13), scene.ink()
    labels = scene.some_of(LABELS, scene.integer(3, 5))
    scale = scene.one_of((99, 999))
    values = [scene.integer(scale // 10 + 1, scale) for _ in labels]
    pitch, floor, tallest = SIZE / len(labels), SIZE - 20, SIZE - 42
    bar = scene.one_of(tuple(COLOURS.values())[:-1])
    characters = []
    for column, (label, value) in enumerate(zip(labels, values, strict=True)):
        middle = (column + 0.5) * pitch
        top = floor - tallest * value / scale
        draw.rectangle((middle - pitch * 0.3, top, middle + pitch * 0.3, floor), fill=bar, outline=ink)
        for text, height in ((str(value), top - 16), (label, floor + 2)):
            left = middle - font.getlength(text) / 2
            characters += _write(draw, (left, height), text, font, ink, label)
    return Sample(
        page,
        tuple((label, str(value)) for label, value in zip(labels, values, strict=True)),
        tuple(characters),
    )


def _shapes(scene: _Scene) -> Sample:
    """One to four equal shapes in one half of the image: their colour, kind, count and side."""
    image = scene.ground()
    colour, kind, side = scene.one_of(tuple(COLOURS)), scene.one_of(KINDS), scene.one_of(SIDES)
    wanted, radius = scene.integer(1, 4), scene.integer(10, 16)
    centres: list[tuple[int, int]] = []
    for attempt in count(1):
        if len(centres) == wanted:
            break
        if attempt % 100 == 0:  # the first ones can leave no room for the last
            centres.clear()
        x, y = scene.integer(radius + 2, SIZE // 2 - radius - 2), scene.integer(radius + 2, SIZE - radius - 2)
        x = x if side == "left" else SIZE - x
        if all((x - a) ** 2 + (y - b) ** 2 > (2.4 * radius) ** 2 for a, b in centres):
            centres.append((x, y))
    draw = ImageDraw.Draw(image)
    for x, y in centres:
        _shape(draw, kind, x, y, radius, COLOURS[colour])
    return Sample(image, (("colour", colour), ("kind", kind), ("count", str(wanted)), ("side", side)))


def _shape(
    draw: ImageDraw.ImageDraw, kind: str, x: int, y: int, radius: int, fill: tuple[int, int, int]
) -> None:
    box = (x - radius, y - radius, x + radius, y + radius)
    outline = (20, 20, 20)
    if kind == "circle":
        draw.ellipse(box, fill=fill, outline=outline)
    elif kind == "square":
        draw.rectangle(box, fill=fill, outline=outline)
    else:
        draw.polygon(
            ((x, y - radius), (x - radius, y + radius), (x + radius, y + radius)), fill=fill, outline=outline
        )


def _digits(scene: _Scene) -> Sample:
    """One handwritten digit, 60 to 110 pixels high, anywhere on a photograph or plain ground."""
    image = scene.ground()
    pixels, digits = _handwriting()
    low, high = HANDWRITING[scene.split]
    index, side = scene.integer(low, high - 1), scene.integer(60, 110)
    stroke = Image.fromarray(pixels[index]).resize((side, side), Image.Resampling.BICUBIC)
    stroke = stroke.rotate(scene.integer(-12, 12), Image.Resampling.BILINEAR)
    left, top = scene.integer(0, SIZE - side), scene.integer(0, SIZE - side)
    under = (
        image.resize((1, 1), Image.Resampling.BOX, (left, top, left + side, top + side))
        .convert("L")
        .getpixel((0, 0))
    )
    assert isinstance(under, int)
    ink = scene.integer(0, 30) if under > 127 else scene.integer(225, 255)
    image.paste((ink, ink, ink), (left, top), stroke)
    return Sample(image, (("digit", str(digits[index])),))


def _scenes(scene: _Scene) -> Sample:
    """A crop of one of twelve photographs: which one is it?"""
    name = scene.one_of(tuple(PHOTOGRAPHS))
    return Sample(scene.photograph(name), (("scene", name),))


DRAW: dict[str, Callable[[_Scene], Sample]] = {
    "docs": _docs,
    "signs": _signs,
    "charts": _charts,
    "shapes": _shapes,
    "digits": _digits,
    "scenes": _scenes,
}
QUESTIONS = (*KEYS, *LABELS, "sign", "colour", "kind", "count", "side", "digit", "scene", TRANSCRIBE)
ANSWERS = (*WORDS, *COLOURS, *KINDS, *SIDES, *PHOTOGRAPHS)


def sample(benchmark: str, split: str, index: int, seed: int) -> Sample:
    """Sample `index` of a split of one benchmark: a 168x168 RGB image and its questions in random order."""
    rng = np.random.default_rng([seed, zlib.crc32(benchmark.encode()), zlib.crc32(split.encode()), index])
    drawn = DRAW[benchmark](_Scene(rng, split))
    order = rng.permutation(len(drawn.turns))
    return Sample(drawn.image, tuple(drawn.turns[int(i)] for i in order), drawn.characters)


LESSONS = {"docs": 0.38, "signs": 0.17, "charts": 0.2, "shapes": 0.11, "digits": 0.09, "scenes": 0.05}
READING_LESSONS = {"docs": 0.5, "signs": 0.25, "charts": 0.25}


def lesson(index: int, seed: int, reading: bool, transcribe: float) -> Sample:
    """Image `index` to train the micro model on: of the benchmarks with text only while it learns to read.

    A fraction `transcribe` of the docs asks for the whole page in place of single values (micro recipe).
    """
    rng = np.random.default_rng([seed, zlib.crc32(b"lesson"), index])
    shares = READING_LESSONS if reading else LESSONS
    benchmark = str(rng.choice(list(shares), p=list(shares.values())))
    drawn = sample(benchmark, "train", index, seed)
    if benchmark != "docs" or rng.random() >= transcribe:
        return drawn
    page = "".join(written.character for written in drawn.characters)
    lines = sorted(drawn.turns, key=lambda turn: page.index(f"{turn[0]}:{turn[1]}"))
    return Sample(
        drawn.image, ((TRANSCRIBE, " ".join(f"{key} {value}" for key, value in lines)),), drawn.characters
    )
