import sys
from dataclasses import replace

import pytest

from atr.benchmarks import load_benchmark
from atr.benchmarks.runner import MAX_CONSECUTIVE_FAILURES, answer_all, choose_pictured, trials_of
from atr.core.answer_files import UnfinishedRows
from atr.core.records import Question, Reply, Trial


def make_question(name, **fields):
    usual = {
        "question": "total",
        "benchmark": "docs",
        "group": "text",
        "images": ["docs/1"],
        "answers": ["17"],
    }
    return Question(name, **usual | fields)


QUESTIONS = [make_question(f"docs/{number}#0", images=[f"docs/{number}"]) for number in range(5)]
BATCHES = [[4, 1], [0, 2], [3]]
TRIALS = [Trial(0.2, 0), Trial(0.2, 1), Trial(0.5, 0)]


def prepare(images, texts):
    assert set(texts) == {"total"}
    return [names[0] for names in images]


def answer(images, trial):
    kept = round(10 * trial.keep)
    return [Reply(f"{image} at {trial.keep}", kept, kept + 2, 10) for image in images]


def test_every_question_is_answered_once_under_every_trial_and_comes_in_order():
    rows = answer_all(QUESTIONS, BATCHES, TRIALS, prepare, answer)
    assert [(row.keep, row.seed, row.id) for row in rows] == [
        (trial.keep, trial.seed, question.id) for trial in TRIALS for question in QUESTIONS
    ]
    assert all(row.prediction == f"{row.image} at {row.keep}" for row in rows)
    assert {(row.keep, row.tokens, row.tokens_fed, row.tokens_full) for row in rows} == {
        (0.2, 2, 4, 10), (0.5, 5, 7, 10),
    }  # fmt: skip


def test_a_batch_is_made_ready_once_for_all_trials():
    prepared = []

    def counting(images, texts):
        prepared.append(prepare(images, texts))
        return prepared[-1]

    answer_all(QUESTIONS, BATCHES, TRIALS, counting, answer)
    assert prepared == [["docs/4", "docs/1"], ["docs/0", "docs/2"], ["docs/3"]]


def test_a_reducer_that_orders_the_tokens_is_asked_to_order_most_of_them_first():
    keeps = []

    def listening(images, trial):
        keeps.append(trial.keep)
        return answer(images, trial)

    answer_all(QUESTIONS[:1], [[0]], [Trial(0.2), Trial(0.9), Trial(0.5)], prepare, listening)
    assert keeps == [0.9, 0.5, 0.2]


def test_rows_carry_the_benchmarks_score_and_anls():
    asked = [make_question("docs/0#0", answers=["4078", "4079"])]
    said = {0.1: "4078", 0.5: "407", 0.9: "no"}
    trials = [Trial(keep) for keep in said]
    rows = answer_all(asked, [[0]], trials, prepare, lambda _, trial: [(said[trial.keep], 1, 1, 9)])
    assert [(row.score, row.anls) for row in rows] == [(1.0, 1.0), (0.0, 0.75), (0.0, 0.0)]
    assert rows[0].answer == "4078"


@pytest.mark.parametrize(
    "error, kind", [(ValueError("short"), ValueError), (OverflowError("x"), RuntimeError)]
)
@pytest.mark.parametrize("where", ["prepare", "answer"])
def test_a_model_that_answers_nothing_stops_the_run(error, kind, where):
    def failing(*_):
        raise error

    steps = {"prepare": prepare, "answer": answer} | {where: failing}
    with pytest.raises(kind, match=r"keep 0.5, seed 0: no answer to docs/4#0, nor to any other") as caught:
        answer_all(QUESTIONS, BATCHES, TRIALS, **steps)
    assert caught.value.__cause__ is error


def test_it_stops_long_before_it_has_asked_everything():
    asked = []

    def failing(images, trial):
        asked.extend(images)
        raise ValueError("out of order")

    many = [make_question(f"docs/{number}#0") for number in range(1000)]
    with pytest.raises(ValueError, match="out of order"):
        answer_all(many, [[number] for number in range(1000)], TRIALS[:1], prepare, failing)
    assert len(asked) == MAX_CONSECUTIVE_FAILURES


def test_it_stops_as_well_where_the_model_breaks_later_on():
    """A device that is lost fails at everything behind."""
    asked = []

    def breaking(images, trial):
        asked.extend(images)
        if len(asked) > 100:
            raise RuntimeError("device lost")
        return answer(images, trial)

    many = [make_question(f"docs/{number}#0") for number in range(1000)]
    with pytest.raises(RuntimeError, match=r"to docs/100#0, nor to the next 15: .*device lost"):
        answer_all(many, [[number] for number in range(1000)], TRIALS[:1], prepare, breaking)
    assert len(asked) == 100 + MAX_CONSECUTIVE_FAILURES


def test_failures_between_answers_do_not_add_up():
    def failing(images, trial):
        if int(images[0].removeprefix("docs/")) % 2:
            raise MemoryError("full")
        return answer(images, trial)

    many = [
        make_question(f"docs/{number}#0", images=[f"docs/{number}"])
        for number in range(3 * MAX_CONSECUTIVE_FAILURES)
    ]
    rows = answer_all(many, [[number] for number in range(len(many))], TRIALS[:1], prepare, failing)
    assert [row.status for row in rows] == ["answered", "failed"] * (len(many) // 2)


def test_a_reducer_that_fails_at_one_budget_alone_is_asked_on():
    def failing(images, trial):
        if trial.keep == 0.5:
            raise MemoryError("full")
        return answer(images, trial)

    many = [make_question(f"docs/{number}#0") for number in range(3 * MAX_CONSECUTIVE_FAILURES)]
    batches = [[number, number + 1] for number in range(0, len(many), 2)]
    rows = answer_all(many, batches, TRIALS, prepare, failing)
    assert {(row.keep, row.status) for row in rows} == {(0.2, "answered"), (0.5, "failed")}


def interrupted(batches, unfinished, after):
    """Answer until so many batches are done, then as if Ctrl-C had been pressed."""
    seen = []

    def stopping(images, texts):
        if len(seen) == after:
            raise KeyboardInterrupt
        seen.append(images)
        return prepare(images, texts)

    with pytest.raises(KeyboardInterrupt):
        answer_all(QUESTIONS, batches, TRIALS, stopping, answer, unfinished=unfinished)


def resumed(batches, unfinished):
    """The rows of a second try, and the images it asked about."""
    seen = []

    def watching(images, texts):
        seen.append(prepare(images, texts))
        return seen[-1]

    return answer_all(QUESTIONS, batches, TRIALS, watching, answer, unfinished=unfinished), seen


def test_a_stopped_evaluation_goes_on_behind_its_last_batch(tmp_path):
    path = tmp_path / "unfinished" / "abc"
    interrupted(BATCHES, UnfinishedRows(path), after=2)
    rows, asked = resumed(BATCHES, UnfinishedRows(path, rank=1))
    assert rows == answer_all(QUESTIONS, BATCHES, TRIALS, prepare, answer)
    assert asked == [["docs/3"]]
    assert resumed(BATCHES, UnfinishedRows(path)) == (rows, [])


def test_a_batch_of_which_some_answers_are_kept_is_asked_again(tmp_path):
    path = tmp_path / "abc"
    interrupted(BATCHES, UnfinishedRows(path), after=2)
    file, whole = tmp_path / "abc.0.jsonl", len(BATCHES[0])
    lines = [line for line in file.read_bytes().split(b"\n") if line]
    file.write_bytes(b"\n".join(lines[: whole + 1]) + b"\n")
    rows, asked = resumed(BATCHES, UnfinishedRows(path))
    assert rows == answer_all(QUESTIONS, BATCHES, TRIALS, prepare, answer)
    assert asked == [["docs/0", "docs/2"], ["docs/3"]]


def test_of_unfinished_answers_those_to_other_questions_are_left_alone(tmp_path):
    """A process keeps in memory what it is to answer, not all that the others did."""
    interrupted(BATCHES, UnfinishedRows(tmp_path / "abc"), after=2)
    (first, *_), unfinished = BATCHES[0], UnfinishedRows(tmp_path / "abc", rank=1)
    name = QUESTIONS[first].id
    assert set(unfinished.load({name, "unknown"})) == {(trial, name) for trial in TRIALS}
    assert unfinished.load(()) == {}


def test_what_a_stop_cut_off_is_asked_again_and_spoils_nothing(tmp_path):
    path = tmp_path / "abc"
    interrupted(BATCHES, UnfinishedRows(path), after=2)
    file = tmp_path / "abc.0.jsonl"
    lines = [line for line in file.read_bytes().split(b"\n") if line]
    whole = len(BATCHES[0])
    file.write_bytes(b"\n".join([*lines[:whole], lines[whole][:-20]]))
    rows, asked = resumed(BATCHES, UnfinishedRows(path))
    assert rows == answer_all(QUESTIONS, BATCHES, TRIALS, prepare, answer)
    assert asked == [["docs/0", "docs/2"], ["docs/3"]]
    assert resumed(BATCHES, UnfinishedRows(path)) == (rows, [])


def test_answers_of_another_name_are_not_taken(tmp_path):
    interrupted(BATCHES, UnfinishedRows(tmp_path / "abc"), after=2)
    assert len(resumed(BATCHES, UnfinishedRows(tmp_path / "ab"))[1]) == len(BATCHES)


def test_a_batch_with_a_failure_is_asked_again(tmp_path):
    def failing(images, trial):
        if "docs/1" in images:
            raise MemoryError("full")
        return answer(images, trial)

    path = tmp_path / "abc"
    answer_all(QUESTIONS, BATCHES, TRIALS, prepare, failing, unfinished=UnfinishedRows(path))
    rows, asked = resumed(BATCHES, UnfinishedRows(path))
    assert asked == [["docs/4", "docs/1"]]
    assert {row.status for row in rows} == {"answered"}


def test_a_question_that_fails_is_told_and_counted_and_its_batch_is_answered(capsys):
    def failing(images, trial):
        if "docs/1" in images and trial.keep == 0.5:
            raise OverflowError("too long")
        return answer(images, trial)

    rows = answer_all(QUESTIONS, BATCHES, TRIALS, prepare, failing)
    assert "no answer to docs/1#0: OverflowError: too long\n" in capsys.readouterr().err
    failed = [row for row in rows if row.status != "answered"]
    assert [(row.id, row.keep, row.status, row.error) for row in failed] == [
        ("docs/1#0", 0.5, "failed", "OverflowError: too long")
    ]
    assert (failed[0].score, failed[0].anls, failed[0].prediction, failed[0].tokens) == (None, None, "", 0)
    kept = [row for row in rows if row.status == "answered"]
    assert kept == [row for row in answer_all(QUESTIONS, BATCHES, TRIALS, prepare, answer) if row in kept]
    assert len(kept) == len(rows) - 1


def test_a_batch_that_is_too_large_is_let_go_before_its_questions_are_tried_alone():
    """An exception being handled holds the tensors of what failed, and the next try would fail as well."""

    def full(images, trial):
        if sys.exc_info()[0] is not None or len(images) > 1:
            raise MemoryError("full")
        return answer(images, trial)

    rows = answer_all(QUESTIONS, BATCHES, TRIALS, prepare, full)
    assert rows == answer_all(QUESTIONS, BATCHES, TRIALS, prepare, answer)


def test_an_unreadable_question_is_never_asked():
    asked = [replace(QUESTIONS[0], images=[], unreadable="cut off"), QUESTIONS[1]]
    seen = []

    def watching(images, trial):
        seen.extend(images)
        return answer(images, trial)

    rows = answer_all(asked, [[0, 1]], TRIALS, prepare, watching)
    assert set(seen) == {"docs/1"}
    assert [(row.status, row.error, row.score, row.image) for row in rows if row.id == "docs/0#0"] == [
        ("unreadable", "cut off", None, "")
    ] * len(TRIALS)
    assert all(row.status == "answered" for row in rows if row.id == "docs/1#0")


def test_an_empty_answer_is_an_answer_and_scored():
    rows = answer_all(QUESTIONS[:1], [[0]], TRIALS[:1], prepare, lambda images, _: [("", 0, 0, 9)])
    assert [(row.status, row.score) for row in rows] == [("answered", 0.0)]


def test_a_missing_answer_is_not_an_empty_one():
    def short(images, trial):
        return answer(images, trial)[1:]

    with pytest.raises(ValueError, match="no answer to docs/4#0"):
        answer_all(QUESTIONS, BATCHES, TRIALS, prepare, short)
    with pytest.raises(AssertionError, match="every question"):
        answer_all(QUESTIONS, BATCHES[1:], TRIALS, prepare, answer)


def test_a_question_comes_with_all_of_its_images_or_none():
    several, none = replace(QUESTIONS[0], images=["docs/0", "docs/9"]), replace(QUESTIONS[1], images=[])
    rows = answer_all(
        [several, none], [[0], [1]], TRIALS, lambda images, _: images,
        lambda batch, _: [("+".join(names), len(names), len(names), 2) for names in batch],
    )  # fmt: skip
    assert {(row.image, row.prediction, tuple(row.images)) for row in rows} == {
        ("docs/0", "docs/0+docs/9", ("docs/0", "docs/9")), ("", "", ()),
    }  # fmt: skip


def test_rows_hold_what_scoring_again_needs():
    asked = make_question("mmmu/1", benchmark="mmmu", answers=["B"], choices=["cat", "dog"], unit="mmmu/u")
    [row] = answer_all([asked], [[0]], TRIALS[:1], prepare, lambda images, _: [("(B)", 1, 1, 9)])
    assert (row.score, row.answers, row.choices, row.unit, row.images) == (
        1.0, ["B"], ["cat", "dog"], "mmmu/u", ["docs/1"],
    )  # fmt: skip
    assert load_benchmark("mmmu").score(row.prediction, row) == row.score


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
    assert trials_of("prumerge_adaptive", [0.1, 0.5], 3) == [Trial(None)]
    assert trials_of("random", [0.1, 0.5], 2) == [Trial(0.1, 0), Trial(0.1, 1), Trial(0.5, 0), Trial(0.5, 1)]


def test_the_trials_of_the_users_own_reducer_are_those_its_file_says(tmp_path):
    (tmp_path / "mine.py").write_text("DRAWS = True\n")
    (tmp_path / "other.py").write_text('BUDGET = "own"\n')
    assert trials_of(str(tmp_path / "mine"), [0.1], 2) == [Trial(0.1, 0), Trial(0.1, 1)]
    assert trials_of(str(tmp_path / "other"), [0.1], 2) == [Trial(None)]


def test_a_broken_score_stops_the_run_and_is_no_failure_of_the_model(monkeypatch):
    broken = replace(load_benchmark("docs"), score_of=lambda prediction, question: float("nan"))
    monkeypatch.setattr("atr.benchmarks.runner.load_benchmark", lambda name: broken)
    with pytest.raises(
        ValueError, match=r"^docs: score\(\) of 'docs/4 at 0.5' is nan, allowed: a number in 0..1$"
    ):
        answer_all(QUESTIONS, BATCHES, TRIALS, prepare, answer)


def pictured_of(questions, trials, lost=(), at=(0.2, 0.5)):
    def losing(images, trial):
        if set(images) & set(lost) and trial.keep in at:
            raise ValueError("unreadable")
        return answer(images, trial)

    batches = [[number] for number in range(len(questions))]
    rows = answer_all(questions, batches, trials, lambda images, _: [names[0] for names in images], losing)
    return choose_pictured(questions, trials, rows)


def test_pictured_are_the_first_images_of_text_benchmarks_near_forty_percent():
    signs = [
        make_question(f"signs/{i}#{j}", benchmark="signs", images=[f"signs/{i}"])
        for i in range(2)
        for j in range(2)
    ]
    general = [make_question("shapes/0#0", benchmark="shapes", group="general", images=["shapes/0"])]
    images, trial = pictured_of([*general, *QUESTIONS, *signs], trials_of("random", [0.1, 0.3, 0.45], 2))
    assert list(images) == ["docs/0", "docs/1", "docs/2", "signs/0", "signs/1"]
    assert images["signs/1"] == next(sign.question for sign in signs if "signs/1" in sign.images)
    assert trial == Trial(0.45, 0)
    assert list(pictured_of(general, [trial])[0]) == ["shapes/0"]
    assert choose_pictured(general, trials_of("selector_adaptive", [0.1], 1), [])[1] == Trial(None)


@pytest.mark.parametrize(
    "keeps, shown",
    [([0.1, 0.39, 0.5], 0.39), ([0.34, 0.45, 0.5], 0.45), ([0.5, 0.9], 0.5), ([0.1, 0.3], 0.3)],
)
def test_pictured_is_the_kept_fraction_nearest_to_forty_percent(keeps, shown):
    assert choose_pictured(QUESTIONS, trials_of("selector", keeps, 1), [])[1] == Trial(shown)


def test_an_image_that_was_not_answered_about_is_not_pictured():
    images, trial = pictured_of(QUESTIONS, TRIALS, lost=["docs/1"])
    assert list(images) == ["docs/0", "docs/2", "docs/3"]
    assert pictured_of(QUESTIONS, TRIALS, lost=["docs/1"], at=(trial.keep,))[0] == images
    others = tuple({each.keep for each in TRIALS} - {trial.keep})
    assert "docs/1" in pictured_of(QUESTIONS, TRIALS, lost=["docs/1"], at=others)[0]


def test_a_reducer_that_decides_its_count_is_asked_for_none():
    asked = []

    def deciding(images, trial):
        asked.append(trial.keep)
        return [("17", int(image[-1]), 7, 10) for image in images]

    rows = answer_all(QUESTIONS, BATCHES, [Trial(None)], prepare, deciding)
    assert set(asked) == {None}
    assert [(row.keep, row.tokens) for row in rows] == [(None, number) for number in range(5)]
