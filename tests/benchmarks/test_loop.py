import json
from dataclasses import dataclass, field

import pytest

from atr import config
from atr.benchmarks import BENCHMARKS
from atr.benchmarks.loop import Row, Trial, answer_all, pictured, save_rows, trials_of


@dataclass(frozen=True)
class Asked:
    id: str
    question: str = "total"
    benchmark: str = "docs"
    group: str = "text"
    image: str = "docs/1"
    answers: list[str] = field(default_factory=lambda: ["17"])


QUESTIONS = [Asked(f"docs/{number}#0", image=f"docs/{number}") for number in range(5)]
BATCHES = [[4, 1], [0, 2], [3]]
TRIALS = [Trial(0.2, 0), Trial(0.2, 1), Trial(0.5, 0)]


def prepare(images, texts):
    assert set(texts) == {"total"}
    return list(images)


def answer(images, trial):
    return [(f"{image} at {trial.keep}", round(10 * trial.keep)) for image in images]


def test_the_names_of_the_config_are_the_registry():
    assert {name: benchmark.group for name, benchmark in BENCHMARKS.items()} == config.BENCHMARKS


def test_every_question_is_answered_once_under_every_trial_and_comes_in_order():
    rows = answer_all(QUESTIONS, BATCHES, TRIALS, prepare, answer)
    assert [(row.keep, row.seed, row.id) for row in rows] == [
        (trial.keep, trial.seed, question.id) for trial in TRIALS for question in QUESTIONS
    ]
    assert all(row.prediction == f"{row.image} at {row.keep}" for row in rows)
    assert {(row.keep, row.tokens) for row in rows} == {(0.2, 2), (0.5, 5)}


def test_a_batch_is_made_ready_once_for_all_trials():
    prepared = []

    def counting(images, texts):
        prepared.append(list(images))
        return prepare(images, texts)

    answer_all(QUESTIONS, BATCHES, TRIALS, counting, answer)
    assert prepared == [["docs/4", "docs/1"], ["docs/0", "docs/2"], ["docs/3"]]


def test_rows_carry_the_benchmarks_score_and_anls():
    asked = [Asked("docs/0#0", answers=["4078", "4079"])]
    said = {0.1: "4078", 0.5: "407", 0.9: "no"}
    trials = [Trial(keep) for keep in said]
    rows = answer_all(asked, [[0]], trials, prepare, lambda _, trial: [(said[trial.keep], 1)])
    assert [(row.score, row.anls) for row in rows] == [(1.0, 1.0), (0.0, 0.75), (0.0, 0.0)]
    assert rows[0].answer == "4078"


@pytest.mark.parametrize(
    "error, kind", [(ValueError("short"), ValueError), (OverflowError("nan"), RuntimeError)]
)
def test_a_question_without_answer_stops_the_run_by_its_name(error, kind):
    def failing(images, trial):
        if trial.keep == 0.5:
            raise error
        return answer(images, trial)

    with pytest.raises(kind, match=f"keep 0.5, seed 0: no answer to docs/4#0, docs/1#0: {error}"):
        answer_all(QUESTIONS, BATCHES, TRIALS, prepare, failing)


def test_a_missing_answer_is_not_an_empty_one():
    with pytest.raises(ValueError, match="no answer to docs/4#0, docs/1#0"):
        answer_all(QUESTIONS, BATCHES, TRIALS, prepare, lambda images, trial: answer(images, trial)[1:])
    with pytest.raises(AssertionError, match="every question"):
        answer_all(QUESTIONS, BATCHES[1:], TRIALS, prepare, answer)


def test_processes_answer_their_share_and_get_all_rows(monkeypatch):
    alone = answer_all(QUESTIONS, BATCHES, TRIALS, prepare, answer)
    shares = []

    def exchange(parts, rows):
        shares.append(rows)
        parts[:] = [shares[0], rows]

    monkeypatch.setattr("torch.distributed.all_gather_object", exchange)
    with pytest.raises(AssertionError):  # the first rank alone is not everything
        answer_all(QUESTIONS, BATCHES, TRIALS, prepare, answer, (0, 2))
    assert answer_all(QUESTIONS, BATCHES, TRIALS, prepare, answer, (1, 2)) == alone
    assert [len(rows) for rows in shares] == [3 * len(TRIALS), 2 * len(TRIALS)]


def test_trials_of_each_reducer():
    assert trials_of("full", [0.1, 0.5], 3) == [Trial(1.0)]
    assert trials_of("none", [0.1, 0.5], 3) == [Trial(0.0)]
    assert trials_of("selector", [0.1, 0.5], 3) == [Trial(0.1), Trial(0.5)]
    assert trials_of("random", [0.1, 0.5], 2) == [Trial(0.1, 0), Trial(0.1, 1), Trial(0.5, 0), Trial(0.5, 1)]


def test_pictured_are_the_first_images_of_text_benchmarks_near_forty_percent():
    signs = [
        Asked(f"signs/{i}#{j}", benchmark="signs", image=f"signs/{i}") for i in range(2) for j in range(2)
    ]
    general = [Asked("shapes/0#0", benchmark="shapes", group="general", image="shapes/0")]
    images, trial = pictured([*general, *QUESTIONS, *signs], trials_of("random", [0.1, 0.3, 0.45], 2))
    assert images == ["docs/0", "docs/1", "docs/2", "signs/0", "signs/1"]
    assert trial == Trial(0.45, 0)
    assert pictured(general, [trial])[0] == ["shapes/0"]


def test_saved_rows_are_one_object_a_line(tmp_path):
    rows = answer_all(
        QUESTIONS, BATCHES, TRIALS, prepare, lambda images, _: [('\u2028\n"é', 1)] * len(images)
    )
    save_rows(tmp_path / "results.jsonl", rows)
    lines = (tmp_path / "results.jsonl").read_bytes().removesuffix(b"\n").split(b"\n")
    assert [Row(**json.loads(line)) for line in lines] == rows
