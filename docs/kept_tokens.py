"""Draws docs/kept-tokens.png: the first held-out page and sign, the patches kept at 40 %, and the answers.

It reads what `make reproduce` leaves in data/prepared and experiments/evaluate:

    python docs/kept_tokens.py
"""

import io
import json
import sys
from pathlib import Path

import pyarrow.parquet as pq
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from atr.core.answer_files import load_rows
from atr.core.records import Row

PREPARED, EVALUATE = Path("data/prepared/evaluate"), Path("experiments/evaluate")
IMAGES = ("docs/000000", "signs/000000")
REDUCERS = {"full": 1.0, "random": 0.4, "selector": 0.4, "distilled": 0.4}
SIDE, GAP, LINE = 216, 12, 28
GREY = (158, 163, 168)


def main(output: str = "docs/kept-tokens.png") -> None:
    """One row per image, one column per reducer, and the model's answer below each."""
    images = {
        row["id"]: row["image"]
        for path in PREPARED.glob("*.parquet")
        for row in pq.read_table(path).to_pylist()
    }
    size = (len(REDUCERS) * (SIDE + GAP) - GAP, LINE + len(IMAGES) * (SIDE + LINE + GAP) - GAP)
    picture = Image.new("RGB", size, "white")
    for column, (reducer, keep) in enumerate(REDUCERS.items()):
        stored = json.loads((EVALUATE / reducer / "masks.json").read_text())
        answers = _answers(EVALUATE / reducer / "results.jsonl", keep)
        _write(
            picture,
            column,
            0,
            "all tokens" if keep == 1 else f"{reducer}, {100 * keep:.0f} % kept",
            weight="bold",
        )
        for row, name in enumerate(IMAGES):
            top = LINE + row * (SIDE + LINE + GAP)
            image = Image.open(io.BytesIO(images[name])).convert("RGB")
            kept = _grey_out(image, stored["grid"], set(stored["masks"][name]))
            picture.paste(kept.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (column * (SIDE + GAP), top))
            answer = answers[name]
            colour = "darkgreen" if answer.score == 1 else "firebrick"
            _write(picture, column, top + SIDE, f"{answer.question}?  {answer.prediction}", colour)
    picture.save(output, optimize=True)
    print(output)


def _answers(path: Path, keep: float) -> dict[str, Row]:
    """The first answer about each image at that kept fraction."""
    answers: dict[str, Row] = {}
    for row in load_rows(path):
        if row.keep == keep:
            answers.setdefault(row.image, row)
    return answers


def _grey_out(image: Image.Image, grid: list[int], kept: set[int]) -> Image.Image:
    """The image with its dropped patches painted grey."""
    (rows, columns), greyed = grid, image.copy()
    height, width = image.height // rows, image.width // columns
    draw = ImageDraw.Draw(greyed)
    for token in set(range(rows * columns)) - kept:
        left, top = width * (token % columns), height * (token // columns)
        draw.rectangle((left, top, left + width - 1, top + height - 1), fill=GREY)
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
