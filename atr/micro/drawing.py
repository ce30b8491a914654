"""Draws the parts of the micro world's images: photographs, text, handwriting, plates and shapes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from atr.datasets.photographs import PHOTOGRAPHS, package_file, photograph
from atr.micro.vocabulary import WORDS

T = TypeVar("T")

SIZE = 168
"""Side of every image in pixels."""
WHOLE_IMAGE = (0, 0, SIZE, SIZE)

FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
)
HELD_OUT_FONT = "DejaVuSansMono-Bold"
PHOTOGRAPH_SPLIT = 0.55
"""The left fraction of every photograph is for training, the rest held out; both are wider than a crop."""
SMALLEST_CROP = 160
HANDWRITING = {
    "train": (0, 1300),
    "pretrain": (0, 1300),
    "validation": (1300, 1500),
    "evaluate": (1500, 1797),
}
"""Range of handwriting samples of each split, the end excluded."""


class Character(NamedTuple):
    """A written character, its centre in pixels, and its names.

    The names are the question that its line answers, and its word; a character of a number has no word and
    is named by the question twice.
    """

    character: str
    x: float
    y: float
    names: tuple[str, str]


class Region(NamedTuple):
    """An object in the image: its two names, and its box (left, top, right, bottom) in pixels."""

    names: tuple[str, str]
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Sample:
    """One RGB image of SIZE x SIZE pixels with its questions and annotations."""

    image: Image.Image
    turns: tuple[tuple[str, str], ...]
    """Questions, each with its one answer."""
    characters: tuple[Character, ...] = ()
    regions: tuple[Region, ...] = ()
    """Later regions lie in front of earlier ones."""


@dataclass(frozen=True)
class SplitSampler:
    """Makes the random choices for one image, among the photographs, fonts and handwriting of its split."""

    rng: np.random.Generator
    split: str

    def choose(self, items: Sequence[T]) -> T:
        """A random item."""
        return items[int(self.rng.integers(len(items)))]

    def choose_distinct(self, items: Sequence[T], count: int) -> list[T]:
        """`count` different items in random order."""
        return [items[int(i)] for i in self.rng.permutation(len(items))[:count]]

    def integer(self, low: int, high: int) -> int:
        """An integer from low to high, both included."""
        return int(self.rng.integers(low, high + 1))

    def font(self, low: int, high: int) -> ImageFont.FreeTypeFont:
        """A font of `low` to `high` pixels."""
        names = (*FONTS, HELD_OUT_FONT) if self.split == "evaluate" else FONTS
        return _load_font(self.choose(names), self.integer(low, high))

    def number(self) -> str:
        """A number of two to four digits."""
        digits = self.integer(2, 4)
        return str(self.integer(10 ** (digits - 1), 10**digits - 1))

    def word_or_number(self) -> str:
        """A number or a word, each half of the time."""
        return self.number() if self.rng.random() < 0.5 else self.choose(WORDS)

    def photograph(self, name: str | None = None) -> tuple[Image.Image, Region]:
        """A crop of a photograph, by default of a random one."""
        name = name or self.choose(tuple(PHOTOGRAPHS))
        part = _photograph_part(name, held_out=self.split == "evaluate")
        crop = part.resize((SIZE, SIZE), Image.Resampling.BILINEAR, self._crop_box(part))
        if self.rng.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return crop, Region(("scene", name), WHOLE_IMAGE)

    def _crop_box(self, part: Image.Image) -> tuple[int, int, int, int]:
        width, height = self.crop_size(part)
        left, top = self.integer(0, part.width - width), self.integer(0, part.height - height)
        return left, top, left + width, top + height

    def crop_size(self, part: Image.Image) -> tuple[int, int]:
        """Width and height of a square crop of a photograph's part, in pixels."""
        side = self.integer(SMALLEST_CROP, min(part.size))
        return side, side

    def background(self) -> tuple[Image.Image, tuple[Region, ...]]:
        """A photograph or a plain colour, each half of the time."""
        if self.rng.random() < 0.5:
            image, region = self.photograph()
            return image, (region,)
        return Image.new("RGB", (SIZE, SIZE), tuple(int(v) for v in self.rng.integers(60, 200, 3))), ()

    def paper(self) -> Image.Image:
        """A light plain page."""
        return Image.new("RGB", (SIZE, SIZE), tuple(int(v) for v in self.rng.integers(215, 256, 3)))

    def ink(self, dark: bool = True) -> tuple[int, int, int]:
        """A dark or a light colour."""
        low, high = (0, 91) if dark else (215, 256)
        red, green, blue = (int(v) for v in self.rng.integers(low, high, 3))
        return red, green, blue

    def stroke(self, pixels: np.ndarray, side: int) -> Image.Image:
        """Mask of one 8x8 handwriting sample, rotated by up to 12 degrees, in a square of `side` pixels."""
        stroke = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
        return stroke.rotate(self.integer(-12, 12), Image.Resampling.BILINEAR)

    def bar_style(self) -> tuple[str, float]:
        """How a chart draws its bars: filled, outline or none; and half their width over their distance."""
        return "filled", 0.3


@cache
def _load_font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(package_file("matplotlib", f"mpl-data/fonts/ttf/{name}.ttf"), size)


@cache
def _photograph_part(name: str, held_out: bool) -> Image.Image:
    whole = photograph(name)
    cut = round(whole.width * PHOTOGRAPH_SPLIT)
    return whole.crop((cut, 0, whole.width, whole.height) if held_out else (0, 0, cut, whole.height))


@cache
def _load_handwriting() -> tuple[np.ndarray, np.ndarray]:
    """Pixels of scikit-learn's digits, uint8 (1797, 8, 8), and their labels (1797,)."""
    rows = np.loadtxt(package_file("sklearn", "datasets/data/digits.csv.gz"), delimiter=",")
    pixels, digits = rows[:, :-1], rows[:, -1].astype(int)
    return (pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8), digits


def write_line(
    draw: ImageDraw.ImageDraw,
    at: tuple[float, float],
    text: str,
    font: ImageFont.FreeTypeFont,
    fill: tuple[int, ...],
    question: str,
) -> list[Character]:
    """Write `text`, which answers `question`, with its top left at `at`; return its characters."""
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


def plate_size(text: str, font: ImageFont.FreeTypeFont) -> tuple[int, int]:
    """Width and height in pixels of the plate that `draw_plate` draws."""
    return int(font.getlength(text)) + 12, int(font.size * 1.2) + 8


def draw_plate(
    sampler: SplitSampler, image: Image.Image, at: tuple[int, int], text: str, font: ImageFont.FreeTypeFont
) -> tuple[list[Character], Region]:
    """Draw a plate with its top left at `at`: dark text on light or light on dark."""
    draw, (left, top), (width, height) = ImageDraw.Draw(image), at, plate_size(text, font)
    dark_text = sampler.rng.random() < 0.5
    box = (left, top, left + width, top + height)
    draw.rectangle(box, fill=sampler.ink(not dark_text), outline=sampler.ink(dark_text))
    characters = write_line(draw, (left + 6, top + 4), text, font, sampler.ink(dark_text), "sign")
    return characters, Region(("sign", "sign"), box)


def draw_digit(sampler: SplitSampler, image: Image.Image, at: tuple[int, int], side: int) -> Region:
    """Draw a handwritten digit in a square with its top left at `at`: light on dark or dark on light."""
    pixels, digits = _load_handwriting()
    low, high = HANDWRITING[sampler.split]
    index, (left, top) = sampler.integer(low, high - 1), at
    stroke = sampler.stroke(pixels[index], side)
    box = (left, top, left + side, top + side)
    mean_grey = image.resize((1, 1), Image.Resampling.BOX, box).convert("L").getpixel((0, 0))
    assert isinstance(mean_grey, int)
    ink = sampler.integer(0, 30) if mean_grey > 127 else sampler.integer(225, 255)
    image.paste((ink, ink, ink), (left, top), stroke)
    return Region(("digit", str(digits[index])), box)


def draw_shape(
    draw: ImageDraw.ImageDraw, kind: str, centre: tuple[int, int], radius: int, fill: tuple[int, int, int]
) -> None:
    """Draw a circle, square or triangle of KINDS, `2 * radius` pixels wide and high."""
    x, y = centre
    box = (x - radius, y - radius, x + radius, y + radius)
    outline = (20, 20, 20)
    if kind == "circle":
        draw.ellipse(box, fill=fill, outline=outline)
    elif kind == "square":
        draw.rectangle(box, fill=fill, outline=outline)
    else:
        corners = ((x, y - radius), (x - radius, y + radius), (x + radius, y + radius))
        draw.polygon(corners, fill=fill, outline=outline)
