"""The evaluation of one reducer: the loop, which sees no model, and the model that answers, put together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

from atr.benchmarks.loop import Question, answer_all, pictured, trials_of
from atr.benchmarks.rows import Row, Trial, Unfinished
from atr.reduction import Reducer
from atr.vlm.answering import Answerer
from atr.vlm.inside import LayerReducer


@dataclass(frozen=True)
class Evaluation:
    """A model that answers, the trials of a reducer, and what reduces under each seed of them."""

    answerer: Answerer
    trials: Sequence[Trial]
    reducers: Mapping[int | None, Reducer | LayerReducer]
    left_out: Sequence[float]
    """Kept fractions that were asked for and that the reducer cannot keep."""

    @classmethod
    def of(cls, answerer: Answerer, name: str, weights: Path) -> Self:
        """That of the reducer of this name, made of the selector in `weights` if of any.

        Raises ValueError, before anything is asked, for a reducer that cannot serve the model or keep any of
        the fractions, and for a selector of other features.
        """
        asked = answerer.settings
        keep = answerer.reachable(name, asked.keep)
        trials = trials_of(name, keep, asked.random_seeds)
        reducers = {trial.seed: answerer.reducer(name, trial.seed or 0, weights) for trial in trials}
        return cls(answerer, trials, reducers, [fraction for fraction in asked.keep if fraction not in keep])

    def answers(
        self, questions: Sequence[Question], share: tuple[int, int], unfinished: Unfinished
    ) -> list[Row]:
        """The rows of all questions under all trials; `share`, `unfinished` and errors as in `answer_all`."""
        needs = frozenset().union(*(reducer.needs for reducer in self.reducers.values()))
        return answer_all(
            questions,
            self.answerer.batches(questions, self.answerer.settings.batch_size),
            self.trials,
            partial(self.answerer.prepare, needs=needs),
            lambda batch, trial: self.answerer.answer(batch, self.reducers[trial.seed], trial.keep),
            share,
            unfinished,
        )

    def masks(self, questions: Sequence[Question], rows: Sequence[Row]) -> dict[str, Any]:
        """The tokens that pictures show as kept, as `Answerer.masks` has them."""
        images, trial = pictured(questions, self.trials, rows)
        return self.answerer.masks(images, self.reducers[trial.seed], trial.keep)
