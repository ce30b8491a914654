"""The plug-in in lmms-eval itself, whose command is run in its own environment."""

import io
import json
import os
import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from atr.integrations.lmms_eval.arguments import Arguments
from atr.integrations.lmms_eval.reduced_vlm import Decoding, ReducedVlm
from atr.integrations.lmms_eval.selector_digest import digest_selector

ROOT = Path(__file__).parents[3]
COMMAND = os.environ.get("ATR_LMMS_EVAL")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        COMMAND is None,
        reason="ATR_LMMS_EVAL is not set: the path of lmms-eval in an environment with atr[lmms-eval]",
    ),
]

TASK = """\
task: atr_two
dataset_path: parquet
dataset_kwargs:
  data_files: {{{split}: {path}}}
test_split: {split}
output_type: {output_type}
doc_to_visual: !function decoding.images
doc_to_text: question
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 6
  until: ["."]
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
DECODING = """\
import io

from PIL import Image


def images(doc):
    return [Image.open(io.BytesIO(image)) for image in doc["images"]]
"""


def png(seed):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (36, 28, 3), generator=generator, dtype=torch.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, format="png")
    return buffer.getvalue()


@pytest.fixture
def vlm(make_model, processor, selector, tmp_path):
    """A saved model and selector, loaded in this environment."""
    make_model().save_pretrained(tmp_path / "llava")
    processor.save_pretrained(tmp_path / "llava")
    selector.save_pretrained(tmp_path / "selector")
    folders = {name: str(tmp_path / folder) for name, folder in
               (("pretrained", "llava"), ("selector", "selector"))}  # fmt: skip
    return ReducedVlm.load(Arguments.of(folders | {"keep": 0.5}), torch.device("cpu"))


QUESTIONS = {"a b c": [png(1)], "d e": [png(2), png(3)]}


def expected(vlm):
    """Answers and kept tokens of the model in this environment, one question at a time."""
    answers = []
    for question, images in QUESTIONS.items():
        content = [{"type": "image", "image": Image.open(io.BytesIO(image))} for image in images]
        turn = {"role": "user", "content": [*content, {"type": "text", "text": question}]}
        answers += vlm.answer([[turn]], Decoding(max_new_tokens=6))
    return answers


def write_task(folder, answers, questions=QUESTIONS, output_type="generate_until"):
    rows = [
        {"question": question, "images": images, "answer": answer}
        for (question, images), answer in zip(questions.items(), answers, strict=True)
    ]
    folder.mkdir()
    columns = {"question": pa.string(), "images": pa.list_(pa.binary()), "answer": pa.string()}
    pq.write_table(pa.Table.from_pylist(rows, pa.schema(columns)), folder / "two.parquet")
    path = folder / "two.parquet"
    (folder / "two.yaml").write_text(TASK.format(split="test", path=path, output_type=output_type))
    (folder / "decoding.py").write_text(DECODING)


def evaluate(folder, *options, model="atr", **changes):
    """Run lmms-eval's command on the task in `folder`, offline, with this code."""
    arguments = {
        "pretrained": folder / "llava",
        "selector": folder / "selector",
        "keep": 0.5,
    } | changes
    command = [
        COMMAND, "--model", model,
        "--model_args", ",".join(f"{key}={value}" for key, value in arguments.items()),
        "--include_path", folder / "task", "--tasks", "atr_two", "--device", "cpu", "--log_samples",
        "--output_path", folder / "results", *options,
    ]  # fmt: skip
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "WANDB_MODE": "disabled",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, cwd=folder)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision"])
def test_both_questions_are_answered_and_the_kept_counts_are_in_the_log(vlm, tmp_path):
    answers = expected(vlm)
    write_task(tmp_path / "task", [answers[0].text, "something else"])
    code, log = evaluate(tmp_path, "--batch_size", "2", "--verbosity", "DEBUG")
    assert code == 0, log
    for number, answer in enumerate(answers):
        kept = ", ".join(f"{image.tokens} of {image.of}" for image in answer.kept)
        assert f"atr_two test {number}: visual tokens kept: {kept}" in log
    images = [image for answer in answers for image in answer.kept]
    kept, of = sum(image.tokens for image in images), sum(image.of for image in images)
    assert f"2 questions, 3 images, visual tokens kept: {kept} of {of}" in log
    (samples,) = (tmp_path / "results").rglob("*samples_atr_two.jsonl")
    found = {row["doc_id"]: row for row in map(json.loads, samples.read_text().splitlines())}
    for number, answer in enumerate(answers):
        assert found[number]["filtered_resps"] == answer.text
        counts = {"input_tokens": answer.input_tokens, "output_tokens": answer.output_tokens}
        assert found[number]["token_counts"] == [counts]
    (results,) = (tmp_path / "results").rglob("*_results.json")
    written = json.loads(results.read_text())
    assert written["results"]["atr_two"]["exact_match,none"] == 0.5
    assert written["throughput"]["avg_visual_tokens_kept"] == pytest.approx(kept / 3)
    fed = kept + sum(image.newlines for image in images)
    assert written["throughput"]["avg_visual_tokens_fed"] == pytest.approx(fed / 3)
    assert written["throughput"]["avg_visual_tokens"] == pytest.approx(of / 3)


def test_a_question_that_cannot_be_answered_is_named_and_nothing_is_scored(vlm, tmp_path):
    broken = {question: images if question == "a b c" else [b"no image"] for question, images in
              QUESTIONS.items()}  # fmt: skip
    write_task(tmp_path / "task", ["x", "y"], broken)
    code, log = evaluate(tmp_path, "--verbosity", "DEBUG")
    assert code != 0
    assert "no answer to atr_two test 1: cannot identify image file" in log
    assert not list((tmp_path / "results").rglob("*.json*"))


def test_a_wrong_argument_is_refused_by_name_under_the_models_old_name_too(vlm, tmp_path):
    write_task(tmp_path / "task", ["x", "y"])
    (tmp_path / "llava/model.safetensors").unlink()  # must not be read
    code, log = evaluate(tmp_path, "--verbosity", "DEBUG", model="atr_llava", positions="gappy")
    assert code != 0
    assert "positions: 'gappy' is unknown, allowed: original, contiguous" in log


def test_the_cache_is_not_used_for_a_retrained_selector(vlm, selector, tmp_path):
    write_task(tmp_path / "task", ["x", "y"])
    cached = ("--use_cache", str(tmp_path / "cache"), "--verbosity", "DEBUG")
    code, log = evaluate(tmp_path, *cached)
    assert code != 0 and f"selector_digest={digest_selector(selector)}" in log
    code, log = evaluate(tmp_path, *cached, selector_digest=digest_selector(selector))
    assert code == 0 and "atr_two test 1: visual tokens kept" in log, log
    code, log = evaluate(tmp_path, *cached, selector_digest=digest_selector(selector))
    assert code == 0 and "atr_two test 1: visual tokens kept" not in log, "answered from the cache"
    torch.nn.init.normal_(selector.trunk.head.weight)
    selector.save_pretrained(tmp_path / "selector")
    code, log = evaluate(tmp_path, *cached, selector_digest=digest_selector(selector))
    assert code == 0 and "atr_two test 1: visual tokens kept" in log, log
