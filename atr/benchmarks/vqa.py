"""VQA accuracy (Antol et al., 2015) with the normalisation that TextVQA is scored with."""

import re
from collections.abc import Sequence
from statistics import fmean

from atr.benchmarks.metrics import check_answers

_ARTICLES = frozenset({"a", "an", "the"})
_DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_DIGITS)}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't
    must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've
    somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
    something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're
    they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've
    who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll
    y'all'd've you'd you'd've you'll you're you've
"""
# Each contraction by its spelling without one apostrophe, unless that is a word itself (well, were).
_CONTRACTIONS = {
    word[: place.start()] + word[place.end() :]: word
    for word in _CONTRACTED.split()
    for place in re.finditer("'", word)
} | {"somebody'd": "somebodyd"}


def normalise_vqa(text: str) -> str:
    """Normalise an answer as EvalAI does for TextVQA.

    In turn: lower the case, remove commas and question marks, put a blank before 's; remove punctuation
    marks that touch a blank anywhere in the text and replace the others by a blank; remove full stops unless
    a digit follows; write number words as digits; remove articles; put the apostrophe into contractions.

    >>> normalise_vqa("The two T-shirts, dont!")
    "2 t shirts don't"
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.strip().replace("\n", " ").replace("\t", " ").strip()
    spaced = {mark for mark in _PUNCTUATION if f"{mark} " in text or f" {mark}" in text}
    text = "".join(
        character if character not in _PUNCTUATION else "" if character in spaced else " "
        for character in text
    )
    words = [_NUMBERS.get(word, word) for word in re.sub(r"\.(?!\d)", "", text).split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Mean over annotators of min(1, n / 3), where n other annotators gave the predicted answer.

    Prediction and answers are normalised first. Raises ValueError if there are no answers.

    >>> vqa_accuracy("Two", ["2", "two", "3", "3", "3", "3", "3", "3", "3", "3"])
    0.6
    """
    check_answers(answers)
    said = normalise_vqa(prediction)
    same = [normalise_vqa(answer) == said for answer in answers]
    return fmean(min(1.0, (sum(same) - own) / 3) for own in same)
