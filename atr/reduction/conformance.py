"""Properties that every reducer must have, checked on drawn inputs; `atr check NAME...`.

The inputs are small and sorted by size, so that the first failure found is the smallest.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atr.core import catalog
from atr.reduction.base import Adaptive, Apportioner, EncoderOutput, Merger, Reducer, Scorer
from atr.reduction.checked import select, select_merged, select_scores
from atr.reduction.drawn_batches import IMAGES, WIDTH, DrawnBatch, drawn_batches
from atr.reduction.layer_schedule import LayerReducer, Schedule, keep_for
from atr.reduction.registry import OPTIONAL_FIELDS, build_from
from atr.reduction.selector import FeatureSelector

DEPTHS = (4, 24, 32)
"""Layers of the language models for which schedules are made."""
KEEPS = (0.1, 0.25, 0.5, 1.0)


@dataclass(frozen=True)
class Subject:
    """A reducer under test: how it is built, and the constants of its file."""

    name: str
    file: Path
    class_name: str | None = None

    def build(self, seed: int = 0) -> Reducer | LayerReducer:
        """The reducer, from a small random selector if it needs one; errors as in `build_reducer`."""
        return build_from(self.file, self.name, seed, _random_selector(), self.class_name)

    def reducer(self, seed: int = 0) -> Reducer:
        """A reducer that chooses before the language model."""
        reducer = self.build(seed)
        assert not isinstance(reducer, LayerReducer)
        return reducer

    @property
    def traits(self) -> catalog.ReducerTraits:
        """The constants of its file."""
        return catalog.reducer_traits(str(self.file.with_suffix("")))

    def budgets(self, batch: DrawnBatch) -> list[int]:
        """Budgets at which the reducer is defined: all tokens, none, or those of the batch."""
        return {"all": [batch.count], "nothing": [0]}.get(self.traits.budget, batch.budgets)


@cache
def _random_selector() -> FeatureSelector:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        selector = FeatureSelector(width=WIDTH, grid=(3, 3), layers=1, heads=2).eval()
        torch.nn.init.normal_(selector.trunk.head.weight)  # untrained, it scores all tokens alike
    return selector


@dataclass(frozen=True)
class Property:
    """A property, and the check that raises an error where it does not hold."""

    name: str
    batches: Sequence[DrawnBatch]
    check: Callable[[Subject, DrawnBatch, int], None]
    applies: Callable[[Subject, Reducer], bool] = lambda subject, reducer: True

    def failure(self, subject: Subject) -> str:
        """The smallest example that fails, with the error; empty if there is none."""
        for batch in self.batches:
            for budget in subject.budgets(batch):
                try:
                    self.check(subject, batch, budget)
                except (Exception, SystemExit) as error:  # a user's reducer may raise anything
                    return f"{batch}, budget {budget}: {_one_line(error)}"
        return ""


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def _equal(one: Tensor, other: Tensor, message: str) -> None:
    if not torch.equal(one, other):
        raise ValueError(f"{message}: {one.tolist()} and {other.tolist()}")


def _close(one: Tensor, other: Tensor, message: str) -> None:
    """Equal up to rounding; `torch.testing.assert_close` imports for two seconds."""
    precision = torch.finfo(one.dtype).eps
    if not torch.allclose(one.double(), other.double(), rtol=16 * precision, atol=16 * precision):
        raise ValueError(f"{message}: they differ by {(one - other).abs().max().item():.3g}")


def _read_by(reducer: Reducer, batch: DrawnBatch) -> EncoderOutput:
    """The batch with no more fields than the reducer needs."""
    absent: dict[str, Any] = dict.fromkeys(OPTIONAL_FIELDS - reducer.needs)
    return replace(batch.encoded, **absent)


def _selects(subject: Subject, batch: DrawnBatch, budget: int) -> None:
    reducer = subject.reducer()
    select(reducer, _read_by(reducer, batch), budget)


def _names_needs(subject: Subject, batch: DrawnBatch, budget: int) -> None:
    reducer = subject.reducer()
    keep_BK = select(reducer, _read_by(reducer, batch), budget)
    message = "the selection changes with fields that `needs` does not name"
    _equal(select(subject.reducer(), batch.encoded, budget), keep_BK, message)


def _ignores_the_batch(subject: Subject, batch: DrawnBatch, budget: int) -> None:
    reducer = subject.reducer()
    encoded = _read_by(reducer, batch)
    keep_BK = select(reducer, encoded, budget)
    for images in ([2, 0, 1], [0], [1], [2]):
        message = f"images {images} of the batch have another selection than in the whole batch"
        _equal(select(subject.reducer(), encoded.of(images), budget), keep_BK[images], message)


def _repeats(subject: Subject, batch: DrawnBatch, budget: int) -> None:
    reducer = subject.reducer()
    encoded = _read_by(reducer, batch)
    keep_BK = select(reducer, encoded, budget)
    _equal(select(reducer, encoded, budget), keep_BK, "a second call has another selection")
    _equal(select(subject.reducer(), encoded, budget), keep_BK, "built anew, it has another selection")


def _leaves_the_input(subject: Subject, batch: DrawnBatch, budget: int) -> None:
    reducer = subject.reducer()
    encoded = _read_by(reducer, batch)
    values = {field.name: getattr(encoded, field.name) for field in fields(encoded)}
    before = {name: value.clone() for name, value in values.items() if isinstance(value, Tensor)}
    select(reducer, encoded, budget)
    if isinstance(reducer, Merger):
        select_merged(reducer, encoded, budget)
    for name, value in before.items():
        if not torch.equal(value, values[name]):
            raise ValueError(f"it changes {name} of its input")


def _merges(subject: Subject, batch: DrawnBatch, budget: int) -> None:
    reducer = subject.reducer()
    assert isinstance(reducer, Merger)
    encoded = _read_by(reducer, batch)
    keep_BK, merged_BKD = select_merged(reducer, encoded, budget)
    _equal(keep_BK, select(reducer, encoded, budget), "`merge` keeps other indices than the call")
    for image in range(IMAGES):
        alone_1KD = select_merged(reducer, encoded.of([image]), budget)[1]
        _close(alone_1KD[0], merged_BKD[image], "merged features depend on the batch")
    if budget == encoded.tokens and not torch.equal(merged_BKD, encoded.features_BND):
        raise ValueError("with all tokens kept the features change")


def _counts(subject: Subject, batch: DrawnBatch, budget: int) -> None:
    reducer = subject.reducer()
    assert isinstance(reducer, Adaptive)
    encoded = _read_by(reducer, batch)
    counts_B = reducer.counts(encoded)
    if counts_B.shape != (IMAGES,) or counts_B.dtype != torch.int64:
        raise ValueError(f"counts are {counts_B.dtype} {tuple(counts_B.shape)}, allowed: int64 ({IMAGES},)")
    if ((counts_B < 0) | (counts_B > encoded.tokens)).any():
        raise ValueError(f"counts are {counts_B.tolist()}, allowed: 0 to {encoded.tokens}")
    alone_B = torch.cat([reducer.counts(encoded.of([image])) for image in range(IMAGES)])
    _equal(alone_B, counts_B, "counts depend on the batch")


def _scores(subject: Subject, batch: DrawnBatch, budget: int) -> None:
    reducer = subject.reducer()
    assert isinstance(reducer, Scorer)
    encoded = _read_by(reducer, batch)
    scores_BN = select_scores(reducer, encoded)
    alone_BN = torch.cat([select_scores(reducer, encoded.of([image])) for image in range(IMAGES)])
    _close(alone_BN, scores_BN, "scores depend on the batch")


def _apportions(subject: Subject, batch: DrawnBatch, budget: int) -> None:
    reducer = subject.reducer()
    assert isinstance(reducer, Apportioner)
    encoded = _read_by(reducer, batch)
    sizes = [encoded.tokens, encoded.tokens, max(1, encoded.tokens // 2)]
    for total in (budget, sum(sizes) - budget, sum(sizes)):
        counts = reducer.apportion(encoded, 0, (1, 2), total, sizes)
        if sum(counts) != total or any(not 0 <= n <= size for n, size in zip(counts, sizes, strict=True)):
            raise ValueError(f"{total} tokens of tiles of {sizes} are apportioned as {counts}")


def _takes_packed_tokens(subject: Subject, batch: DrawnBatch, budget: int) -> None:
    reducer = subject.reducer()
    select(reducer, replace(_read_by(reducer, batch), grid=None), budget)


def _draws(subject: Subject, batch: DrawnBatch, budget: int) -> None:
    seeds = range(8)
    encoded = _read_by(subject.reducer(), batch)
    kept = {tuple(select(subject.reducer(seed), encoded, budget).flatten().tolist()) for seed in seeds}
    if 1 < encoded.tokens > budget and len(kept) == 1:
        raise ValueError(f"DRAWS is True, but seeds {seeds[0]} to {seeds[-1]} have the same selection")


def _has_a_budget_of_its_own(subject: Subject, batch: DrawnBatch, budget: int) -> None:
    reducer = subject.reducer()
    if not isinstance(reducer, Adaptive) and getattr(reducer, "threshold", None) is None:
        raise ValueError('BUDGET is "own", but it has neither `counts` nor a `threshold`')


def _is(kind: type) -> Callable[[Subject, Reducer], bool]:
    return lambda subject, reducer: isinstance(reducer, kind)


def _is_a_set(subject: Subject, reducer: Reducer) -> bool:
    return not reducer.needs & {"grid", "pixels_BCHW", "encode"}


def _draws_by_seed(subject: Subject, reducer: Reducer) -> bool:
    return subject.traits.draws


def _counts_itself(subject: Subject, reducer: Reducer) -> bool:
    return subject.traits.budget == "own"


RANDOM = drawn_batches(["random"], [torch.float32])
TIES = drawn_batches(["equal", "repeated", "zero", "concentrated"], [torch.float32])
HALF = drawn_batches(["random", "repeated"], [torch.bfloat16])
PROPERTIES = (
    Property("exact counts in raster order, K = 1 to N", RANDOM, _selects),
    Property("ties", TIES, _selects),
    Property("bfloat16", HALF, _selects),
    Property("reads no field that `needs` does not name", RANDOM, _names_needs),
    Property("independent of the batch", RANDOM + TIES + HALF, _ignores_the_batch),
    Property("deterministic", RANDOM, _repeats),
    Property("leaves its input unchanged", RANDOM + HALF, _leaves_the_input),
    Property("merged features", RANDOM + TIES + HALF, _merges, _is(Merger)),
    Property("counts of its own", RANDOM + TIES + HALF, _counts, _is(Adaptive)),
    Property("scores", RANDOM + TIES + HALF, _scores, _is(Scorer)),
    Property("apportioned budgets", RANDOM, _apportions, _is(Apportioner)),
    Property("packed tokens of several tiles", RANDOM, _takes_packed_tokens, _is_a_set),
    Property("another selection for another seed", RANDOM[1:], _draws, _draws_by_seed),
    Property("a budget of its own", RANDOM[:1], _has_a_budget_of_its_own, _counts_itself),
)


def results(name: str) -> Iterator[tuple[str, str]]:
    """Each property that applies to a reducer, with its smallest failing example or an empty string.

    `name` is a built-in name, the path of a Python file with or without .py, or `package.module:Class`.
    """
    try:
        subject = _subject(name)
        reducer = subject.build()
    except Exception as error:  # a user's file may raise anything
        yield "builds", _one_line(error)
        return
    yield "builds", ""
    if isinstance(reducer, LayerReducer):
        yield "schedule", _schedule_failure(reducer)
        return
    for tested in PROPERTIES:
        if tested.applies(subject, reducer):
            yield tested.name, tested.failure(subject)


def _subject(name: str) -> Subject:
    path, _, class_name = name.partition(":")
    path = path.removesuffix(".py")
    if class_name and "/" not in path:
        path = path.replace(".", "/")
    return Subject(name, catalog.reducer_file(path), class_name or None)


def _schedule_failure(reducer: LayerReducer) -> str:
    for layers, keep in product(DEPTHS, KEEPS):
        try:
            _check_schedule(reducer, layers, keep)
        except (Exception, SystemExit) as error:  # a user's reducer may raise anything
            return f"{layers} layers, keep {keep}: {_one_line(error)}"
    return ""


def _check_schedule(reducer: LayerReducer, layers: int, keep: float) -> None:
    schedule = reducer.schedule(layers, keep)
    if not isinstance(schedule, Schedule) or schedule.layers != layers:
        raise ValueError(f"it is {schedule}, allowed: a Schedule of {layers} layers")
    if keep == 1.0 and schedule.fraction != 1.0:
        raise ValueError(f"layers read {schedule.fraction:.3f} of the tokens, allowed: all")
    again = keep_for(reducer, schedule.fraction, layers, 2**20)
    if again is None or abs(reducer.schedule(layers, again).fraction - schedule.fraction) > 1e-6:
        raise ValueError("`keep` does not order the fractions that layers read on average")


def check(names: Sequence[str]) -> int:
    """Print each property of each reducer, `ok` or its smallest failing example.

    Returns 2 if a reducer has no file, 1 if a property fails, else 0.
    """
    codes = {0}
    for name in names:
        print(name)
        for title, failure in results(name):
            codes.add((1 if _subject(name).file.is_file() else 2) if failure else 0)
            print(f"  FAILS  {title}: {failure}" if failure else f"  ok     {title}")
    return max(codes)
