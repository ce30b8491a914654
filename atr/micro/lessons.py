"""Images and questions that train the micro models, more varied and with more content than the benchmarks."""

import zlib
from dataclasses import replace

import numpy as np
from PIL import Image, ImageDraw

from atr.micro.drawing import (
    SIZE,
    Character,
    Region,
    Sample,
    SplitSampler,
    draw_digit,
    draw_plate,
    plate_size,
    write_line,
)
from atr.micro.vocabulary import KEYS, TRANSCRIBE
from atr.micro.world import DRAW, shuffle_turns

QUESTIONS_PER_SHEET = 6
READING_SHARES = {
    "sheets": 0.32,
    "docs": 0.1,
    "plates": 0.17,
    "charts": 0.12,
    "handwritings": 0.17,
    "shapes": 0.07,
    "scenes": 0.05,
}
"""Shares of the kinds of lessons in the reading phase, before the model learns to answer."""
ANSWERING_SHARES = {
    "docs": 0.24,
    "sheets": 0.06,
    "signs": 0.18,
    "charts": 0.14,
    "shapes": 0.13,
    "digits": 0.17,
    "scenes": 0.08,
}
"""Shares of the kinds of lessons in the answering phase."""


def draw_lesson(
    index: int, seed: int, reading: bool, transcribe: float, again: int = 0, charts: float | None = None
) -> Sample:
    """Draw lesson `index` of the reading or the answering phase.

    The image depends only on index, seed, `reading` and `charts`, which replaces the share of charts. The
    number of earlier uses of the image, `again`, changes the order of its questions and, for a sheet, which
    lines they ask for. A docs lesson asks for its whole page, rather than single values, with probability
    `transcribe`.
    """
    rng = np.random.default_rng([seed, zlib.crc32(b"lesson"), index])
    shares = _set_chart_share(READING_SHARES if reading else ANSWERING_SHARES, charts)
    kind = str(rng.choice(list(shares), p=list(shares.values())))
    lesson = LESSONS[kind](VariedSampler(rng, "train"))
    if again:
        rng = np.random.default_rng([seed, zlib.crc32(b"lesson"), index, again])
    if kind == "sheets":
        lesson = replace(lesson, turns=shuffle_turns(lesson, rng).turns[:QUESTIONS_PER_SHEET])
    lesson = shuffle_turns(lesson, rng)
    if kind == "docs" and rng.random() < transcribe:
        return _ask_for_page(lesson)
    return lesson


def _set_chart_share(shares: dict[str, float], charts: float | None) -> dict[str, float]:
    """Replace the share of charts; the other shares keep their ratios."""
    if charts is None:
        return shares
    rest = (1 - charts) / (1 - shares["charts"])
    return {kind: charts if kind == "charts" else share * rest for kind, share in shares.items()}


def _ask_for_page(lesson: Sample) -> Sample:
    """The same page with a single question, whose answer is all lines from top to bottom."""
    page = "".join(written.character for written in lesson.characters)
    lines = sorted(lesson.turns, key=lambda turn: page.index(f"{turn[0]}:{turn[1]}"))
    return replace(lesson, turns=((TRANSCRIBE, " ".join(f"{key} {value}" for key, value in lines)),))


class LessonImages:
    """Names and images of lessons 0 to `count` - 1; the first `reading` belong to the reading phase.

    `charts` is the share of charts in each phase.
    """

    def __init__(self, count: int, reading: int, seed: int, charts: float | None = None) -> None:
        self.count, self.reading, self.seed, self.charts = count, reading, seed, charts

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[str, Image.Image]:
        reading = index < self.reading
        lesson = draw_lesson(index, self.seed, reading=reading, transcribe=0.0, charts=self.charts)
        return f"lesson/{index:06d}", lesson.image


class VariedSampler(SplitSampler):
    """Distorts photographs, handwriting and bars further than any split of the benchmarks does."""

    def photograph(self, name: str | None = None) -> tuple[Image.Image, Region]:
        """A crop of a photograph with changed brightness and contrast and, half of the time, colours."""
        crop, region = super().photograph(name)
        return self._change_light(crop), region

    def crop_size(self, part: Image.Image) -> tuple[int, int]:
        """Width and height of a crop that may be smaller, and need not be square."""
        width = self.integer(80, min(part.size))
        height = min(max(round(width * self.rng.uniform(0.8, 1.25)), 80), min(part.size))
        return width, height

    def _change_light(self, image: Image.Image) -> Image.Image:
        """Scale and shift all channels, half of the time each differently, which colours grey photographs."""
        channels = 3 if self.rng.random() < 0.5 else 1
        gains = np.broadcast_to(self.rng.uniform(0.7, 1.3, channels), 3)
        offsets = np.broadcast_to(self.rng.uniform(-25, 25, channels), 3)
        levels = np.arange(256)[None] * gains[:, None] + offsets[:, None]
        return image.point(levels.clip(0, 255).astype(np.uint8).ravel().tolist())

    def stroke(self, pixels: np.ndarray, side: int) -> Image.Image:
        """Mask of a handwriting sample: bent, thicker or thinner, and rotated by up to 20 degrees."""
        corners = np.array(((0, 0), (0, 64), (64, 64), (64, 0))) + self.rng.uniform(-6, 6, (4, 2))
        stroke = Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC)
        stroke = stroke.transform(
            (side, side), Image.Transform.QUAD, corners.ravel().tolist(), Image.Resampling.BILINEAR
        )
        thickness = self.rng.uniform(0.6, 1.6)
        levels = (np.arange(256) / 255) ** thickness * 255
        stroke = stroke.point(levels.round().astype(np.uint8).tolist())
        return stroke.rotate(self.integer(-20, 20), Image.Resampling.BILINEAR)

    def bar_style(self) -> tuple[str, float]:
        """Bars may be outlines or missing, and narrow or wide."""
        return self.choose(("filled", "outline", "none")), float(self.rng.uniform(0.1, 0.4))


def _draw_sheets(sampler: SplitSampler) -> Sample:
    """A page full of lines as in docs."""
    page = sampler.paper()
    draw, font, ink = ImageDraw.Draw(page), sampler.font(12, 17), sampler.ink()
    pitch = sampler.integer(int(font.size * 1.2), int(font.size * 1.5))
    keys = iter(sampler.choose_distinct(KEYS, len(KEYS)))
    turns: list[tuple[str, str]] = []
    characters: list[Character] = []
    for top in range(sampler.integer(0, pitch), SIZE - pitch, pitch):
        left = float(sampler.integer(1, 14))
        for key in keys:
            value = sampler.word_or_number()
            width = font.getlength(f"{key}: {value}")
            if left + width > SIZE:
                break
            characters += write_line(draw, (left, top), f"{key}: {value}", font, ink, key)
            turns.append((key, value))
            left += width + sampler.integer(6, 20)
    return Sample(page, tuple(turns), tuple(characters))


def _draw_plates(sampler: SplitSampler) -> Sample:
    """A photograph full of signs, without questions."""
    image, background = sampler.photograph()
    characters: list[Character] = []
    regions = [background]
    for _ in range(24):
        text = sampler.word_or_number()
        font = sampler.font(14, 20)
        width, height = plate_size(text, font)
        left, top = sampler.integer(0, SIZE - width - 1), sampler.integer(0, SIZE - height - 1)
        if all(_are_apart((left, top, left + width, top + height), region.box) for region in regions[1:]):
            written, region = draw_plate(sampler, image, (left, top), text, font)
            characters += written
            regions.append(region)
    return Sample(image, (), tuple(characters), tuple(regions))


def _are_apart(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Whether two boxes share no pixel."""
    return one[2] < other[0] or other[2] < one[0] or one[3] < other[1] or other[3] < one[1]


def _draw_handwritings(sampler: SplitSampler) -> Sample:
    """Four handwritten digits, one in each quarter of the image, without questions."""
    image, background = sampler.background()
    half = SIZE // 2
    regions = list(background)
    for left, top in ((0, 0), (half, 0), (0, half), (half, half)):
        side = sampler.integer(60, half)
        at = left + sampler.integer(0, half - side), top + sampler.integer(0, half - side)
        regions.append(draw_digit(sampler, image, at, side))
    return Sample(image, (), regions=tuple(regions))


LESSONS = DRAW | {"sheets": _draw_sheets, "plates": _draw_plates, "handwritings": _draw_handwritings}
"""The kinds of lessons, each with the function that draws one."""
