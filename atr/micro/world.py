"""The micro world: six procedural benchmarks on real photographs, fonts and handwriting.

A sample is a pure function of (seed, benchmark, split, index), so any part of the world can be drawn alone,
in parallel, or again. The held-out split `evaluate` shares no photograph region and no
handwriting sample with the other splits, and one font occurs only there.
"""

import zlib
from collections.abc import Callable
from dataclasses import replace
from itertools import count

import numpy as np
from PIL import ImageDraw

from atr.datasets.photographs import PHOTOGRAPHS
from atr.micro.drawing import (
    SIZE,
    Region,
    Sample,
    SplitSampler,
    draw_digit,
    draw_plate,
    draw_shape,
    plate_size,
    write_line,
)
from atr.micro.vocabulary import COLOURS, KEYS, KINDS, LABELS, SIDES


def sample(benchmark: str, split: str, index: int, seed: int) -> Sample:
    """Sample `index` of a split of one benchmark: an image and its questions in random order."""
    rng = np.random.default_rng([seed, zlib.crc32(benchmark.encode()), zlib.crc32(split.encode()), index])
    return shuffle_turns(DRAW[benchmark](SplitSampler(rng, split)), rng)


def shuffle_turns(ordered: Sample, rng: np.random.Generator) -> Sample:
    """The same sample with its questions in random order."""
    order = rng.permutation(len(ordered.turns))
    return replace(ordered, turns=tuple(ordered.turns[int(i)] for i in order))


def _draw_docs(sampler: SplitSampler) -> Sample:
    """Two to five lines `key: value` on paper; the question is a key."""
    page = sampler.paper()
    draw, font, ink = ImageDraw.Draw(page), sampler.font(13, 16), sampler.ink()
    keys = sampler.choose_distinct(KEYS, sampler.integer(2, 5))
    values = [sampler.word_or_number() for _ in keys]
    lines = [f"{key}: {value}" for key, value in zip(keys, values, strict=True)]
    pitch = sampler.integer(int(font.size * 1.25), min(SIZE // len(lines), 34))
    left = sampler.integer(2, max(2, int(SIZE - 2 - max(font.getlength(line) for line in lines))))
    top = sampler.integer(0, SIZE - pitch * len(lines))
    characters = [
        character
        for row, (key, line) in enumerate(zip(keys, lines, strict=True))
        for character in write_line(draw, (left, top + row * pitch), line, font, ink, key)
    ]
    return Sample(page, tuple(zip(keys, values, strict=True)), tuple(characters))


def _draw_signs(sampler: SplitSampler) -> Sample:
    """A word or a number on a plate, anywhere on a photograph."""
    image, background = sampler.photograph()
    font = sampler.font(14, 20)
    text = sampler.word_or_number()
    width, height = plate_size(text, font)
    at = sampler.integer(0, SIZE - width - 1), sampler.integer(0, SIZE - height - 1)
    characters, plate = draw_plate(sampler, image, at, text, font)
    return Sample(image, (("sign", text),), tuple(characters), (background, plate))


def _draw_charts(sampler: SplitSampler) -> Sample:
    """Three to five bars, a label under each and its value printed above it; the question is a label."""
    page = sampler.paper()
    draw, font, ink = ImageDraw.Draw(page), sampler.font(12, 13), sampler.ink()
    labels = sampler.choose_distinct(LABELS, sampler.integer(3, 5))
    scale = sampler.choose((99, 999))
    values = [sampler.integer(scale // 10 + 1, scale) for _ in labels]
    pitch, floor, tallest = SIZE / len(labels), SIZE - 20, SIZE - 42
    colour = sampler.choose(tuple(COLOURS.values())[:-1])
    style, half_width = sampler.bar_style()
    characters = []
    for column, (label, value) in enumerate(zip(labels, values, strict=True)):
        middle = (column + 0.5) * pitch
        top = floor - tallest * value / scale
        box = (middle - pitch * half_width, top, middle + pitch * half_width, floor)
        if style != "none":
            draw.rectangle(box, fill=colour if style == "filled" else None, outline=ink)
        for text, height in ((str(value), top - 16), (label, floor + 2)):
            left = middle - font.getlength(text) / 2
            characters += write_line(draw, (left, height), text, font, ink, label)
    turns = tuple((label, str(value)) for label, value in zip(labels, values, strict=True))
    return Sample(page, turns, tuple(characters))


def _draw_shapes(sampler: SplitSampler) -> Sample:
    """One to four equal shapes in one half of the image; questions ask colour, kind, count and side."""
    image, background = sampler.background()
    colour, kind, side = sampler.choose(tuple(COLOURS)), sampler.choose(KINDS), sampler.choose(SIDES)
    number, radius = sampler.integer(1, 4), sampler.integer(10, 16)
    centres = _place_shapes(sampler, number, radius, side)
    draw = ImageDraw.Draw(image)
    for centre in centres:
        draw_shape(draw, kind, centre, radius, COLOURS[colour])
    shapes = (Region((colour, kind), (x - radius, y - radius, x + radius, y + radius)) for x, y in centres)
    turns = (("colour", colour), ("kind", kind), ("count", str(number)), ("side", side))
    return Sample(image, turns, regions=(*background, *shapes))


def _place_shapes(sampler: SplitSampler, number: int, radius: int, side: str) -> list[tuple[int, int]]:
    """Centres of shapes that do not touch, in the left or the right half of the image."""
    centres: list[tuple[int, int]] = []
    for attempt in count(1):
        if len(centres) == number:
            break
        if attempt % 100 == 0:  # earlier shapes may leave no room for the last
            centres.clear()
        x = sampler.integer(radius + 2, SIZE // 2 - radius - 2)
        y = sampler.integer(radius + 2, SIZE - radius - 2)
        x = x if side == "left" else SIZE - x
        if all((x - a) ** 2 + (y - b) ** 2 > (2.4 * radius) ** 2 for a, b in centres):
            centres.append((x, y))
    return centres


def _draw_digits(sampler: SplitSampler) -> Sample:
    """One handwritten digit, 60 to 110 pixels high, anywhere on a photograph or a plain colour."""
    image, background = sampler.background()
    side = sampler.integer(60, 110)
    at = sampler.integer(0, SIZE - side), sampler.integer(0, SIZE - side)
    region = draw_digit(sampler, image, at, side)
    return Sample(image, (region.names,), regions=(*background, region))


def _draw_scenes(sampler: SplitSampler) -> Sample:
    """A crop of one of twelve photographs; the answer is its name."""
    image, region = sampler.photograph(sampler.choose(tuple(PHOTOGRAPHS)))
    return Sample(image, (region.names,), regions=(region,))


DRAW: dict[str, Callable[[SplitSampler], Sample]] = {
    "docs": _draw_docs,
    "signs": _draw_signs,
    "charts": _draw_charts,
    "shapes": _draw_shapes,
    "digits": _draw_digits,
    "scenes": _draw_scenes,
}
"""The function that draws a sample of each benchmark."""
