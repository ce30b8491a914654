"""README: its length, its first screen, its numbers, and the lines of library use as printed."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch

from tests import checkpoints

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_it_has_at_most_900_words():
    assert len(README.split()) <= 900


def test_the_first_screen_has_picture_number_code_and_commands_in_order():
    marks = (
        "docs/kept-tokens.png",
        "**With half",
        "```python",
        "`keep` is",
        "make reproduce",
        "make test",
        "**Cost.**",
    )
    places = [README.index(mark) for mark in marks]
    assert places == sorted(places) and README.index("## ") > places[-1]
    assert README[: places[-1]].count("\n") < 45


def committed(path):
    """A committed result: the working copy may hold a reader's own."""
    shown = subprocess.run(["git", "show", f"HEAD:{path}"], cwd=ROOT, capture_output=True, text=True)
    if shown.returncode:
        pytest.skip(f"git shows no {path}")
    return shown.stdout


def test_its_numbers_are_those_of_the_committed_report():
    scores = {
        group: json.loads(committed(f"experiments/report/{group}.json")) for group in ("text", "general")
    }
    keys = ("full", "distilled@.5", "selector@.5", "random@.5")
    for group, score in scores.items():
        row = " | ".join(f"{score[key]:.3f}".lstrip("0") for key in keys)
        assert f"| {group} group | {row} |" in README
    bold = re.search(r"\*\*With half.*?\*\*", README, flags=re.DOTALL)[0]
    expected = [f"{100 * scores['text'][key]:.1f}" for key in ("distilled@.5", "full", "random@.5")]
    assert re.findall(r"([\d.]+) %", bold) == expected


def test_its_cost_is_that_of_the_committed_report():
    page = committed("experiments/report/report.md")
    row = re.search(r"\| distilled \| 32 \| 144 \| 72 \| (\S+) \| (\S+) \|", page)
    spent, saved = map(float, row.groups())
    assert f"takes {spent:.1f} ms per image and saves {saved:.1f} ms" in README


def test_the_library_example_runs_as_printed_in_a_fresh_clone(monkeypatch):
    from atr.micro import world
    from atr.vlm.checkpoint import load_vlm

    example, _ = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    model, processor = load_vlm(str(ROOT / "data/micro/llava"), torch.float32)
    monkeypatch.chdir(ROOT)
    lengths = []
    monkeypatch.setattr(
        model.model.language_model,
        "forward",
        lambda *args, _forward=model.model.language_model.forward, **kwargs: (
            lengths.append(kwargs["inputs_embeds"].shape[1]) or _forward(*args, **kwargs)
        ),
    )
    image = world.sample("docs", "evaluate", 0, 0).image
    names = {"model": model, "processor": processor, "image": image, "prompt": "<image> total"}
    exec(example, names)
    assert lengths[0] == 1 + round(0.4 * 144) + 1, (
        "the language model sees <s>, 40 % of 144 tokens, the question"
    )
    library = re.findall(r"```python\n(.*?)```", (ROOT / "docs/library.md").read_text(), flags=re.DOTALL)
    for block in library:
        exec(block, names)
    assert names["reduced"].kept[0].tokens == 58


def test_the_second_example_reduces_an_untouched_qwen(tmp_path):
    """The printed lines, with a tiny checkpoint of the same class in place of the hub's."""
    from PIL import Image
    from transformers import AutoModelForImageTextToText

    from atr import reduce
    from atr.vlm.processors import load_processor

    first, example = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert "from atr import FeatureSelector, reduce" in first and "Qwen/Qwen2.5-VL-7B-Instruct" in example
    folder = checkpoints.write(tmp_path / "qwen", "qwen2_5_vl")
    names = {
        "AutoModelForImageTextToText": AutoModelForImageTextToText,
        "processor": load_processor(str(folder)),
        "reduce": reduce,
        "image": Image.new("RGB", (40, 32), "red"),
        "prompt": "w3 <|vision_start|><|image_pad|><|vision_end|> w7",
    }
    exec(example.replace("Qwen/Qwen2.5-VL-7B-Instruct", str(folder)), names)
    (kept,) = names["reduced"].kept
    assert kept.tokens == round(0.25 * kept.of) and kept.tiles == ((4, 5),)
    assert type(names["model"]).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert names["reduced"]["input_ids"].shape[1] == names["inputs"]["input_ids"].shape[1] - 15
