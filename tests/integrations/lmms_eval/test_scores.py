"""Scores of the paper's benchmarks against lmms-eval's, run in its own environment."""

import json
import os
import random
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from atr.benchmarks import load_benchmark, mmbench, mmmu, vqa

COMMAND = os.environ.get("ATR_LMMS_EVAL")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        COMMAND is None,
        reason="ATR_LMMS_EVAL is not set: the path of lmms-eval in an environment with atr[lmms-eval]",
    ),
]
WORDS = (
    "A", "B", "C", "D", "(A)", "(B)", "B.", "C,", "A:", "(D).", "the", "answer", "is", "Answer:", "apple",
    "pear", "plum", "Option", "an", "two", "dont", "t-shirt", "3,000", "12.5%", "5", "1,234", "-7", "2e3",
    "=", "so", "thus", "1900", "Nokia's", "left/right", "?", "!", "yes", ".", "none", "wont",
)  # fmt: skip
CHOICES, LONG = ["apple", "pear", "plum"], ["a red fox", "the brown hare", "an owl", "pear"]
NUMBERS = ("5", "5%", "5.2", "100", "105", "1,900", "yes", "0", "0.0", " 5", "1900", "0.05", "Yes")
OPEN = ("5", "3.43", "nokia", "1,234", "apple")
CONTAINED = ("the answer", "theanswer", "A  pear", "answer:", "2e3", " an\nplum ", "Apple", "APPLE")
DATASETS = ("HME100k", "IIIT5K")
THEIRS = """\
import json, random, sys

from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor
from lmms_eval.tasks.chartqa.utils import relaxed_correctness
from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator
from lmms_eval.tasks.mmmu.utils import (
    eval_open, get_multi_choice_info, parse_multi_choice_response, parse_open_response
)
from lmms_eval.tasks.ocrbench.utils import ocrbench_process_results
from lmms_eval.tasks.scienceqa.utils import sqa_process_results

cases = json.load(open(sys.argv[1]))
letters, names = get_multi_choice_info(cases["long"])
processor, evaluator = EvalAIAnswerProcessor(), MMBench_Evaluator()
choices = dict(zip("ABC", cases["choices"]))


def choice(text):
    found = set()
    for seed in range(8):  # lmms-eval draws a choice if the answer names none
        random.seed(seed)
        found.add(parse_multi_choice_response(text, names, letters))
    return found.pop() if len(found) == 1 else None


texts = cases["texts"]
json.dump({
    "vqa": [processor(text) for text in texts],
    "scienceqa": [
        sqa_process_results({"choices": cases["choices"], "answer": number % 3}, [text])["exact_match"]
        for number, text in enumerate(texts)
    ],
    "mmbench": [evaluator.can_infer(text.strip(), dict(choices)) for text in texts],
    "mmmu choice": [choice(text) for text in texts],
    "mmmu open": [
        float(eval_open(cases["open"][number % len(cases["open"])], parse_open_response(text)))
        for number, text in enumerate(texts)
    ],
    "ocrbench": {
        dataset: [
            ocrbench_process_results(
                {"answer": [answer, "12"], "dataset": dataset, "question_type": "Doc-oriented VQA"}, [text]
            )["ocrbench_accuracy"]["score"]
            for text in texts
            for answer in cases["contained"]
        ]
        for dataset in cases["datasets"]
    },
    "chartqa": [relaxed_correctness(said, right) for said in cases["numbers"] for right in cases["numbers"]],
}, open(sys.argv[2], "w"))
"""


@pytest.fixture(scope="module")
def texts():
    draw = random.Random(0)
    return [draw.choice((" ", "", " ")).join(draw.choices(WORDS, k=draw.randrange(9))) for _ in range(2000)]


@pytest.fixture(scope="module")
def theirs(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scores")
    cases = {"texts": texts, "choices": CHOICES, "long": LONG, "open": OPEN, "numbers": NUMBERS}
    cases |= {"contained": CONTAINED, "datasets": DATASETS}
    (folder / "cases.json").write_text(json.dumps(cases))
    (folder / "theirs.py").write_text(THEIRS)
    command = [Path(COMMAND).with_name("python"), "theirs.py", "cases.json", "said.json"]
    # Two modules of lmms-eval create a client of a judge model at import; it is never called here.
    environment = os.environ | {
        "OPENAI_API_KEY": "none",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hub"),
    }
    subprocess.run(command, check=True, cwd=folder, env=environment, timeout=280)
    return json.loads((folder / "said.json").read_text())


def score(benchmark, prediction, answer, choices=()):
    question = SimpleNamespace(answers=[answer], choices=list(choices))
    return load_benchmark(benchmark).score(prediction, question)


def test_vqa_answers_are_normalised_as_in_lmms_eval(texts, theirs):
    assert [vqa.normalise_vqa(text) for text in texts] == theirs["vqa"]


def test_scienceqa(texts, theirs):
    ours = [score("scienceqa", text, "ABC"[number % 3], CHOICES) for number, text in enumerate(texts)]
    assert ours == theirs["scienceqa"]
    assert 0 < sum(ours) < len(ours)


def test_mmbench(texts, theirs):
    ours = [mmbench.letter_in(text) or mmbench.choice_in(text, CHOICES) or False for text in texts]
    assert ours == theirs["mmbench"]


def test_choices_of_mmmu(texts, theirs):
    """Where lmms-eval draws a random choice, ours counts as wrong."""
    found = [
        (mmmu.parse_choice(text, LONG), their)
        for text, their in zip(texts, theirs["mmmu choice"], strict=True)
    ]
    assert all(our == their for our, their in found if their)
    assert {their for _, their in found} == {*"ABCD", None}


def test_open_answers_of_mmmu(texts, theirs):
    ours = [score("mmmu", text, OPEN[number % len(OPEN)]) for number, text in enumerate(texts)]
    assert ours == theirs["mmmu open"]
    assert 0 < sum(ours) < len(ours)


def test_chartqa(theirs):
    ours = [bool(score("chartqa", said, right)) for said in NUMBERS for right in NUMBERS]
    assert ours == theirs["chartqa"]


@pytest.mark.parametrize("dataset", DATASETS)
def test_ocrbench(dataset, texts, theirs):
    """Of formulas, lmms-eval lowers the case of the prediction but not of the answer; ours keeps both."""
    name = f"ocrbench/Doc-oriented VQA/{dataset}/0001"
    cases = [(text, answer) for text in texts for answer in CONTAINED]
    ours = [
        load_benchmark("ocrbench").score(
            text.lower() if dataset == "HME100k" else text, SimpleNamespace(id=name, answers=[answer, "12"])
        )
        for text, answer in cases
    ]
    assert ours == theirs["ocrbench"][dataset]
    assert 0 < sum(ours) < len(ours)
