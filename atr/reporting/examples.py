"""Questions on which the selector and random disagree, chosen by a fixed rule (the paper's Figure 8)."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from atr.reporting.results import Results, Row

LINES = ("full", "random", "selector")
"""The reducers whose answers are shown, in the paper's order."""


@dataclass(frozen=True)
class Case:
    """One question that all tokens answer rightly, and the answers of the reducers in LINES."""

    answers: dict[str, Row]

    @property
    def row(self) -> Row:
        """The answer of all tokens; its question, image and right answer are those of every line."""
        return self.answers["full"]

    @property
    def outcome(self) -> tuple[bool, bool]:
        """Whether the selector is right, and whether random is."""
        return self.answers["selector"].right, self.answers["random"].right


def answered(results: Results) -> list[Case]:
    """The questions that all tokens answer rightly, in the file's order, with the answers at half of them.

    There are none where random was not evaluated.
    """
    if not set(LINES) <= set(results.evaluations):
        return []
    full = results.answers("full", results.groups[0].full.keep)
    selector, random = (results.answers(name, results.half) for name in ("selector", "random"))
    return [
        Case({"full": row, "random": random[id], "selector": selector[id]})
        for id, row in full.items()
        if row.right and id in random and id in selector
    ]


def choose(cases: list[Case], count: int) -> list[Case]:
    """Pick the first cases where exactly one of selector and random is right, from each benchmark in turn.

    A third of them, and one of two, are cases that random wins, where there are so many; the selector's own
    come first.
    """
    won = list(_in_turn(case for case in cases if case.outcome == (True, False)))
    lost = list(_in_turn(case for case in cases if case.outcome == (False, True)))
    losses = min(len(lost), max(count // 3, count - len(won), int(count > 1)))
    return won[: count - losses] + lost[:losses]


def agreement(cases: list[Case], benchmark: str) -> Counter[tuple[bool, bool]]:
    """How many questions of a benchmark had each outcome: (selector right, random right)."""
    return Counter(case.outcome for case in cases if case.row.benchmark == benchmark)


def _in_turn(cases: Iterable[Case]) -> Iterator[Case]:
    """The first case of each benchmark, then the second of each, and so on; each image is shown once."""
    queues: dict[str, list[Case]] = {}
    images = set()
    for case in cases:
        if case.row.image and case.row.image not in images:
            images.add(case.row.image)
            queues.setdefault(case.row.benchmark, []).append(case)
    for turn in range(max(map(len, queues.values()), default=0)):
        yield from (queue[turn] for queue in queues.values() if turn < len(queue))
