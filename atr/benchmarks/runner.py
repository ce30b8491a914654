"""The evaluation loop: works on questions and a callable that answers them, without knowing the model."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Never, TypeVar

import torch
from tqdm import tqdm

from atr.benchmarks import load_benchmark
from atr.benchmarks.metrics import anls
from atr.core.answer_files import UnfinishedRows
from atr.core.catalog import reducer_traits
from atr.core.records import ANSWERED, FAILED, UNREADABLE, Question, Reply, Row, Trial

_Batch = TypeVar("_Batch")
MAX_CONSECUTIVE_FAILURES = 16
"""Consecutive questions failed under every trial after which the run stops: the model must be broken."""
PICTURED_KEEP = 0.4
"""Kept fraction shown in the pictures of kept tokens, as in the paper."""
PICTURED_IMAGES = 3
"""Number of images of each benchmark that are pictured."""


def trials_of(reducer: str, keep: Sequence[float], seeds: int) -> list[Trial]:
    """The trials of a reducer: each of `keep`, and under each of `seeds` if the reducer is random.

    A reducer without a budget has one trial: it keeps all (1.0), nothing (0.0), or its own count (None).
    """
    traits = reducer_traits(reducer)
    unbudgeted = {"all": 1.0, "nothing": 0.0, "own": None}
    if traits.budget in unbudgeted:
        return [Trial(unbudgeted[traits.budget])]
    drawn = list(range(seeds)) if traits.draws else [None]
    return [Trial(fraction, seed) for fraction in keep for seed in drawn]


def answer_all(
    questions: Sequence[Question],
    batches: Sequence[Sequence[int]],
    trials: Sequence[Trial],
    prepare: Callable[[Sequence[Sequence[str]], Sequence[str]], _Batch],
    answer: Callable[[_Batch, Trial], Sequence[Reply]],
    share: tuple[int, int] = (0, 1),
    unfinished: UnfinishedRows | None = None,
) -> list[Row]:
    """Answer all questions under every trial; the rows are ordered by trial, then by question.

    `batches` hold indices of questions; `prepare` encodes a batch of images and texts once for all trials.
    With `share` (rank, processes) each process answers its part of the batches, and all return all rows.
    The questions of a batch that fails are tried one by one; one that fails alone, or whose images cannot be
    read, gets a row with its status and no score: a missing answer is not an empty one.
    Batches whose rows are in `unfinished` are not answered again, and new rows are added to it.
    Raises RuntimeError (ValueError if the cause is one) naming trial and question if no question is answered,
    or MAX_CONSECUTIVE_FAILURES in a row are not; raises ValueError for an invalid score.
    """
    rank, processes = share
    mine = batches[rank::processes]
    ids = {questions[index].id for indices in mine for index in indices}
    known = unfinished.load(ids) if unfinished else {}
    # From the largest budget down: a reducer that ranks tokens reuses the ranking for smaller budgets.
    falling = sorted(trials, key=lambda trial: trial.keep or 0.0, reverse=True)
    loop = _Loop(falling, prepare, answer, unfinished)
    rows: list[Row] = []
    with tqdm(total=len(trials) * sum(map(len, mine)), unit="answer", disable=rank > 0) as bar:
        for indices in mine:
            batch = [questions[index] for index in indices]
            keys = [(trial, question.id) for question in batch for trial in trials]
            rows += [known[key] for key in keys] if known.keys() >= set(keys) else loop.ask(batch)
            bar.update(len(keys))
    rows = _gather(rows, processes)
    loop.monitor.check_any(rows)
    table = {(Trial(row.keep, row.seed), row.id): row for row in rows}
    assert len(table) == len(trials) * len(questions), "every question is asked once under every trial"
    return [table[trial, question.id] for trial in trials for question in questions]


class FailureMonitor:
    """Counts consecutive failures and keeps the first error, so that a broken model stops the run."""

    def __init__(self) -> None:
        self.failed: dict[str, Row] = {}
        """Questions that failed since one was last answered, by id."""
        self.cause: Exception | None = None
        """The first error since then."""

    def check(self, batch: Sequence[Row]) -> None:
        """Raise the first error after MAX_CONSECUTIVE_FAILURES failed questions in a row."""
        if any(row.status == ANSWERED for row in batch):
            self.failed, self.cause = {}, None
            return
        for row in batch:
            if row.status == FAILED:
                self.failed.setdefault(row.id, row)
        if len(self.failed) >= MAX_CONSECUTIVE_FAILURES:
            self._raise(next(iter(self.failed.values())), f"the next {len(self.failed) - 1}")

    def check_any(self, rows: Sequence[Row]) -> None:
        """Raise the first error if no question was answered at all."""
        failures = [row for row in rows if row.status == FAILED]
        if failures and all(row.status != ANSWERED for row in rows):
            self._raise(failures[0], "any other")

    def _raise(self, first: Row, others: str) -> Never:
        kind = ValueError if isinstance(self.cause, ValueError) else RuntimeError
        where = f"keep {first.keep}, seed {first.seed}"
        raise kind(f"{where}: no answer to {first.id}, nor to {others}: {first.error}") from self.cause


@dataclass
class _Loop(Generic[_Batch]):
    """Answers batches under all trials, and falls back to single questions where a batch fails."""

    trials: Sequence[Trial]
    prepare: Callable[[Sequence[Sequence[str]], Sequence[str]], _Batch]
    answer: Callable[[_Batch, Trial], Sequence[Reply]]
    unfinished: UnfinishedRows | None
    monitor: FailureMonitor = field(default_factory=FailureMonitor)

    def ask(self, questions: Sequence[Question]) -> list[Row]:
        """Rows of a batch under all trials, including those of unreadable questions."""
        unreadable = [question for question in questions if question.unreadable]
        rows = [_unreadable_row(question, trial) for question in unreadable for trial in self.trials]
        if readable := [question for question in questions if not question.unreadable]:
            rows += self._answer(readable, self.trials)
        self.monitor.check(rows)
        if self.unfinished and all(row.status != FAILED for row in rows):
            self.unfinished.append(rows)
        return rows

    def _answer(self, questions: Sequence[Question], trials: Sequence[Trial]) -> list[Row]:
        """Rows of a batch; under trials at which the batch fails, each question is answered on its own."""
        rows, failed = self._answer_batch(questions, trials)
        # Not in an except clause, because there the exception still holds the failed batch in memory.
        for question in questions if failed else ():
            rows += self._answer([question], failed)
        return rows

    def _answer_batch(
        self, questions: Sequence[Question], trials: Sequence[Trial]
    ) -> tuple[list[Row], list[Trial]]:
        """Rows of a batch, and the failed trials, without rows; a single question gets failed rows."""
        rows: list[Row] = []
        failed: list[Trial] = []
        images = [question.images for question in questions]
        try:
            batch = self.prepare(images, [question.question for question in questions])
        except Exception as error:
            return (
                (rows, list(trials)) if len(questions) > 1 else (self._fail(questions[0], trials, error), [])
            )
        for trial in trials:
            try:
                answered = list(zip(questions, self.answer(batch, trial), strict=True))
            except Exception as error:
                if len(questions) > 1:
                    failed.append(trial)
                else:
                    rows += self._fail(questions[0], [trial], error)
            else:
                rows += [_scored_row(question, reply, trial) for question, reply in answered]
        return rows, failed

    def _fail(self, question: Question, trials: Sequence[Trial], error: Exception) -> list[Row]:
        self.monitor.cause = self.monitor.cause or error
        reason = f"{type(error).__name__}: {error}"
        tqdm.write(f"no answer to {question.id}: {reason}", file=sys.stderr)
        return [_row(question, trial, status=FAILED, error=reason) for trial in trials]


def _gather(rows: list[Row], processes: int) -> list[Row]:
    """Gather the rows of all processes in each process."""
    parts: list[list[Row]] = [rows] * processes
    if processes > 1:
        torch.distributed.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


def choose_pictured(
    questions: Sequence[Question], trials: Sequence[Trial], rows: Sequence[Row]
) -> tuple[dict[str, str], Trial]:
    """Choose the images to picture with their kept tokens, a question's text for each, and the trial to show.

    These are the first PICTURED_IMAGES of each text benchmark, or of each other one if there is no text
    benchmark, under the trial nearest to PICTURED_KEEP; the text is that of the first answered question.
    """
    trial = min(trials, key=lambda trial: abs((trial.keep or 0.0) - PICTURED_KEEP))
    trial_rows = [row for row in rows if Trial(row.keep, row.seed) == trial]
    answered = {row.id for row in trial_rows if row.status == ANSWERED}
    candidates = [question for question in questions if question.id in answered]
    texts: dict[str, dict[str, str]] = {}
    for question in [question for question in candidates if question.group == "text"] or candidates:
        for image in question.images:
            texts.setdefault(question.benchmark, {}).setdefault(image, question.question)
    chosen = (pair for images in texts.values() for pair in list(images.items())[:PICTURED_IMAGES])
    return dict(chosen), trial


def _scored_row(question: Question, reply: Reply, trial: Trial) -> Row:
    """The row of an answer, scored by its benchmark and by ANLS."""
    prediction, *tokens = reply
    score = load_benchmark(question.benchmark).score(prediction, question)
    return _row(question, trial, tokens, prediction, score, anls(prediction, question.answers))


def _unreadable_row(question: Question, trial: Trial) -> Row:
    return _row(question, trial, status=UNREADABLE, error=question.unreadable)


def _row(
    question: Question,
    trial: Trial,
    tokens: Sequence[int] = (0, 0, 0),
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
        question=question.question,
        answers=question.answers,
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
        images=question.images,
        choices=question.choices,
        unit=question.unit,
    )
