"""Questions on which the selector and random disagree, chosen by a fixed rule (the paper's Figure 8)."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from atr.core.records import Row
from atr.reporting.results import Results

SHOWN = ("full", "random", "selector")
"""The reducers whose answers are shown, in the paper's order."""


def is_right(row: Row) -> bool:
    """Whether the score is one half or more, the threshold of ANLS; exact match is 0 or 1."""
    return row.score is not None and row.score >= 0.5


@dataclass(frozen=True)
class Case:
    """One question that is answered correctly with all tokens, and the answers of the reducers in SHOWN."""

    answers: dict[str, Row]

    @property
    def row(self) -> Row:
        """The answer with all tokens; question, image and right answer are those of every reducer."""
        return self.answers["full"]

    @property
    def outcome(self) -> tuple[bool, bool]:
        """Whether the selector is right, and whether random is."""
        return is_right(self.answers["selector"]), is_right(self.answers["random"])


def find_cases(results: Results) -> list[Case]:
    """Questions answered correctly with all tokens, in file order, with the answers at half of the tokens.

    Empty if random was not evaluated.
    """
    if not set(SHOWN) <= set(results.evaluations):
        return []
    full = results.answers("full", results.groups[0].full.keep)
    selector, random = (results.answers(name, results.half) for name in ("selector", "random"))
    return [
        Case({"full": row, "random": random[id], "selector": selector[id]})
        for id, row in full.items()
        if is_right(row) and id in random and id in selector
    ]


def choose_cases(cases: list[Case], count: int) -> list[Case]:
    """The first cases in which exactly one of selector and random is right, from each benchmark in turn.

    Cases won by the selector come first. One third of all, and one of two, are won by random, if it wins
    that many.
    """
    won = list(_in_turn(case for case in cases if case.outcome == (True, False)))
    lost = list(_in_turn(case for case in cases if case.outcome == (False, True)))
    losses = min(len(lost), max(count // 3, count - len(won), int(count > 1)))
    return won[: count - losses] + lost[:losses]


def count_outcomes(cases: list[Case], benchmark: str) -> Counter[tuple[bool, bool]]:
    """Number of questions of a benchmark by outcome: (selector right, random right)."""
    return Counter(case.outcome for case in cases if case.row.benchmark == benchmark)


def _in_turn(cases: Iterable[Case]) -> Iterator[Case]:
    """The first case of each benchmark, then the second of each, and so on; each image occurs once."""
    queues: dict[str, list[Case]] = {}
    images = set()
    for case in cases:
        if case.row.image and case.row.image not in images:
            images.add(case.row.image)
            queues.setdefault(case.row.benchmark, []).append(case)
    for turn in range(max(map(len, queues.values()), default=0)):
        yield from (queue[turn] for queue in queues.values() if turn < len(queue))
