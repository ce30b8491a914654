"""Batches of questions, bounded by the tokens that a language model reads."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Self


@dataclass(frozen=True)
class _Group:
    """Questions (their indices) about the same images, which are read once for all of them."""

    images: int
    visual: int
    """Tokens of all images."""
    questions: list[int]
    tokens: int

    def alike(self, pads: bool) -> tuple[int, int]:
        """What the groups of a batch have in common."""
        return self.images, 0 if pads or len(self.questions) > 1 else self.tokens

    def split(self, lengths: Sequence[int], most: int) -> Iterator[Self]:
        """Parts of at most `most` tokens."""
        part: list[int] = []
        tokens = self.visual
        for question in self.questions:
            if part and tokens + lengths[question] > most:
                yield replace(self, questions=part, tokens=tokens)
                part, tokens = [], self.visual
            part.append(question)
            tokens += lengths[question]
        yield replace(self, questions=part, tokens=tokens)


def batch_by_tokens(
    images: Sequence[Sequence[str]],
    lengths: Sequence[int],
    visual: Mapping[str, int],
    most: int,
    shares: bool = True,
    pads: bool = True,
) -> list[list[int]]:
    """Indices of the questions in batches of at most `most` tokens, padding included.

    A question has `lengths` tokens of text, and each of its `images` at most as many as `visual` says. A
    batch has at least one question, and equally many images for each. Questions about the same images follow
    each other; if the model `shares` the reading of images, these count once. Without `pads`, questions about
    different images have the same length, so that a batch needs no padding. The order of the questions does
    not depend on `most`.
    """
    groups = _groups(images, lengths, visual, shares)
    groups.sort(key=lambda group: (group.alike(pads), group.tokens))
    batches: list[list[int]] = []
    for _, same in groupby(groups, key=lambda group: group.alike(pads)):
        rows = longest = 0
        for part in (part for group in same for part in group.split(lengths, most)):
            longest = max(longest, part.tokens)
            if not rows or (rows + 1) * longest > most:
                batches.append([])
                rows, longest = 0, part.tokens
            batches[-1] += part.questions
            rows += 1
    return batches


def _groups(
    images: Sequence[Sequence[str]], lengths: Sequence[int], visual: Mapping[str, int], shares: bool
) -> list[_Group]:
    """The questions by their images, or each by itself."""
    groups: dict[tuple[str, ...] | int, list[int]] = {}
    for index, names in enumerate(images):
        groups.setdefault(tuple(names) if names and shares else index, []).append(index)
    return [_group(images[group[0]], group, lengths, visual) for group in groups.values()]


def _group(
    names: Sequence[str], questions: list[int], lengths: Sequence[int], visual: Mapping[str, int]
) -> _Group:
    tokens = sum(visual[name] for name in names)
    return _Group(len(names), tokens, questions, tokens + sum(lengths[index] for index in questions))
