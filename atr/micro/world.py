"""The micro world: six procedural benchmarks on real photographs, fonts and handwriting.

Sample `index` of a split is a pure function of (seed, benchmark, split, index), so any part of the world can
be made alone, in parallel, or again. The held-out split `evaluate` shares no photograph region and no
handwriting sample with the other splits, and one font occurs only there.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import count
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from atr.datasets.photographs import PHOTOGRAPHS, photograph

T = TypeVar("T")

SIZE = 168
WHOLE = (0, 0, SIZE, SIZE)
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
    """A written character, its centre in pixels, the question its line answers, and its word.

    What is no word of the vocabulary (a number) bears the question twice.
    """

    character: str
    x: float
    y: float
    names: tuple[str, str]


class Region(NamedTuple):
    """A thing to be seen, its two names, and its box in pixels; a later one lies in front."""

    names: tuple[str, str]
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Sample:
    """One image, its questions with their one answer each, what is written on it and what is to be seen."""

    image: Image.Image
    turns: tuple[tuple[str, str], ...]
    characters: tuple[Character, ...] = ()
    regions: tuple[Region, ...] = ()


@dataclass(frozen=True)
class _Scene:
    """What a drawing function draws from: the random stream and the split's own resources.

    A `varied` one bends photographs and handwriting further than any split does: lessons only.
    """

    rng: np.random.Generator
    split: str
    varied: bool = False

    def one_of(self, items: Sequence[T]) -> T:
        return items[int(self.rng.integers(len(items)))]

    def some_of(self, items: Sequence[T], count: int) -> list[T]:
        return [items[int(i)] for i in self.rng.permutation(len(items))[:count]]

    def integer(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return int(self.rng.integers(low, high + 1))

    def font(self, low: int, high: int) -> ImageFont.FreeTypeFont:
        names = (*FONTS, HELD_OUT_FONT) if self.split == "evaluate" else FONTS
        return _font(self.one_of(names), self.integer(low, high))

    def photograph(self, name: str | None = None) -> tuple[Image.Image, Region]:
        """A crop of a photograph, of a random one where none is named."""
        name = name or self.one_of(tuple(PHOTOGRAPHS))
        photograph = _photograph(name, held_out=self.split == "evaluate")
        crop = photograph.resize((SIZE, SIZE), Image.Resampling.BILINEAR, self._crop(photograph))
        if self.rng.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return (self._relit(crop) if self.varied else crop), Region(("scene", name), WHOLE)

    def _crop(self, photograph: Image.Image) -> tuple[int, int, int, int]:
        """A square box inside; a varied one may be smaller, and no square."""
        smallest = 80 if self.varied else SMALLEST_CROP
        width = height = self.integer(smallest, min(photograph.size))
        if self.varied:
            height = min(max(round(width * self.rng.uniform(0.8, 1.25)), smallest), min(photograph.size))
        left, top = self.integer(0, photograph.width - width), self.integer(0, photograph.height - height)
        return left, top, left + width, top + height

    def _relit(self, image: Image.Image) -> Image.Image:
        """Under another light: half of the time a coloured one, which makes grey photographs coloured."""
        channels = 3 if self.rng.random() < 0.5 else 1
        gains = np.broadcast_to(self.rng.uniform(0.7, 1.3, channels), 3)
        offsets = np.broadcast_to(self.rng.uniform(-25, 25, channels), 3)
        levels = np.arange(256)[None] * gains[:, None] + offsets[:, None]
        return image.point(levels.clip(0, 255).astype(np.uint8).ravel().tolist())

    def ground(self) -> tuple[Image.Image, tuple[Region, ...]]:
        """A photograph or a plain ground, each half of the time."""
        if self.rng.random() < 0.5:
            image, region = self.photograph()
            return image, (region,)
        return Image.new("RGB", (SIZE, SIZE), tuple(int(v) for v in self.rng.integers(60, 200, 3))), ()

    def paper(self) -> Image.Image:
        return Image.new("RGB", (SIZE, SIZE), tuple(int(v) for v in self.rng.integers(215, 256, 3)))

    def ink(self, dark: bool = True) -> tuple[int, int, int]:
        low, high = (0, 91) if dark else (215, 256)
        red, green, blue = (int(v) for v in self.rng.integers(low, high, 3))
        return red, green, blue

    def hand(self, pixels: np.ndarray, side: int) -> Image.Image:
        """8x8 handwriting, leaning, in a square of `side` pixels; a varied one as other hands would write."""
        stroke = Image.fromarray(pixels)
        if not self.varied:
            stroke = stroke.resize((side, side), Image.Resampling.BICUBIC)
            return stroke.rotate(self.integer(-12, 12), Image.Resampling.BILINEAR)
        # Each corner moves by itself: wider, smaller, sheared and bent.
        corners = np.array(((0, 0), (0, 64), (64, 64), (64, 0))) + self.rng.uniform(-6, 6, (4, 2))
        bent = stroke.resize((64, 64), Image.Resampling.BICUBIC).transform(
            (side, side), Image.Transform.QUAD, corners.ravel().tolist(), Image.Resampling.BILINEAR
        )
        thickness = self.rng.uniform(0.6, 1.6)
        levels = (np.arange(256) / 255) ** thickness * 255
        bent = bent.point(levels.round().astype(np.uint8).tolist())
        return bent.rotate(self.integer(-20, 20), Image.Resampling.BILINEAR)

    def bars(self) -> tuple[str, float]:
        """How the bars of a chart are drawn, and half their width in pitches; varied ones may be missing."""
        if not self.varied:
            return "filled", 0.3
        return self.one_of(("filled", "outline", "none")), float(self.rng.uniform(0.1, 0.4))

    def value(self) -> str:
        """A number of two to four digits."""
        digits = self.integer(2, 4)
        return str(self.integer(10 ** (digits - 1), 10**digits - 1))


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf", size)


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
    words = [word if word in WORDS else question for word in text.split(" ") for _ in (*word, " ")]
    return [
        Character(character, left + (start + end) / 2, middle, (question, word))
        for character, start, end, word in zip(text, starts, ends, words[:-1], strict=True)
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
    image, ground = scene.photograph()
    font = scene.font(14, 20)
    text = scene.value() if scene.rng.random() < 0.5 else scene.one_of(WORDS)
    width, height = _plate_size(text, font)
    at = scene.integer(0, SIZE - width - 1), scene.integer(0, SIZE - height - 1)
    characters, plate = _plate(scene, image, at, text, font)
    return Sample(image, (("sign", text),), tuple(characters), (ground, plate))


def _plate_size(text: str, font: ImageFont.FreeTypeFont) -> tuple[int, int]:
    return int(font.getlength(text)) + 12, int(font.size * 1.2) + 8


def _plate(
    scene: _Scene, image: Image.Image, at: tuple[int, int], text: str, font: ImageFont.FreeTypeFont
) -> tuple[list[Character], Region]:
    """Draw a plate with its top left at `at`: dark on light or light on dark."""
    draw, (left, top), (width, height) = ImageDraw.Draw(image), at, _plate_size(text, font)
    dark_text = scene.rng.random() < 0.5
    box = (left, top, left + width, top + height)
    draw.rectangle(box, fill=scene.ink(not dark_text), outline=scene.ink(dark_text))
    characters = _write(draw, (left + 6, top + 4), text, font, scene.ink(dark_text), "sign")
    return characters, Region(("sign", "sign"), box)


def _charts(scene: _Scene) -> Sample:
    """Three to five bars, a label under each and its value printed above it; the question is a label."""
    page = scene.paper()
    draw, font, ink = ImageDraw.Draw(page), scene.font(12, 13), scene.ink()
    labels = scene.some_of(LABELS, scene.integer(3, 5))
    scale = scene.one_of((99, 999))
    values = [scene.integer(scale // 10 + 1, scale) for _ in labels]
    pitch, floor, tallest = SIZE / len(labels), SIZE - 20, SIZE - 42
    bar = scene.one_of(tuple(COLOURS.values())[:-1])
    style, half = scene.bars()
    characters = []
    for column, (label, value) in enumerate(zip(labels, values, strict=True)):
        middle = (column + 0.5) * pitch
        top = floor - tallest * value / scale
        box = (middle - pitch * half, top, middle + pitch * half, floor)
        if style != "none":
            draw.rectangle(box, fill=bar if style == "filled" else None, outline=ink)
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
    image, ground = scene.ground()
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
    shapes = (Region((colour, kind), (x - radius, y - radius, x + radius, y + radius)) for x, y in centres)
    turns = (("colour", colour), ("kind", kind), ("count", str(wanted)), ("side", side))
    return Sample(image, turns, regions=(*ground, *shapes))


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
    image, ground = scene.ground()
    side = scene.integer(60, 110)
    region = _digit(scene, image, (scene.integer(0, SIZE - side), scene.integer(0, SIZE - side)), side)
    return Sample(image, (region.names,), regions=(*ground, region))


def _digit(scene: _Scene, image: Image.Image, at: tuple[int, int], side: int) -> Region:
    """Write a digit in a square with its top left at `at`, light on dark ground and dark on light."""
    pixels, digits = _handwriting()
    low, high = HANDWRITING[scene.split]
    index, (left, top) = scene.integer(low, high - 1), at
    stroke = scene.hand(pixels[index], side)
    box = (left, top, left + side, top + side)
    under = image.resize((1, 1), Image.Resampling.BOX, box).convert("L").getpixel((0, 0))
    assert isinstance(under, int)
    ink = scene.integer(0, 30) if under > 127 else scene.integer(225, 255)
    image.paste((ink, ink, ink), (left, top), stroke)
    return Region(("digit", str(digits[index])), box)


def _scenes(scene: _Scene) -> Sample:
    """A crop of one of twelve photographs: which one is it?"""
    image, ground = scene.photograph(scene.one_of(tuple(PHOTOGRAPHS)))
    return Sample(image, (ground.names,), regions=(ground,))


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
    return _shuffled(DRAW[benchmark](_Scene(rng, split)), rng)


def _shuffled(drawn: Sample, rng: np.random.Generator) -> Sample:
    order = rng.permutation(len(drawn.turns))
    return replace(drawn, turns=tuple(drawn.turns[int(i)] for i in order))


def _sheets(scene: _Scene) -> Sample:
    """A page full of lines like those of docs, as many as there is room for."""
    page = scene.paper()
    draw, font, ink = ImageDraw.Draw(page), scene.font(12, 17), scene.ink()
    pitch = scene.integer(int(font.size * 1.2), int(font.size * 1.5))
    keys = iter(scene.some_of(KEYS, len(KEYS)))
    turns: list[tuple[str, str]] = []
    characters: list[Character] = []
    for top in range(scene.integer(0, pitch), SIZE - pitch, pitch):
        left = float(scene.integer(1, 14))
        for key in keys:
            value = scene.value() if scene.rng.random() < 0.5 else scene.one_of(WORDS)
            width = font.getlength(f"{key}: {value}")
            if left + width > SIZE:
                break
            characters += _write(draw, (left, top), f"{key}: {value}", font, ink, key)
            turns.append((key, value))
            left += width + scene.integer(6, 20)
    return Sample(page, tuple(turns), tuple(characters))


def _plates(scene: _Scene) -> Sample:
    """A photograph full of signs: to learn reading from."""
    image, ground = scene.photograph()
    characters: list[Character] = []
    regions = [ground]
    for _ in range(24):
        text = scene.value() if scene.rng.random() < 0.5 else scene.one_of(WORDS)
        font = scene.font(14, 20)
        width, height = _plate_size(text, font)
        left, top = scene.integer(0, SIZE - width - 1), scene.integer(0, SIZE - height - 1)
        if all(_apart((left, top, left + width, top + height), region.box) for region in regions[1:]):
            written, region = _plate(scene, image, (left, top), text, font)
            characters += written
            regions.append(region)
    return Sample(image, (), tuple(characters), tuple(regions))


def _apart(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Whether two boxes share no pixel."""
    return one[2] < other[0] or other[2] < one[0] or one[3] < other[1] or other[3] < one[1]


def _handwritings(scene: _Scene) -> Sample:
    """Four handwritten digits, one in each quarter of the image: to learn reading from."""
    image, ground = scene.ground()
    half = SIZE // 2
    regions = list(ground)
    for left, top in ((0, 0), (half, 0), (0, half), (half, half)):
        side = scene.integer(60, half)
        at = left + scene.integer(0, half - side), top + scene.integer(0, half - side)
        regions.append(_digit(scene, image, at, side))
    return Sample(image, (), regions=tuple(regions))


ASKED = 6
"""Questions asked of one page full of lines."""
READING = {
    "sheets": 0.32,
    "docs": 0.1,
    "plates": 0.17,
    "charts": 0.12,
    "handwritings": 0.17,
    "shapes": 0.07,
    "scenes": 0.05,
}
"""What tower and projector alone learn from, with its shares: most are full of what there is to be read."""
ANSWERING = {
    "docs": 0.24,
    "sheets": 0.06,
    "signs": 0.18,
    "charts": 0.14,
    "shapes": 0.13,
    "digits": 0.17,
    "scenes": 0.08,
}
"""What all of the model learns to answer from, with its shares."""
LESSONS = DRAW | {"sheets": _sheets, "plates": _plates, "handwritings": _handwritings}


class LessonImages:
    """The images of lessons 0 to `count` with names, by index; of the first `reading` there is to be read.

    Of each kind a fraction `charts` are charts.
    """

    def __init__(self, count: int, reading: int, seed: int, charts: float | None = None) -> None:
        self.count, self.reading, self.seed, self.charts = count, reading, seed, charts

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[str, Image.Image]:
        reading = index < self.reading
        drawn = lesson(index, self.seed, reading=reading, transcribe=0.0, charts=self.charts)
        return f"lesson/{index:06d}", drawn.image


def _shares(shares: dict[str, float], charts: float | None) -> dict[str, float]:
    """Shares of lessons with another one of charts, the others as they are to each other."""
    if charts is None:
        return shares
    rest = (1 - charts) / (1 - shares["charts"])
    return {name: charts if name == "charts" else share * rest for name, share in shares.items()}


def lesson(
    index: int, seed: int, reading: bool, transcribe: float, again: int = 0, charts: float | None = None
) -> Sample:
    """Image `index` to train the micro model on: full of things to be read while it learns to read.

    Photographs, handwriting and bars vary more than in any split. A fraction `transcribe` of the docs asks
    for the whole page in place of single values (micro recipe). The image is a function of index, seed and
    `reading`; each `again` above 0 asks about it in another order, and for other lines of a full page.
    `charts` is the fraction of charts, where not that of READING and ANSWERING.
    """
    rng = np.random.default_rng([seed, zlib.crc32(b"lesson"), index])
    shares = _shares(READING if reading else ANSWERING, charts)
    name = str(rng.choice(list(shares), p=list(shares.values())))
    drawn = LESSONS[name](_Scene(rng, "train", varied=True))
    if again:
        rng = np.random.default_rng([seed, zlib.crc32(b"lesson"), index, again])
    if name == "sheets":
        drawn = replace(drawn, turns=_shuffled(drawn, rng).turns[:ASKED])
    drawn = _shuffled(drawn, rng)
    if name != "docs" or rng.random() >= transcribe:
        return drawn
    page = "".join(written.character for written in drawn.characters)
    lines = sorted(drawn.turns, key=lambda turn: page.index(f"{turn[0]}:{turn[1]}"))
    return replace(drawn, turns=((TRANSCRIBE, " ".join(f"{key} {value}" for key, value in lines)),))
