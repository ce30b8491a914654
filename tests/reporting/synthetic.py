"""Made-up results in the files of the stages: a selector that prefers text, random selection, and others.

Loaded with runpy, as tests are no package: see conftest.py beside it and tests/stages/test_report.py.
"""

import io
import json
import math
import random
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL import Image, ImageDraw

GROUPS = {
    "docs": "text",
    "signs": "text",
    "charts": "text",
    "shapes": "general",
    "digits": "general",
    "scenes": "general",
}
KEEPS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
GRID = (12, 12)
TOKENS = GRID[0] * GRID[1]
SETTINGS = {"best": "selector", "pages": 3, "examples": 6}
LAYOUT = {"positions": "original", "budget": "image", "newline": "keep", "interpolation": "model"}
PARAMETERS = {
    "seed": 0,
    "evaluate": {"keep": KEEPS, "bootstrap": 200, "max_new_tokens": 8} | LAYOUT,
    "trainer": {"precision": "32-true"},
}
FINAL = {"epoch": 5, "validation/kept": 0.3021, "validation/explained_variance": 0.7866}
RESOLVED = {
    "precision": "32-true",
    "device": "cpu",
    "processor": "x86_64, AVX2",
    "attention": "sdpa",
    "vlm": {"commit": None, "digest": "0123456789abcdef"},
    "features": {"precision": "32-true", "device": "cpu", "processor": "x86_64, AVX2"},
}
QUESTION_KEYS = ("id", "benchmark", "group", "images", "question", "answers", "unit")
PROVENANCE = {"commit": "0123456789abcdef0123", "versions": {"atr": "0.1.0", "torch": "2.13.0"}}
QUESTION = "value of <script>document.title = 'attacked'</script> & $key_{"
"""Text that no page may take for markup, and no figure for a formula."""


def write(
    folder: Path,
    questions: int = 20,
    reducers: tuple[str, ...] = ("full", "none", "random", "selector"),
    benchmarks: tuple[str, ...] = tuple(GROUPS),
) -> Path:
    """Write evaluate/ and pretrain/metrics.json under `folder`, and return that folder."""
    for reducer in reducers:
        rows = list(_rows(reducer, benchmarks, questions))
        source = {"parameters": PARAMETERS, "provenance": PROVENANCE, "resolved": RESOLVED}
        model = {"reducer": reducer, "encoder": "micro", "vlm": "micro", "tokens_full": TOKENS}
        path = folder / "evaluate" / reducer
        write_json(path / "summary.json", model | source | {"scores": _scores(rows)})
        write_json(path / "masks.json", {"grid": GRID, "keep": 0.4, "masks": _masks(reducer, benchmarks)})
        write_lines(path / "results.jsonl", _lines(rows))
    source = _source(seed=0, pretrain={"keep": 0.3})
    write_json(folder / "pretrain/metrics.json", source | {"final": FINAL, "history": [FINAL]})
    return folder


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write a file of answers, one line per question."""
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def picture() -> bytes:
    """A made-up figure of stage extract."""
    buffer = io.BytesIO()
    Image.effect_mandelbrot((64, 16), (-2, -1, 1, 1), 20).convert("RGB").save(buffer, format="png")
    return buffer.getvalue()


def write_intrinsic(
    folder: Path, names: tuple[str, ...], keep: list[float] = KEEPS, merging: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Write the cells of stage intrinsic and return them by reducer; `full` is left out."""
    cells = {"full": {"lines": None, "masks": None, "stability": None, "left_out": "takes no budget"}}
    for name in names:
        draw = random.Random(name)
        line = [round(draw.random(), 3) for _ in keep]
        cells[name] = {
            "lines": {"reconstruction": line, "reconstruction_random": line[::-1], "text_coverage": line},
            "masks": None if name in merging else _indices(name),
            "stability": {"keep": keep, "seeds": 3, "iou": line} if name == "selector" else None,
            "left_out": "",
        }
    for name, cell in cells.items():
        cell |= {"reducer": name, "keep": keep} | _source(seed=0, intrinsic={"images": 5})
        write_json(folder / name / "metrics.json", cell)
    return cells


def _indices(reducer: str) -> dict[str, Any]:
    """Kept tokens of a few images, under three seeds of the reducer random."""
    images = [f"docs/{index:06d}" for index in range(5)]
    kept = [
        [sorted(random.Random(f"{reducer}{seed}{name}").sample(range(TOKENS), 58)) for name in images]
        for seed in range(3 if reducer == "random" else 1)
    ]
    return {"keep": 0.4, "images": images, "kept": kept}


def _source(**parameters: Any) -> dict[str, Any]:
    return {"parameters": parameters, "provenance": PROVENANCE, "resolved": RESOLVED}


def write_latency(folder: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """Write the cells of stages latency and prefill and return them by reducer; `full` is left out."""
    cells: dict[str, Any] = {"full": {"device": "", "entries": [], "left_out": "takes no budget"}}
    for name in names:
        times = [
            {"tokens": TOKENS, "kept": kept, "batch": batch, "milliseconds": 0.25 * kept / batch}
            for batch in (1, 32)
            for kept in (14, 58)
        ]
        entries = [{"reducer": name} | entry for entry in times]
        cells[name] = {"device": "cpu", "entries": entries, "left_out": ""}
    for name, cell in cells.items():
        cell |= {"reducer": name} | _source(latency={"seconds": 5})
        write_json(folder / name / "metrics.json", cell)
    prefill = [
        {"tokens": tokens, "batch": batch, "milliseconds": 10.0 + tokens / batch}
        for batch in (1, 32)
        for tokens in (14, 58, TOKENS)
    ]
    write_json(folder / "prefill/metrics.json", {"device": "cpu", "prefill": prefill} | _source())
    return cells


def write_robustness(folder: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """Write the cells of stage robustness and return them by reducer; `random` is left out."""
    cells = {name: _robustness([name]) for name in names} | {"full": _robustness([])}
    nothing = {"keep": [], "questions": 0, "photographs": 0, "full": None, "reference": {}, "variants": []}
    cells["random"] = nothing | {"left_out": "draws its tokens at random"}
    for name, cell in cells.items():
        cell |= {"reducer": name} | _source(robustness={"questions": 20})
        write_json(folder / name / "metrics.json", cell)
    return cells


def _robustness(names: list[str]) -> dict[str, Any]:
    """One deployment with and one without changed pixels; scores with all tokens if there are no reducers."""
    same, change = {"mean": 1.0, "lowest": 1.0}, {"mean": -0.0125, "low": -0.05, "high": 0.025}
    none = dict.fromkeys(("mean", "low", "high"), 0.0)
    jpeg = {"iou": [{"mean": 0.9, "lowest": 0.75}, None], "photographs": [same, same], "change": [change] * 2}
    resized = {"iou": [same] * 2, "photographs": [{"mean": 0.8, "lowest": 0.5}] * 2, "change": [none] * 2}
    full = None if names else none
    return {
        "keep": [0.3, 0.5],
        "questions": 120,
        "photographs": 12,
        "full": None if names else 0.95,
        "reference": {name: [0.9, 0.925] for name in names},
        "variants": [
            {"name": name, "no_pixel_changed": same, "full": full, "reducers": dict.fromkeys(names, line)}
            for name, same, line in (("JPEG 75", False, jpeg), ("bilinear", True, resized))
        ],
        "left_out": "",
    }


def image(name: str) -> Image.Image:
    """A page with its own name on it."""
    page = Image.new("RGB", (168, 168), "#f6f0dc")
    draw = ImageDraw.Draw(page)
    for line in range(3):
        draw.text((12, 20 + 40 * line), f"{name} {line}", fill="#202020")
    return page


def _rows(reducer: str, benchmarks: tuple[str, ...], questions: int):
    fixed = [None] if reducer.endswith("_adaptive") else KEEPS
    for keep in {"full": [1.0], "none": [0.0]}.get(reducer, fixed):
        for seed in (0, 1, 2) if reducer == "random" else (None,):
            for benchmark in benchmarks:
                for index in range(questions):
                    yield _row(reducer, benchmark, index, keep, seed)


def _lines(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line per question: its own fields once, those of its answers as columns."""
    lines: dict[str, dict[str, Any]] = {}
    for row in rows:
        line = lines.setdefault(row["id"], {key: row[key] for key in QUESTION_KEYS})
        for key in row.keys() - set(QUESTION_KEYS):
            line.setdefault(key, []).append(row[key])
    return list(lines.values())


def _row(reducer: str, benchmark: str, index: int, keep: float | None, seed: int | None) -> dict[str, Any]:
    kept = random.Random(f"{reducer}{benchmark}{index}").uniform(0.2, 0.4) if keep is None else keep
    # A question is right if its difficulty is below the chance, so scores rise with the kept fraction.
    difficulty = random.Random(f"{benchmark}{index}").random()
    luck = random.Random(f"{reducer}{benchmark}{index}{seed}").gauss(0, 0.15)
    right = _chance(reducer, GROUPS[benchmark], kept) + luck > difficulty
    return {
        "id": f"{benchmark}/{index // 2:06d}#{index % 2}",
        "benchmark": benchmark,
        "group": GROUPS[benchmark],
        "images": [f"{benchmark}/{index // 2:06d}"],
        "keep": keep,
        "seed": seed,
        "tokens": round(kept * TOKENS),
        "tokens_fed": round(kept * TOKENS),
        "tokens_full": TOKENS,
        "unit": "",
        "question": QUESTION,
        "prediction": str(index) if right else ("", r"$\wrong_{$")[index % 2],
        "answers": [str(index)],
        "score": float(right),
        "anls": float(right),
    }


def _chance(reducer: str, group: str, keep: float) -> float:
    floor, full = (0.05, 1.2) if group == "text" else (0.35, 1.2)
    draw = random.Random(reducer.removesuffix("_adaptive"))
    other = draw.uniform(1, 6), draw.uniform(3, 9)
    speeds = {"selector": (5, 6), "random": (1.2, 9)}.get(reducer.removesuffix("_adaptive"), other)
    rise = 1 - math.exp(-speeds[group != "text"] * keep)
    return {"full": full, "none": floor}.get(reducer, floor + (full - floor) * rise)


def _scores(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    entries = []
    for kind in ("benchmark", "group"):
        for name, keep in dict.fromkeys((row[kind], row["keep"]) for row in rows):
            part = [row for row in rows if row[kind] == name and row["keep"] == keep]
            mean, tokens = fmean(row["score"] for row in part), fmean(row["tokens"] for row in part)
            error = 1.96 * math.sqrt(mean * (1 - mean) / len(part))
            interval = {"low": max(0.0, mean - error), "high": min(1.0, mean + error)}
            counts = {"tokens": tokens, "tokens_fed": tokens, "tokens_full": TOKENS}
            point = {kind: name, "keep": keep, "mean": mean} | counts
            entries.append(point | interval)
    return entries


def _masks(reducer: str, benchmarks: tuple[str, ...]) -> dict[str, list[int]]:
    kept = {}
    for name in [f"{benchmark}/{index:06d}" for benchmark in benchmarks[:2] for index in range(3)]:
        draw = random.Random(f"{reducer}{name}")
        kept[name] = sorted(draw.sample(range(TOKENS), round(0.4 * TOKENS)))
    return kept
