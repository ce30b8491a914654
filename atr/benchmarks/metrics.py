"""Scores in 0..1 of one predicted answer, as functions of the prediction and the right answers."""

import string
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein


def normalise_answer(text: str) -> str:
    """Lower the case, strip both ends, and replace each run of white space by one blank."""
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
    return float(normalise_answer(prediction) in map(normalise_answer, answers))


def anls(prediction: str, answers: Sequence[str], threshold: float = 0.5) -> float:
    """Normalised Levenshtein similarity to the nearest answer, 0.0 if the distance is `threshold` or more.

    DocVQA's score (Biten et al., 2019), up to case and spacing: 1 - edits / length of the longer string. The
    ANLS is its mean over questions. Raises ValueError if there are no answers.

    lmms-eval differs in two ways. It scores a distance of exactly one half as 0.5; the paper, and this
    function, score it as 0. And it counts edits after merging runs of blanks but divides by the length
    before, so that repeated blanks raise its similarity.

    >>> anls("iglo", ["igloo"])
    0.8
    >>> anls("ig", ["igloo"]), anls("no", ["nose"])
    (0.0, 0.0)
    >>> anls("an  igloo", ["an iglo"])  # lmms-eval: 8 / 9
    0.875
    """
    check_answers(answers)
    words = normalise_answer(prediction)
    distance = min(Levenshtein.normalized_distance(words, normalise_answer(answer)) for answer in answers)
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

    ChartQA's score (Masry et al., 2022, section 5.1); the tolerance is relative to the answer. A percentage
    is read as a hundredth of its number; an answer of 0 has no tolerance. Raises ValueError if there are no
    answers.

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
    """Return the answers; raise ValueError if there are none, or if they are one string."""
    if not answers or isinstance(answers, str):
        raise ValueError(f"answers: {answers!r} is not allowed, one or more strings are")
    return answers
