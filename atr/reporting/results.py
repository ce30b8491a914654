"""What the stages before the report wrote: read from their JSON files, and checked against each other."""

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from atr.core.files import plain_name, read_json
from atr.core.layout import LAYOUT
from atr.core.typed_json import parse_record, read_records

PAPER = ("full", "none", "random", "selector")
"""The lines of the paper's plots, as far as they are evaluated; other reducers join them."""
REQUIRED = ("full", "selector")
"""Of PAPER, the ones without which nothing can be said; the parameters hold them to be evaluated."""
UNBUDGETED = ("full", "none")
"""Of PAPER, the ones that drop nothing or everything: lines without a kept fraction to choose."""
ADAPTIVE = "_adaptive"
"""How the name of a reducer ends that decides itself how many tokens it keeps; before it, its sibling's."""
SETTINGS = tuple(("evaluate", key) for key in (*LAYOUT, "max_new_tokens"))
"""Section and key of the parameters that change the answers of any reducer: all that are shown share them."""
MACHINE = ("device", "processor")
"""Of what a result was computed in, the keys that results may differ in: only rounding depends on them."""


@dataclass(frozen=True)
class Score:
    """Mean score at one kept fraction, in 0..1, with its 95 % interval and the mean tokens of a question.

    The kept fraction of an adaptive count is the mean one.
    """

    keep: float
    tokens: float
    """That were kept."""
    tokens_fed: float
    """These, and the newlines that the language model was fed with them."""
    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Row:
    """One question and what was answered: the seed is None where the reducer draws nothing.

    The score is None where the question could not be answered, `keep` where the count of tokens is adaptive.
    """

    id: str
    benchmark: str
    group: str
    image: str
    question: str
    answer: str
    keep: float | None
    seed: int | None
    prediction: str
    score: float | None
    unit: str = ""
    """Name shared by the questions that count as right only together; empty if it counts alone."""

    def __post_init__(self) -> None:
        plain_name(self.benchmark)
        plain_name(self.group)

    @property
    def right(self) -> bool:
        """Whether the answer counts: a score of a half and more, as ANLS counts it; exact match is 0 or 1."""
        return self.score is not None and self.score >= 0.5

    @property
    def asked(self) -> tuple[str, ...]:
        """The fields that say what was asked, not what was answered."""
        return self.benchmark, self.group, self.image, self.question, self.answer


@dataclass(frozen=True)
class Masks:
    """Kept patches of a few images, as indices in raster order into a grid of rows x columns."""

    grid: tuple[int, int]
    keep: float | None
    kept: dict[str, list[int]]


@dataclass(frozen=True)
class Evaluation:
    """Everything one reducer has left in its folder; curves by kind (benchmark or group) and name."""

    reducer: str
    encoder: str
    vlm: str
    tokens_full: float
    curves: dict[tuple[str, str], tuple[Score, ...]]
    rows: list[Row]
    masks: Masks | None
    resamples: int
    """Of the questions, behind an interval."""
    seed: int
    """Of the resamples."""
    parameters: dict[str, Any]
    provenance: dict[str, Any]
    resolved: dict[str, Any]
    """What the answers were computed in: precision, machine, attention kernel, versions of model and
    features, which are None where the images were read."""


@dataclass(frozen=True)
class Comparison:
    """All reducers on one benchmark or one group: what one plot and one table show.

    `benchmarks` are the ones its scores are means of.
    """

    kind: str
    name: str
    full: Score
    none: Score | None
    """None where it was not evaluated."""
    curves: dict[str, tuple[Score, ...]]
    adaptive: dict[str, Score] = field(default_factory=dict)
    benchmarks: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """Its name in headings."""
        return f"{self.name} group" if self.kind == "group" else self.name

    @property
    def keeps(self) -> list[float]:
        """Kept fractions at which any reducer was measured, rising."""
        return sorted({score.keep for curve in self.curves.values() for score in curve})

    def at(self, reducer: str, keep: float) -> Score | None:
        """The score of a reducer at a kept fraction, None where it was not measured."""
        return next((score for score in self.curves.get(reducer, ()) if score.keep == keep), None)

    def mean(self, reducer: str, keep: float) -> float | None:
        """The mean of that score."""
        score = self.at(reducer, keep)
        return score.mean if score else None


@dataclass(frozen=True)
class Results:
    """The evaluations of all reducers and what the pretraining measured."""

    evaluations: dict[str, Evaluation]
    pretraining: dict[str, Any]

    @property
    def budgeted(self) -> list[str]:
        """The reducers that take a budget: the selector and random first, then their peers by name."""
        peers = sorted(set(self.evaluations) - set(PAPER) - set(self.adaptive))
        return [*self._leading, *peers]

    @property
    def _leading(self) -> list[str]:
        """The selector, and random if it was evaluated."""
        return [name for name in ("selector", "random") if name in self.evaluations]

    @property
    def adaptive(self) -> list[str]:
        """The reducers that decide themselves how many tokens they keep, by name."""
        return sorted(name for name in self.evaluations if name.endswith(ADAPTIVE))

    @cached_property
    def groups(self) -> list[Comparison]:
        """One comparison per group of benchmarks, in the order of their evaluation."""
        return self._comparisons("group")

    @cached_property
    def benchmarks(self) -> list[Comparison]:
        """One comparison per benchmark, in the order of their evaluation."""
        return self._comparisons("benchmark")

    @cached_property
    def shared(self) -> list[float]:
        """Kept fractions at which the selector, and random, were measured on everything, rising."""
        every = [*self.groups, *self.benchmarks]
        curves = [comparison.curves[name] for comparison in every for name in self._leading]
        return sorted(set.intersection(*({score.keep for score in curve} for curve in curves)))

    @property
    def half(self) -> float:
        """The shared kept fraction nearest to one half, the lower of two."""
        return self.nearest(0.5)

    def nearest(self, keep: float) -> float:
        """The shared kept fraction nearest to this one, the lower of two."""
        return min(self.shared, key=lambda shared: abs(shared - keep))

    @property
    def unanswered(self) -> set[str]:
        """Questions that have no answer under some reducer, kept fraction and seed."""
        return {row.id for each in self.evaluations.values() for row in each.rows if row.score is None}

    def answers(self, reducer: str, keep: float) -> dict[str, Row]:
        """Answered rows of a reducer at a kept fraction by question; of several seeds, the lowest."""
        answered = (row for row in self.evaluations[reducer].rows if row.score is not None)
        rows = [row for row in answered if row.keep == keep]
        lowest = min((row.seed or 0 for row in rows), default=0)
        return {row.id: row for row in rows if (row.seed or 0) == lowest}

    def _comparisons(self, kind: str) -> list[Comparison]:
        every = self.evaluations
        group_of = {row.benchmark: row.group for row in every["full"].rows}
        return [
            Comparison(
                kind=kind,
                name=name,
                full=every["full"].curves[kind, name][0],
                none=every["none"].curves[kind, name][0] if "none" in every else None,
                curves={reducer: every[reducer].curves[kind, name] for reducer in self.budgeted},
                adaptive={reducer: every[reducer].curves[kind, name][0] for reducer in self.adaptive},
                benchmarks=tuple(
                    part
                    for part, group in group_of.items()
                    if name == {"benchmark": part, "group": group}[kind]
                ),
            )
            for of_kind, name in every["full"].curves
            if of_kind == kind
        ]


def load(evaluate: Path, pretrain: Path, reducers: Collection[str]) -> Results:
    """Read the folder under `evaluate` of each of `reducers`, and the metrics of the pretraining.

    Folders of other names are results of parameters that are no longer asked for, and are left alone.
    Raises ValueError when one of REQUIRED is not among the reducers; naming the file and the stage that makes
    it when one is missing or broken, or a name in it is none; and when two reducers were asked different
    questions, of another model, under other SETTINGS or in another precision, or miss a benchmark that the
    other has.
    """
    if lacking := [name for name in REQUIRED if name not in reducers]:
        raise ValueError(f"evaluate.reducers: the report needs {', '.join(lacking)} among them")
    evaluations = {name: _evaluation(name, evaluate / name) for name in sorted(reducers)}
    for name in evaluations:
        _check_comparable(evaluations["full"], evaluations[name], evaluate)
    results = Results(evaluations, _pretraining(pretrain))
    if not results.groups or not results.shared:
        raise ValueError(f"{evaluate}: no kept fraction is that of selector and random; run stage evaluate")
    return results


def read(path: Path, stage: str) -> dict[str, Any]:
    """The object in a JSON file; raises ValueError naming the file and the stage that makes it."""
    try:
        content = read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; stage {stage} makes it") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object; stage {stage} makes it")
    return content


def _pretraining(path: Path) -> dict[str, Any]:
    content = read(path, "pretrain")
    for key in ("final", "parameters", "provenance", "resolved"):
        if not isinstance(content.get(key), dict):
            raise ValueError(f"{path} lacks {key!r}; stage pretrain makes it")
    for key, value in content["final"].items():
        number(f"{path}: final.{key}", value)
    return content


def number(name: str, value: object) -> float:
    """The value as a finite number; raises ValueError that begins with its name if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}, allowed: a finite number")
    return value


def _evaluation(reducer: str, folder: Path) -> Evaluation:
    stage = f"evaluate (reducer {reducer})"
    path = folder / "summary.json"
    summary = read(path, stage)
    with made_by(stage):
        parse_record(_Summary, summary, str(path))
        if summary["reducer"] != reducer:
            raise ValueError(f"{path} is of reducer {summary['reducer']!r}")
    return Evaluation(
        reducer=summary["reducer"],
        encoder=summary["encoder"],
        vlm=summary["vlm"],
        tokens_full=summary["tokens_full"],
        curves=_curves(summary["scores"]),
        rows=_rows(folder / "results.jsonl", stage),
        masks=_masks(folder / "masks.json", stage) if reducer not in UNBUDGETED else None,
        resamples=summary["parameters"]["evaluate"]["bootstrap"],
        seed=summary["parameters"]["seed"],
        parameters=summary["parameters"],
        provenance=summary["provenance"],
        resolved=summary["resolved"],
    )


@dataclass(frozen=True)
class _Written:
    """The content of masks.json."""

    grid: tuple[int, int]
    keep: float | None
    masks: dict[str, list[int]]


@dataclass(frozen=True)
class _Point:
    """What is read of each entry of a summary's scores."""

    keep: float | None
    tokens: float
    tokens_fed: float
    mean: float
    low: float
    high: float
    tokens_full: float = 0.0
    group: str = ""
    benchmark: str = ""

    def __post_init__(self) -> None:
        if self.keep is None and not 0 <= self.tokens <= self.tokens_full:
            allowed = f"0 to tokens_full, {self.tokens_full}, without keep"
            raise ValueError(f"tokens: {self.tokens} is not allowed, allowed: {allowed}")
        plain_name(self.group or self.benchmark)


@dataclass(frozen=True)
class _Resampled:
    """What is read of the section `evaluate`."""

    bootstrap: int


@dataclass(frozen=True)
class _Parameters:
    """What is read of the parameters that an evaluation was made by."""

    seed: int
    evaluate: _Resampled


@dataclass(frozen=True)
class _Computed:
    """What is read of what stored features were computed in."""

    precision: str
    device: str


@dataclass(frozen=True)
class _Resolved:
    """What is read of what the answers were computed in; `features` is None where the images were read."""

    precision: str
    device: str
    processor: str
    attention: str
    features: _Computed | None


@dataclass(frozen=True)
class _Summary:
    """The content of summary.json."""

    reducer: str
    encoder: str
    vlm: str
    tokens_full: float
    scores: list[_Point]
    parameters: _Parameters
    provenance: dict[str, Any]
    resolved: _Resolved


@contextmanager
def made_by(stage: str) -> Iterator[None]:
    """Say of what is wrong with a file by which stage it is made."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error}; stage {stage} makes it") from None


def _masks(path: Path, stage: str) -> Masks | None:
    """The masks, None where no question was answered that pictures would be of."""
    content = read(path, stage)
    if content.get("grid") is None and not content.get("masks"):
        return None
    with made_by(stage):
        written = parse_record(_Written, content, str(path))
    rows, columns = written.grid
    for image, kept in written.masks.items():
        if not all(0 <= index < rows * columns for index in kept):
            raise ValueError(f"{path}: image {image} keeps patches outside the grid {rows} x {columns}")
    return Masks(written.grid, written.keep, written.masks)


def _curves(scores: list[dict[str, Any]]) -> dict[tuple[str, str], tuple[Score, ...]]:
    """Points of each benchmark and group by rising kept fraction; the order of the names is the file's."""
    curves: dict[tuple[str, str], tuple[Score, ...]] = {}
    for entry in sorted(map(_kept, scores), key=lambda entry: entry["keep"]):
        kind = "group" if "group" in entry else "benchmark"
        name, score = entry[kind], Score(*(entry[field.name] for field in fields(Score)))
        curves[kind, name] = (*curves.get((kind, name), ()), score)
    return curves


def _kept(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry of a summary with a kept fraction, the mean one where the count is adaptive."""
    if entry["keep"] is not None:
        return entry
    # Questions without image have no tokens, and lose none.
    return entry | {"keep": entry["tokens"] / entry["tokens_full"] if entry["tokens_full"] else 1.0}


def _rows(path: Path, stage: str) -> list[Row]:
    if not path.is_file():
        raise ValueError(f"{path} is missing; stage {stage} makes it")
    rows: dict[tuple[str, float | None, int | None], Row] = {}
    with made_by(stage):
        for number, row in enumerate(read_records(Row, path), start=1):
            if (place := (row.id, row.keep, row.seed)) in rows:
                raise ValueError(f"{path} line {number}: question {row.id} a second time")
            rows[place] = row
    return list(rows.values())


def _check_comparable(reference: Evaluation, other: Evaluation, folder: Path) -> None:
    """Raise ValueError where two reducers cannot stand in one table."""
    pair = f"{folder}: reducers {reference.reducer} and {other.reducer}"
    # Images differ in their tokens, so that means compare only over the same questions.
    same = _lost(reference) == _lost(other)
    wanted, found = (_conditions(each, with_tokens=same) for each in (reference, other))
    for key in wanted | found:
        if wanted.get(key) != found.get(key):
            values = f"{wanted.get(key)!r} and {found.get(key)!r}"
            raise ValueError(f"{pair} differ in {key}, {values}; run stage evaluate for both")
    if set(reference.curves) != set(other.curves):
        names = ", ".join(sorted(name for _, name in set(reference.curves) ^ set(other.curves)))
        raise ValueError(f"{pair} differ in what they were scored on: {names}; run stage evaluate for both")
    asked = {row.id: row.asked for row in reference.rows}
    for (keep, seed), rows in _runs(other).items():
        answered = {row.id: row.asked for row in rows}
        differing = sorted(id for id in {*asked, *answered} if asked.get(id) != answered.get(id))
        if differing:
            raise ValueError(
                f"{pair} were asked different questions at kept fraction {keep}, seed {seed}: "
                f"{differing[0]} and {len(differing) - 1} more; run stage evaluate for both"
            )


def _conditions(evaluation: Evaluation, with_tokens: bool) -> dict[str, Any]:
    """What two results must share, by name; a setting that one is older than is None."""
    asked = evaluation.parameters
    settings = {f"{section}.{key}": asked.get(section, {}).get(key) for section, key in SETTINGS}
    resolved = {
        f"resolved.{key}": value for key, value in flat(evaluation.resolved).items() if key not in MACHINE
    }
    source = {"what was read": "images" if evaluation.resolved["features"] is None else "stored features"}
    # Last, as the settings change it: where both differ, the setting is the reason.
    tokens = {"tokens_full": evaluation.tokens_full} if with_tokens else {}
    return {"encoder": evaluation.encoder, "vlm": evaluation.vlm} | settings | source | resolved | tokens


def flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of nested dicts by dotted key."""
    values: dict[str, Any] = {}
    for key, value in nested.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return values


def _lost(evaluation: Evaluation) -> set[str]:
    """The questions that are not answered at all."""
    rows = evaluation.rows
    return {row.id for row in rows} - {row.id for row in rows if row.score is not None}


def _runs(evaluation: Evaluation) -> dict[tuple[float | None, int | None], list[Row]]:
    """The rows of each pass over the questions: one per kept fraction and seed."""
    runs: dict[tuple[float | None, int | None], list[Row]] = {}
    for row in evaluation.rows:
        runs.setdefault((row.keep, row.seed), []).append(row)
    return runs
