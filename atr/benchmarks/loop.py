"""The evaluation loop, written once: it sees questions and a callable that answers them, never a model."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from tqdm import tqdm

from atr.benchmarks import BENCHMARKS
from atr.benchmarks.metrics import anls
from atr.files import write_text

Batch = TypeVar("Batch")


class Question(Protocol):
    """What the loop reads of a question."""

    @property
    def id(self) -> str:
        """Name of the question."""

    @property
    def benchmark(self) -> str:
        """A key of BENCHMARKS."""

    @property
    def group(self) -> str:
        """Its benchmark's group."""

    @property
    def image(self) -> str:
        """Name of the image."""

    @property
    def question(self) -> str:
        """The text that is asked."""

    @property
    def answers(self) -> Sequence[str]:
        """The texts that are right, one or more."""


@dataclass(frozen=True)
class Trial:
    """One setting that all questions are answered under: kept fraction, and seed if the reducer draws."""

    keep: float
    seed: int | None = None


@dataclass(frozen=True)
class Row:
    """One answer to one question, a line of results.jsonl; `tokens` visual tokens were seen for it."""

    id: str
    benchmark: str
    group: str
    image: str
    question: str
    answer: str
    keep: float
    seed: int | None
    tokens: int
    prediction: str
    score: float
    anls: float


Reply = tuple[str, int]
"""The prediction for a question, and the number of visual tokens it was given from."""


def trials_of(reducer: str, keep: Sequence[float], seeds: int) -> list[Trial]:
    """What a reducer is tried at: each of `keep`, under each of `seeds` if it draws; full and none once."""
    if reducer in ("full", "none"):
        return [Trial(keep=float(reducer == "full"))]
    drawn = list(range(seeds)) if reducer == "random" else [None]
    return [Trial(fraction, seed) for fraction in keep for seed in drawn]


def answer_all(
    questions: Sequence[Question],
    batches: Sequence[Sequence[int]],
    trials: Sequence[Trial],
    prepare: Callable[[Sequence[str], Sequence[str]], Batch],
    answer: Callable[[Batch, Trial], Sequence[Reply]],
    share: tuple[int, int] = (0, 1),
) -> list[Row]:
    """Answer all questions under every trial; the rows come by trial and then by question.

    `batches` hold indices of questions; `prepare` makes the images and texts of one ready for all trials.
    With `share` (rank, processes) every process answers its part of the batches, and all get the rows of all.
    Raises RuntimeError (ValueError where the cause is one) naming trial and questions for any failure: an
    answer that could not be given is not an empty answer, and is never scored as one.
    """
    rank, processes = share
    mine = batches[rank::processes]
    rows: list[Row] = []
    with tqdm(total=len(trials) * sum(map(len, mine)), unit="answer", disable=rank > 0) as bar:
        for indices in mine:
            asked = [questions[index] for index in indices]
            batch = prepare([question.image for question in asked], [question.question for question in asked])
            for trial in trials:
                rows += _answer(asked, batch, trial, answer)
                bar.update(len(asked))
    table = {(Trial(row.keep, row.seed), row.id): row for row in _gather(rows, processes)}
    assert len(table) == len(trials) * len(questions), "every question is answered once under every trial"
    return [table[trial, question.id] for trial in trials for question in questions]


def _answer(
    asked: Sequence[Question], batch: Batch, trial: Trial, answer: Callable[[Batch, Trial], Sequence[Reply]]
) -> list[Row]:
    try:
        replies = answer(batch, trial)
        return [_score(*pair, trial) for pair in zip(asked, replies, strict=True)]
    except Exception as error:
        names = ", ".join(question.id for question in asked)
        kind = ValueError if isinstance(error, ValueError) else RuntimeError
        raise kind(f"keep {trial.keep}, seed {trial.seed}: no answer to {names}: {error}") from error


def _gather(rows: list[Row], processes: int) -> list[Row]:
    """The rows of all processes, to each of them."""
    parts: list[list[Row]] = [rows] * processes
    if processes > 1:
        torch.distributed.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


def save_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as one JSON object a line, whole or not at all."""
    lines = (json.dumps(asdict(row), ensure_ascii=False) for row in rows)
    write_text(path, "".join(line + "\n" for line in lines))


def pictured(questions: Sequence[Question], trials: Sequence[Trial]) -> tuple[list[str], Trial]:
    """What pictures of kept tokens show: three images of each text benchmark, near the paper's 40 %.

    Without a text benchmark they are of all the others.
    """
    images: dict[str, dict[str, None]] = {}
    for question in [question for question in questions if question.group == "text"] or questions:
        images.setdefault(question.benchmark, {})[question.image] = None
    first = [image for names in images.values() for image in list(names)[:3]]
    return first, min(trials, key=lambda trial: abs(trial.keep - 0.4))


def _score(question: Question, reply: Reply, trial: Trial) -> Row:
    """Score one prediction by its benchmark's own score and by ANLS."""
    prediction, tokens = reply
    return Row(
        id=question.id,
        benchmark=question.benchmark,
        group=question.group,
        image=question.image,
        question=question.question,
        answer=question.answers[0],
        keep=trial.keep,
        seed=trial.seed,
        tokens=tokens,
        prediction=prediction,
        score=BENCHMARKS[question.benchmark].score(prediction, question.answers),
        anls=anls(prediction, question.answers),
    )
