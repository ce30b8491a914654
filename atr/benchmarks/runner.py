"""The evaluation loop, written once: it sees questions and a callable that answers them, never a model."""

import sys
from collections.abc import Callable, Sequence
from typing import Never, TypeVar

import torch
from tqdm import tqdm

from atr.benchmarks import BENCHMARKS
from atr.benchmarks.metrics import anls
from atr.benchmarks.saved_rows import Unfinished
from atr.core.records import ANSWERED, FAILED, UNREADABLE, Question, Reply, Row, Trial

Batch = TypeVar("Batch")
MAX_CONSECUTIVE_FAILURES = 16
"""Questions that fail one after the other under every trial: the model fails, not the questions."""
ADAPTIVE = "_adaptive"
"""How the name of a reducer ends that decides itself how many tokens of an image it keeps."""


def trials_of(reducer: str, keep: Sequence[float], seeds: int) -> list[Trial]:
    """What a reducer is tried at: each of `keep`, under each of `seeds` if it draws.

    Full and none are tried once, and so is an adaptive reducer, at no kept fraction but its own count.
    """
    if reducer in ("full", "none"):
        return [Trial(keep=float(reducer == "full"))]
    if reducer.endswith(ADAPTIVE):
        return [Trial(keep=None)]
    drawn = list(range(seeds)) if reducer == "random" else [None]
    return [Trial(fraction, seed) for fraction in keep for seed in drawn]


def answer_all(
    questions: Sequence[Question],
    batches: Sequence[Sequence[int]],
    trials: Sequence[Trial],
    prepare: Callable[[Sequence[Sequence[str]], Sequence[str]], Batch],
    answer: Callable[[Batch, Trial], Sequence[Reply]],
    share: tuple[int, int] = (0, 1),
    unfinished: Unfinished | None = None,
) -> list[Row]:
    """Answer all questions under every trial; the rows come by trial and then by question.

    `batches` hold indices of questions; `prepare` makes the images and texts of one ready for all trials.
    With `share` (rank, processes) every process answers its part of the batches, and all get the rows of all.
    Questions of a batch that fails are tried one by one. One that fails alone, or whose images could not be
    read, has a row that says so: an answer that could not be given is no empty answer, and has no score.
    Batches that `unfinished` has the answers of are not asked again, and those answered here are added to it.
    Raises RuntimeError (ValueError where the cause is one) naming trial and question if nothing is answered,
    and where nothing is answered any more.
    """
    rank, processes = share
    mine = batches[rank::processes]
    # A reducer that orders the tokens has ordered them for all budgets once it did for the largest.
    falling = sorted(trials, key=lambda trial: trial.keep or 0.0, reverse=True)
    names = {questions[index].id for indices in mine for index in indices}
    known = unfinished.rows(names) if unfinished else {}
    rows: list[Row] = []
    hope = FailureMonitor()
    with tqdm(total=len(trials) * sum(map(len, mine)), unit="answer", disable=rank > 0) as bar:
        for indices in mine:
            asked = [questions[index] for index in indices]
            keys = [(trial, question.id) for question in asked for trial in trials]
            if known.keys() >= set(keys):
                rows += map(known.__getitem__, keys)
            else:
                rows += _ask(asked, falling, prepare, answer, hope, unfinished)
            bar.update(len(trials) * len(asked))
    rows = _gather(rows, processes)
    hope.check_any(rows)
    table = {(Trial(row.keep, row.seed), row.id): row for row in rows}
    assert len(table) == len(trials) * len(questions), "every question is asked once under every trial"
    return [table[trial, question.id] for trial in trials for question in questions]


def _ask(
    asked: Sequence[Question],
    trials: Sequence[Trial],
    prepare: Callable[[Sequence[Sequence[str]], Sequence[str]], Batch],
    answer: Callable[[Batch, Trial], Sequence[Reply]],
    hope: "FailureMonitor",
    unfinished: Unfinished | None,
) -> list[Row]:
    """Rows of a batch under all trials, those of unreadable questions among them."""
    rows = [_unread(question, trial) for question in asked if question.unreadable for trial in trials]
    readable = [question for question in asked if not question.unreadable]
    rows += _answer(readable, trials, prepare, answer, hope) if readable else []
    hope.check(rows)
    if unfinished and all(row.status != FAILED for row in rows):
        unfinished.add(rows)
    return rows


def _answer(
    asked: Sequence[Question],
    trials: Sequence[Trial],
    prepare: Callable[[Sequence[Sequence[str]], Sequence[str]], Batch],
    answer: Callable[[Batch, Trial], Sequence[Reply]],
    hope: "FailureMonitor",
) -> list[Row]:
    """Rows of a batch under all trials, and of each question on its own where the batch fails."""
    rows, failed = _together(asked, trials, prepare, answer, hope)
    # Here, out of every except clause, the memory of the batch that failed is free again.
    for question in asked if failed else ():
        rows += _answer([question], failed, prepare, answer, hope)
    return rows


def _together(
    asked: Sequence[Question],
    trials: Sequence[Trial],
    prepare: Callable[[Sequence[Sequence[str]], Sequence[str]], Batch],
    answer: Callable[[Batch, Trial], Sequence[Reply]],
    hope: "FailureMonitor",
) -> tuple[list[Row], list[Trial]]:
    """Rows of a batch, and the trials under which it failed; a single question has rows under those too."""
    rows: list[Row] = []
    failed: list[Trial] = []
    try:
        batch = prepare([question.images for question in asked], [question.question for question in asked])
    except Exception as error:
        if len(asked) > 1:
            return rows, list(trials)
        return _failed(asked[0], trials, error, hope), failed
    for trial in trials:
        try:
            replies = answer(batch, trial)
            rows += [_scored(*pair, trial) for pair in zip(asked, replies, strict=True)]
        except Exception as error:
            if len(asked) > 1:
                failed.append(trial)
            else:
                rows += _failed(asked[0], [trial], error, hope)
    return rows, failed


def _failed(
    question: Question, trials: Sequence[Trial], error: Exception, hope: "FailureMonitor"
) -> list[Row]:
    hope.cause = hope.cause or error
    reason = f"{type(error).__name__}: {error}"
    tqdm.write(f"no answer to {question.id}: {reason}", file=sys.stderr)
    return [_row(question, trial, status=FAILED, error=reason) for trial in trials]


class FailureMonitor:
    """Whether the model still answers: what has failed since it last did, and the first error of that."""

    def __init__(self) -> None:
        self.failed: dict[str, Row] = {}
        self.cause: Exception | None = None

    def check(self, batch: Sequence[Row]) -> None:
        """Raise the first error after MAX_CONSECUTIVE_FAILURES failed questions in a row."""
        if any(row.status == ANSWERED for row in batch):
            self.failed, self.cause = {}, None
            return
        for row in batch:
            if row.status == FAILED:
                self.failed.setdefault(row.id, row)
        if len(self.failed) >= MAX_CONSECUTIVE_FAILURES:
            self._raise(next(iter(self.failed.values())), f"the {len(self.failed) - 1} behind it")

    def check_any(self, rows: Sequence[Row]) -> None:
        """Raise the first failure where no question was answered at all."""
        failures = [row for row in rows if row.status == FAILED]
        if failures and all(row.status != ANSWERED for row in rows):
            self._raise(failures[0], "any other")

    def _raise(self, first: Row, others: str) -> Never:
        kind = ValueError if isinstance(self.cause, ValueError) else RuntimeError
        where = f"keep {first.keep}, seed {first.seed}"
        raise kind(f"{where}: no answer to {first.id}, nor to {others}: {first.error}") from self.cause


def _gather(rows: list[Row], processes: int) -> list[Row]:
    """The rows of all processes, to each of them."""
    parts: list[list[Row]] = [rows] * processes
    if processes > 1:
        torch.distributed.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


def pictured(
    questions: Sequence[Question], trials: Sequence[Trial], rows: Sequence[Row]
) -> tuple[dict[str, str], Trial]:
    """What pictures of kept tokens show: three images of each text benchmark, near the paper's 40 %.

    Each image comes with the text of its first question that was answered, as `rows` have it. Without a text
    benchmark they are of all the others; an adaptive reducer shows its own count.
    """
    trial = min(trials, key=lambda trial: abs((trial.keep or 0.0) - 0.4))
    answers = [row for row in rows if row.status == ANSWERED]
    answered = {row.id for row in answers if Trial(row.keep, row.seed) == trial}
    shown = [question for question in questions if question.id in answered]
    images: dict[str, dict[str, str]] = {}
    for question in [question for question in shown if question.group == "text"] or shown:
        for name in question.images:
            images.setdefault(question.benchmark, {}).setdefault(name, question.question)
    return dict(pair for texts in images.values() for pair in list(texts.items())[:3]), trial


def _scored(question: Question, reply: Reply, trial: Trial) -> Row:
    """Score one prediction by its benchmark's own score and by ANLS."""
    prediction, tokens, tokens_fed, tokens_full = reply
    score = BENCHMARKS[question.benchmark].score(prediction, question)
    similarity = anls(prediction, question.answers)
    return _row(question, trial, (tokens, tokens_fed, tokens_full), prediction, score, similarity)


def _unread(question: Question, trial: Trial) -> Row:
    return _row(question, trial, status=UNREADABLE, error=question.unreadable)


def _row(
    question: Question,
    trial: Trial,
    tokens: tuple[int, int, int] = (0, 0, 0),
    prediction: str = "",
    score: float | None = None,
    anls: float | None = None,
    status: str = ANSWERED,
    error: str = "",
) -> Row:
    return Row(
        id=question.id,
        benchmark=question.benchmark,
        group=question.group,
        image=next(iter(question.images), ""),
        question=question.question,
        answer=question.answers[0],
        keep=trial.keep,
        seed=trial.seed,
        tokens=tokens[0],
        tokens_fed=tokens[1],
        tokens_full=tokens[2],
        prediction=prediction,
        score=score,
        anls=anls,
        status=status,
        error=error,
        images=list(question.images),
        answers=list(question.answers),
        choices=list(question.choices),
        unit=question.unit,
    )
