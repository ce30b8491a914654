"""The datasets of the hub's benchmarks in miniature: parquet files in their schemas, under their hub ids.

And a cache of the hub's, which models and selectors are loaded from as if they had been downloaded.
Loaded with runpy, as tests are no package: see conftest.py beside it.
"""

import hashlib
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
STRING, STRINGS = pa.string(), pa.list_(pa.string())


def png(number: int) -> bytes:
    """A small picture of its own for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (18, 24, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png")
    return buffer.getvalue()


def image(number: int) -> dict[str, Any]:
    """A picture as the hub stores it."""
    return {"bytes": png(number), "path": None}


DATASETS: dict[str, tuple[str, dict[str, pa.DataType], list[dict[str, Any]]]] = {
    "textvqa": (
        "lmms-lab/textvqa/data/validation-{part}.parquet",
        {"image_id": STRING, "question_id": pa.int32(), "question": STRING, "image": IMAGE,
         "answers": STRINGS, "ocr_tokens": STRINGS},
        [
            {"image_id": f"i{n}", "question_id": 34602 + n, "question": f"what BRAND is number {n}?",
             "image": image(n), "answers": ["nokia"] * 7 + ["no kia", "Nokia.", "phone"], "ocr_tokens": []}
            for n in range(5)
        ],
    ),
    "docvqa": (
        "lmms-lab/DocVQA/DocVQA/validation-{part}.parquet",
        {"questionId": STRING, "question": STRING, "image": IMAGE, "docId": pa.int64(), "answers": STRINGS},
        [
            {"questionId": f"{49153 + n}", "question": f"What is the date, {n}?", "image": image(10 + n // 2),
             "docId": n // 2, "answers": ["11/1/1989", "1989"]}
            for n in range(4)
        ],
    ),
    "infovqa": (
        "lmms-lab/DocVQA/InfographicVQA/validation-{part}.parquet",
        {"questionId": STRING, "question": STRING, "answers": STRINGS, "image": IMAGE, "ocr": STRING},
        [{"questionId": f"{n}", "question": "How many?", "answers": ["5%"], "image": image(20 + n), "ocr": ""}
         for n in range(3)],
    ),
    "chartqa": (
        "lmms-lab/ChartQA/data/test-{part}.parquet",
        {"type": STRING, "question": STRING, "answer": STRING, "image": IMAGE},
        [{"type": "human_test", "question": "Which value?", "answer": "14", "image": image(30 + n)}
         for n in range(3)],
    ),
    "ocrbench": (
        "echo840/OCRBench/data/test-{part}.parquet",
        {"dataset": STRING, "question": STRING, "question_type": STRING, "answer": STRINGS, "image": IMAGE},
        [
            {"dataset": dataset, "question": f" {question}\n", "question_type": kind, "answer": answers,
             "image": image(110 + n)}
            for n, (dataset, kind, question, answers) in enumerate((
                ("IIIT5K", "Regular Text Recognition", "What is written in the image?", ["CENTRE"]),
                ("docVQA", "Doc-oriented VQA", "What is the date?", ["11/1/1989", "1989"]),
                ("HME100k", "Handwritten Mathematical Expression Recognition", "Which formula?", ["x ^ 2"]),
            ))
        ],
    ),
    "mmbench": (
        "lmms-lab/MMBench/en/dev-{part}.parquet",
        {"index": STRING, "question": STRING, "hint": STRING, "answer": STRING,
         **dict.fromkeys("ABCD", STRING), "category": STRING, "image": IMAGE, "L2-category": STRING},
        [
            {"index": f"{turn * 1_000_000 + unit}", "question": f"Which is it, {unit}?",
             "hint": "nan" if unit else "Look at the fruit.", "answer": "ABC"[turn],
             **{letter: ["apple", "pear", "plum"][(place - turn) % 3] for place, letter in enumerate("ABC")},
             "D": "nan", "category": "c", "image": image(40 + unit), "L2-category": "l"}
            for turn in range(3) for unit in range(4)
        ],
    ),
    "ai2d": (
        "lmms-lab/ai2d/data/test-{part}.parquet",
        {"question": STRING, "options": STRINGS, "answer": STRING, "image": IMAGE},
        [{"question": "Which eats grass?", "options": ["fox", "hare", "owl"], "answer": "1",
          "image": image(50 + n)} for n in range(3)],
    ),
    "gqa": (
        "lmms-lab/GQA/testdev_balanced_instructions/testdev-{part}.parquet",
        {"id": STRING, "imageId": STRING, "question": STRING, "answer": STRING, "fullAnswer": STRING},
        [{"id": f"2{n}", "imageId": f"n{n % 2}", "question": "Is it overcast?", "answer": "no",
          "fullAnswer": "No, it is clear."} for n in range(4)],
    ),
    "gqa images": (
        "lmms-lab/GQA/testdev_balanced_images/testdev-{part}.parquet",
        {"id": STRING, "image": IMAGE},
        [{"id": f"n{n}", "image": image(60 + n)} for n in range(3)],
    ),
    "mmmu": (
        "lmms-lab/MMMU/data/validation-{part}.parquet",
        {"id": STRING, "question": STRING, "options": STRING, "answer": STRING, "question_type": STRING,
         **{f"image_{n}": IMAGE for n in range(1, 8)}},
        [
            {"id": "validation_Art_1", "question": "Compare <image 1> with <image 2>.",
             "options": "['the first', '<image 3>']", "answer": "B", "question_type": "multiple-choice",
             **{f"image_{n}": image(70 + n) for n in range(1, 5)}},
            {"id": "validation_Math_2", "question": "How long is it? <image 1>", "options": "[]",
             "answer": "['24/7', '3.429']", "question_type": "open", "image_1": image(78)},
            {"id": "validation_Music_3", "question": "Which note? <image 1>", "options": "['c', 'd']",
             "answer": "A", "question_type": "multiple-choice", "image_1": image(79)},
        ],
    ),
    "mmstar": (
        "Lin-Chen/MMStar/mmstar.parquet",
        {"index": pa.int64(), "question": STRING, "image": pa.binary(), "answer": STRING, "category": STRING},
        [{"index": n, "question": "What is it?\nOptions: A: a cat, B: a dog, C: an owl, D: a hare",
          "image": png(80 + n), "answer": "ABCD"[n], "category": "c"} for n in range(4)],
    ),
    "scienceqa": (
        "lmms-lab/ScienceQA/ScienceQA-IMG/test-{part}.parquet",
        {"image": IMAGE, "question": STRING, "choices": STRINGS, "answer": pa.int8(), "hint": STRING},
        [{"image": image(90 + n), "question": "Which is colder?", "choices": ["ice", "tea"], "answer": n % 2,
          "hint": "Both are water." * (n % 2)} for n in range(3)],
    ),
    "coco": (
        "detection-datasets/coco/data/train-{part}.parquet",
        {"image_id": pa.int64(), "image": IMAGE, "width": pa.int64(), "height": pa.int64()},
        [{"image_id": 9 + n, "image": image(100 + n), "width": 24, "height": 18} for n in range(12)],
    ),
}  # fmt: skip


def write(folder: Path, name: str, rows: list[dict[str, Any]] | None = None, files: int = 2) -> list[Path]:
    """Write one dataset, in row groups of two rows and in several files where its name has a part."""
    pattern, columns, own = DATASETS[name]
    rows = own if rows is None else rows
    files = files if "{part}" in pattern else 1
    paths = []
    for number in range(files):
        path = folder / pattern.format(part=f"{number:05d}-of-{files:05d}")
        path.parent.mkdir(parents=True, exist_ok=True)
        share = rows[number * len(rows) // files : (number + 1) * len(rows) // files]
        pq.write_table(pa.Table.from_pylist(share, pa.schema(columns)), path, row_group_size=2)
        paths.append(path)
    return paths


def cache(home: Path, name: str, folders: Mapping[str, Path]) -> dict[str, str]:
    """Lay out the hub's cache under `home`, one commit of a model a revision, and return the commits."""
    repository, commits = home / f"models--{name.replace('/', '--')}", {}
    (repository / "refs").mkdir(parents=True)
    (repository / "blobs").mkdir()
    for revision, folder in folders.items():
        commits[revision] = commit = hashlib.sha1(revision.encode()).hexdigest()
        (repository / "refs" / revision).write_text(commit)
        for file in (file for file in folder.rglob("*") if file.is_file()):
            blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            blob.write_bytes(file.read_bytes())
            link = repository / "snapshots" / commit / file.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    return commits
