"""Scores of one answer in 0..1, each a function of strings and a torchmetrics Metric that takes its mean."""

import string
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

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
    check_answers(answers)
    return float(normalise(prediction) in map(normalise, answers))


def anls(prediction: str, answers: Sequence[str], threshold: float = 0.5) -> float:
    """Normalised Levenshtein similarity to the nearest answer, 0.0 if the distance is `threshold` or more.

    DocVQA's score (Biten et al., 2019), up to case and spacing: 1 - edits / length of the longer string. Its
    mean over questions is the ANLS. Raises ValueError if there are no answers.

    lmms-eval's formula differs in two things. A distance of exactly one half scores nothing here, as in the
    paper, and one half there. Runs of blanks are one blank when edits are counted, as here, but the length
    that it divides by is the one before: there, repeated blanks make two texts more alike.

    >>> anls("iglo", ["igloo"])
    0.8
    >>> anls("ig", ["igloo"]), anls("no", ["nose"])
    (0.0, 0.0)
    >>> anls("an  igloo", ["an iglo"])  # lmms-eval: 8 / 9
    0.875
    """
    check_answers(answers)
    words = normalise(prediction)
    distance = min(Levenshtein.normalized_distance(words, normalise(answer)) for answer in answers)
    return 1.0 - distance if distance < threshold else 0.0


def exact_words(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the prediction is one of the answers up to case, spacing and ASCII punctuation, else 0.0.

    Raises ValueError if there are no answers.

    >>> exact_words("T-Shirt.", ["tshirt"])
    1.0
    """
    bare = str.maketrans("", "", string.punctuation)
    return exact_match(
        prediction.translate(bare), [answer.translate(bare) for answer in check_answers(answers)]
    )


def relaxed_accuracy(prediction: str, answers: Sequence[str], tolerance: float = 0.05) -> float:
    """1.0 if a numeric prediction lies within `tolerance` of a numeric answer, else exact match up to case.

    ChartQA's score (Masry et al., 2022, section 5.1), of which the tolerance is relative to the answer. A
    percentage is a hundredth of its number; an answer of 0 has no tolerance. Raises ValueError if there are
    no answers.

    >>> relaxed_accuracy("105", ["100"]), relaxed_accuracy("106", ["100"]), relaxed_accuracy("5%", ["0.05"])
    (1.0, 0.0, 1.0)
    """
    return float(
        any(_relaxed(prediction.strip(), answer.strip(), tolerance) for answer in check_answers(answers))
    )


def _relaxed(prediction: str, answer: str, tolerance: float) -> bool:
    said, right = _number(prediction), _number(answer)
    if said is None or not right:
        return prediction.lower() == answer.lower()
    return abs(said - right) / abs(right) <= tolerance


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def check_answers(answers: Sequence[str]) -> Sequence[str]:
    """The answers, if there are any; raises ValueError otherwise."""
    if not answers or isinstance(answers, str):
        raise ValueError(f"answers: {answers!r} is not allowed, one or more strings are")
    return answers


class MeanScore(Metric):
    """Mean over questions of a score of (prediction, answers), or of (prediction, question)."""

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    total: Tensor
    questions: Tensor

    def __init__(self, score: Callable[[str, Any], float]) -> None:
        super().__init__()
        self.score = score
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("questions", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predictions: Sequence[str], answers: Sequence[Any]) -> None:
        """Score a batch; raises ValueError unless there is a list of answers (a question) for each."""
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


class RelaxedAccuracy(MeanScore):
    """Fraction of questions answered up to a relative tolerance of numbers, see `relaxed_accuracy`.

    >>> metric = RelaxedAccuracy()
    >>> metric.update(["97", "Peru"], [["100"], ["Chile"]])
    >>> metric.compute()
    tensor(0.5000)
    """

    def __init__(self, tolerance: float = 0.05) -> None:
        super().__init__(partial(relaxed_accuracy, tolerance=tolerance))
