"""Draws docs/kept-tokens.png: the first held-out page and sign, the patches kept at 40 %, and the answers.

It takes the shipped micro model and selectors, and runs in a fresh clone:

    python docs/kept_tokens.py
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from atr import FeatureSelector, reduce
from atr.micro import world
from atr.reduction.registry import build_reducer
from atr.vlm.checkpoint import load_vlm

MICRO = Path(__file__).parents[1] / "data/micro"
BENCHMARKS = ("docs", "signs")
COLUMNS = {"all tokens": 1.0, "random": 0.4, "selector": 0.4, "distilled": 0.4}
SIDE, GAP, LINE = 216, 12, 28
GREY = (158, 163, 168)


def main(output: str = "docs/kept-tokens.png") -> None:
    """One row per image, one column per reducer, and the model's answer below each."""
    model, processor = load_vlm(str(MICRO / "llava"), torch.float32)
    size = (len(COLUMNS) * (SIDE + GAP) - GAP, LINE + len(BENCHMARKS) * (SIDE + LINE + GAP) - GAP)
    picture = Image.new("RGB", size, "white")
    for column, (name, keep) in enumerate(COLUMNS.items()):
        title = name if keep == 1 else f"{name}, {100 * keep:.0f} % kept"
        _write(picture, column, 0, title, weight="bold")
        for row, benchmark in enumerate(BENCHMARKS):
            top = LINE + row * (SIDE + LINE + GAP)
            sample = world.sample(benchmark, "evaluate", 0, seed=0)
            question, right = sample.turns[0]
            kept, answer = _answer(model, processor, sample.image, question, _reducer(name), keep)
            shown = _grey_out(sample.image, kept).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            picture.paste(shown, (column * (SIDE + GAP), top))
            colour = "darkgreen" if answer == right else "firebrick"
            _write(picture, column, top + SIDE, f"{question}?  {answer}", colour)
    picture.save(output, optimize=True)
    print(output)


def _reducer(name: str) -> Any:
    """A shipped selector, or else the random reducer, which keeps all tokens as well as any."""
    shipped = MICRO / "selectors" / name
    return FeatureSelector.from_pretrained(shipped) if shipped.is_dir() else build_reducer("random")


@torch.inference_mode()
def _answer(
    model: Any, processor: Any, image: Image.Image, question: str, reducer: Any, keep: float
) -> tuple[list[int], str]:
    """The kept tokens, and the model's answer from them alone."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}])
    reduced = reduce(model, processor(images=image, text=prompt, return_tensors="pt"), reducer, keep)
    ids_1L = model.generate(**reduced, max_new_tokens=8, do_sample=False)
    answer = processor.decode(ids_1L[0, reduced["input_ids"].shape[1] :], skip_special_tokens=True)
    return reduced.kept[0].indices_K.tolist(), answer.strip()


def _grey_out(image: Image.Image, kept: Iterable[int], side: int = 12) -> Image.Image:
    """The image with its dropped patches painted grey, of `side` x `side` patches."""
    greyed, patch = image.copy(), image.width // side
    draw = ImageDraw.Draw(greyed)
    for token in set(range(side * side)) - set(kept):
        left, top = patch * (token % side), patch * (token // side)
        draw.rectangle((left, top, left + patch - 1, top + patch - 1), fill=GREY)
    return greyed


def _write(
    picture: Image.Image, column: int, top: int, text: str, colour: str = "black", weight: str = "normal"
) -> None:
    path = font_manager.findfont(font_manager.FontProperties(family="DejaVu Sans", weight=weight))
    font = ImageFont.truetype(path, 15)
    centre = column * (SIDE + GAP) + SIDE / 2
    ImageDraw.Draw(picture).text((centre, top + LINE / 2), text, colour, font, anchor="mm")


if __name__ == "__main__":
    main(*sys.argv[1:])
