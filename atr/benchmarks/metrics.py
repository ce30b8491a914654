"""Scores of one answer in 0..1, each a function of strings and a torchmetrics Metric that takes its mean."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from rapidfuzz.distance import Levenshtein
from torch import Tensor
from torchmetrics import Metric


def normalise(text: str) -> str:
    """Lower case, without space at either end, and one blank for each run of space inside."""
    return " ".join(text.lower().split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the prediction is one of the answers up to case and spacing, else 0.0.

    Raises ValueError if there are no answers.

    >>> exact_match(" Igloo ", ["igloo", "iglu"])
    1.0
    >>> exact_match("igloos", ["igloo", "iglu"])
    0.0
    """
    _check(answers)
    return float(normalise(prediction) in map(normalise, answers))


def anls(prediction: str, answers: Sequence[str], threshold: float = 0.5) -> float:
    """Normalised Levenshtein similarity to the nearest answer, 0.0 if the distance is `threshold` or more.

    DocVQA's score (Biten et al., 2019), up to case and spacing: 1 - edits / length of the longer string. Its
    mean over questions is the ANLS. Raises ValueError if there are no answers.

    >>> anls("iglo", ["igloo"])
    0.8
    >>> anls("ig", ["igloo"])
    0.0
    """
    _check(answers)
    words = normalise(prediction)
    distance = min(Levenshtein.normalized_distance(words, normalise(answer)) for answer in answers)
    return 1.0 - distance if distance < threshold else 0.0


def _check(answers: Sequence[str]) -> None:
    if not answers or isinstance(answers, str):
        raise ValueError(f"answers: {answers!r} is not allowed, one or more strings are")


class MeanScore(Metric):
    """Mean over questions of a score of (prediction, answers)."""

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    total: Tensor
    questions: Tensor

    def __init__(self, score: Callable[[str, Sequence[str]], float]) -> None:
        super().__init__()
        self.score = score
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("questions", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> None:
        """Score a batch; raises ValueError unless there is a list of answers for each prediction."""
        if isinstance(predictions, str) or len(predictions) != len(answers):
            raise ValueError(f"{len(predictions)} predictions do not match {len(answers)} lists of answers")
        self.total += sum(map(self.score, predictions, answers))
        self.questions += len(predictions)

    def compute(self) -> Tensor:
        """The mean, a scalar in 0..1; raises ValueError before the first question."""
        if self.questions == 0:
            raise ValueError("no question was scored")
        return self.total / self.questions


class ExactMatch(MeanScore):
    """Fraction of questions answered exactly, see `exact_match`.

    >>> metric = ExactMatch()
    >>> metric.update(["7", "igloo"], [["7"], ["iglu"]])
    >>> metric.compute()
    tensor(0.5000)
    """

    def __init__(self) -> None:
        super().__init__(exact_match)


class ANLS(MeanScore):
    """Average normalised Levenshtein similarity, see `anls`.

    >>> metric = ANLS()
    >>> metric.update(["7", "iglo"], [["7"], ["igloo"]])
    >>> metric.compute()
    tensor(0.9000)
    """

    def __init__(self, threshold: float = 0.5) -> None:
        super().__init__(partial(anls, threshold=threshold))
