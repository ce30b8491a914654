"""Reads the files of stages evaluate and pretrain, and checks that their results are comparable."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atr.core.answer_files import AnswerLine, read_lines
from atr.core.catalog import reducer_traits
from atr.core.files import plain_name
from atr.core.layout import LAYOUT
from atr.core.records import Row
from atr.core.typed_json import parse_record, short
from atr.reporting.cells import (
    Provenance,
    naming_stage,
    part_name,
    read_object,
    resolved_conditions,
)
from atr.reporting.results import Evaluation, Masks, Pretraining, Results, ScorePoint

REQUIRED = ("full", "selector")
"""Reducers that the report cannot do without."""
SETTINGS = (*LAYOUT, "max_new_tokens")
"""Keys of the section `evaluate` that change the answers of any reducer; comparable results share them."""


def load_results(evaluate: Path, pretrain: Path, reducers: Collection[str]) -> Results:
    """Read the folder under `evaluate` of each of `reducers`, and the metrics of the pretraining.

    Other folders are ignored, as they may be stale. Raises ValueError
    - if one of REQUIRED is not among the reducers;
    - naming the file and its stage, if a file is missing or broken;
    - if two reducers answered different questions, with another model, SETTINGS or precision, or if one lacks
      a benchmark that the other has.
    """
    if lacking := [name for name in REQUIRED if name not in reducers]:
        raise ValueError(f"evaluate.reducers: the report needs {', '.join(lacking)} among them")
    evaluations = {name: _read_evaluation(name, evaluate / name) for name in sorted(reducers)}
    for name in evaluations:
        _check_comparable(evaluations["full"], evaluations[name], evaluate)
    results = Results(evaluations, _read_pretraining(pretrain))
    if not results.groups or not results.shared:
        names = " and ".join(results.leading)
        raise ValueError(f"{evaluate}: no kept fraction has scores of {names}; run stage evaluate")
    return results


def _read_pretraining(path: Path) -> Pretraining:
    content = read_object(path, "pretrain")
    with naming_stage("pretrain"):
        return parse_record(Pretraining, content, str(path))


def _read_evaluation(reducer: str, folder: Path) -> Evaluation:
    stage, path = f"evaluate (reducer {reducer})", folder / "summary.json"
    content = read_object(path, stage)
    with naming_stage(stage):
        summary = parse_record(_Summary, content, str(path))
        if summary.reducer != reducer:
            raise ValueError(f"{path}: reducer: {short(summary.reducer)} is not allowed, allowed: {reducer}")
    budget = reducer_traits(reducer).budget
    return Evaluation(
        reducer=reducer,
        budget=budget,
        encoder=summary.encoder,
        vlm=summary.vlm,
        tokens_full=summary.tokens_full,
        curves=_curves(summary.scores),
        rows=_read_rows(folder / "results.jsonl", stage),
        masks=_read_masks(folder / "masks.json", stage) if budget in ("asked", "own") else None,
        resamples=summary.parameters.evaluate.bootstrap,
        seed=summary.parameters.seed,
        parameters=content["parameters"],
        provenance=summary.provenance,
        resolved=content["resolved"],
    )


@dataclass(frozen=True)
class _StoredMasks:
    """The content of masks.json."""

    keep: float | None
    masks: dict[str, list[int]]
    grid: tuple[int, int] | None = None
    grids: dict[str, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if missing := sorted(set(self.masks) - set(self.grids)) if self.grid is None else []:
            raise ValueError(f"grids: {missing[0]} is missing, allowed: one per image, or one grid for all")


@dataclass(frozen=True)
class _ScoreEntry:
    """One entry of a summary's scores, as far as the report reads it."""

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
        plain_name(self.group) if self.group else part_name(self.benchmark)

    @property
    def of(self) -> tuple[str, str]:
        """Kind (benchmark or group) and name of what the score belongs to."""
        return ("group", self.group) if self.group else ("benchmark", self.benchmark)

    @property
    def point(self) -> ScorePoint:
        """The entry as a point of a curve."""
        if self.keep is not None:
            keep = self.keep
        else:  # questions without an image have no tokens to lose
            keep = self.tokens / self.tokens_full if self.tokens_full else 1.0
        return ScorePoint(keep, self.tokens, self.tokens_fed, self.mean, self.low, self.high)


@dataclass(frozen=True)
class _EvaluateSection:
    bootstrap: int


@dataclass(frozen=True)
class _Parameters:
    seed: int
    evaluate: _EvaluateSection


@dataclass(frozen=True)
class _Features:
    precision: str
    device: str


@dataclass(frozen=True)
class _Resolved:
    precision: str
    device: str
    processor: str
    attention: str
    features: _Features | None
    """None if the images themselves were encoded."""


@dataclass(frozen=True)
class _Summary:
    """The content of summary.json, as far as the report reads it."""

    reducer: str
    encoder: str
    vlm: str
    tokens_full: float
    scores: list[_ScoreEntry]
    parameters: _Parameters
    provenance: Provenance
    resolved: _Resolved


def _curves(scores: Sequence[_ScoreEntry]) -> dict[tuple[str, str], tuple[ScorePoint, ...]]:
    """The points of each benchmark and group by rising kept fraction."""
    curves: dict[tuple[str, str], tuple[ScorePoint, ...]] = {}
    for entry in sorted(scores, key=lambda entry: entry.point.keep):
        curves[entry.of] = (*curves.get(entry.of, ()), entry.point)
    return curves


def _read_masks(path: Path, stage: str) -> Masks | None:
    """The stored masks, None if no question with a picture was answered."""
    content = read_object(path, stage)
    if content.get("grid") is None and not content.get("masks"):
        return None
    with naming_stage(stage):
        stored = parse_record(_StoredMasks, content, str(path))
        masks = Masks(stored.grid, stored.keep, stored.masks, stored.grids)
        for image, kept in masks.kept.items():
            rows, columns = masks.grid_of(image)
            if not all(0 <= index < rows * columns for index in kept):
                raise ValueError(f"{path}: image {image} keeps patches outside the grid {rows} x {columns}")
    return masks


def _read_rows(path: Path, stage: str) -> list[Row]:
    rows: list[Row] = []
    with naming_stage(stage):
        for where, line in read_lines(path):
            _check_names(line, where)
            rows += line.rows
    return rows


def _check_names(line: AnswerLine, where: str) -> None:
    try:
        part_name(line.benchmark)
        plain_name(line.group)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _check_comparable(reference: Evaluation, other: Evaluation, folder: Path) -> None:
    """Raise ValueError if the results of two reducers are not comparable."""
    pair = f"{folder}: reducers {reference.reducer} and {other.reducer}"
    # Numbers of tokens differ from image to image, so their means compare only over the same questions.
    same = _never_answered(reference) == _never_answered(other)
    expected, conditions = (_conditions(one, with_tokens=same) for one in (reference, other))
    for key in expected | conditions:
        if expected.get(key) != conditions.get(key):
            values = f"{short(expected.get(key))} and {short(conditions.get(key))}"
            raise ValueError(f"{pair} differ in {key}, {values}; run stage evaluate for both")
    if set(reference.curves) != set(other.curves):
        names = ", ".join(sorted(name for _, name in set(reference.curves) ^ set(other.curves)))
        raise ValueError(f"{pair} differ in the benchmarks with scores: {names}; run stage evaluate for both")
    _check_questions(reference, other, pair)


def _check_questions(reference: Evaluation, other: Evaluation, pair: str) -> None:
    expected = {row.id: _question(row) for row in reference.rows}
    for (keep, seed), rows in _runs(other).items():
        questions = {row.id: _question(row) for row in rows}
        differing = sorted(id for id in expected | questions if expected.get(id) != questions.get(id))
        if differing:
            raise ValueError(
                f"{pair} answered different questions at kept fraction {keep}, seed {seed}: "
                f"{differing[0]} and {len(differing) - 1} more; run stage evaluate for both"
            )


def _question(row: Row) -> tuple[str, ...]:
    """The question without its answer."""
    return row.benchmark, row.group, row.image, row.question, row.answer


def _conditions(evaluation: Evaluation, with_tokens: bool) -> dict[str, Any]:
    """What comparable results share, by key; None for a setting newer than the result."""
    section = evaluation.parameters["evaluate"]
    settings = {f"evaluate.{key}": section.get(key) for key in SETTINGS}
    source = {"what was read": "images" if evaluation.resolved["features"] is None else "stored features"}
    # Last, because settings change it: if both differ, the setting is reported as the reason.
    tokens = {"tokens_full": evaluation.tokens_full} if with_tokens else {}
    model = {"encoder": evaluation.encoder, "vlm": evaluation.vlm}
    return model | settings | source | resolved_conditions(evaluation.resolved) | tokens


def _never_answered(evaluation: Evaluation) -> set[str]:
    rows = evaluation.rows
    return {row.id for row in rows} - {row.id for row in rows if row.score is not None}


def _runs(evaluation: Evaluation) -> dict[tuple[float | None, int | None], list[Row]]:
    """The rows of each kept fraction and seed."""
    runs: dict[tuple[float | None, int | None], list[Row]] = {}
    for row in evaluation.rows:
        runs.setdefault((row.keep, row.seed), []).append(row)
    return runs
