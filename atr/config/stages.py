"""The sections of params.yaml, the stages that declare them, and the rules between sections.

Looked up by name and imported by no stage, so that a new stage or section reruns no other. dvc.yaml repeats
what a stage declares here, as DVC needs it there; tests/test_architecture.py checks that the two agree.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from atr.config.common import Common
from atr.config.distill import Distill
from atr.config.errors import OUT_OF_RANGE, failure, join
from atr.config.evaluate import Evaluate
from atr.config.extract import Extract
from atr.config.intrinsic import Intrinsic
from atr.config.latency import Latency
from atr.config.loader import ParameterFile
from atr.config.prepare import Prepare
from atr.config.presets import EncoderPreset, VlmPreset, is_known, resolve_encoder, resolve_vlm
from atr.config.pretrain import Pretrain
from atr.config.report import Report
from atr.config.robustness import Robustness
from atr.config.trainer import Trainer
from atr.core.serving import serves

STAGES = {
    "benchmark": (),
    "models": ("encoder", "vlm", "min_pixels", "max_pixels"),
    "prepare": ("seed", "prepare"),
    "extract": ("encoder", "trainer", "extract"),
    "pretrain": ("seed", "encoder", "trainer", "pretrain", "evaluate.positions"),
    "distill": ("seed", "encoder", "vlm", "trainer", "distill", "evaluate.positions"),
    "evaluate": (
        "seed",
        "encoder",
        "vlm",
        "trainer",
        "evaluate.keep",
        "evaluate.random_seeds",
        "evaluate.positions",
        "evaluate.budget",
        "evaluate.newline",
        "evaluate.interpolation",
        "evaluate.batch_tokens",
        "evaluate.share_prefix",
        "evaluate.max_new_tokens",
        "evaluate.bootstrap",
    ),
    "reconstructor": (
        "seed",
        "encoder",
        "trainer",
        "pretrain",
        "intrinsic.pretrain_images",
        "intrinsic.epochs",
        "intrinsic.training_seeds",
    ),
    "intrinsic": (
        "encoder",
        "trainer.accelerator",
        "evaluate.keep",
        "evaluate.random_seeds",
        "intrinsic.images",
        "intrinsic.batch_size",
        "intrinsic.overlap_keep",
    ),
    "prefill": ("seed", "encoder", "vlm", "trainer", "latency"),
    "latency": ("seed", "encoder", "vlm", "trainer", "latency"),
    "robustness": (
        "seed",
        "encoder",
        "vlm",
        "trainer.accelerator",
        "evaluate.budget",
        "evaluate.newline",
        "evaluate.interpolation",
        "evaluate.batch_tokens",
        "evaluate.share_prefix",
        "evaluate.max_new_tokens",
        "evaluate.bootstrap",
        "robustness",
    ),
    "report": ("evaluate", "report"),
}
"""The parameters that each stage declares to DVC, and the only ones it gets; a dotted key is one field."""

SECTIONS = {
    "trainer": Trainer,
    "prepare": Prepare,
    "extract": Extract,
    "pretrain": Pretrain,
    "distill": Distill,
    "evaluate": Evaluate,
    "intrinsic": Intrinsic,
    "latency": Latency,
    "robustness": Robustness,
    "report": Report,
}
"""The sections of params.yaml, in the order of the file."""


def serving(names: Iterable[str], vlm: VlmPreset) -> list[str]:
    """The reducers that can serve a model, as far as its preset says what it is."""
    return [name for name in names if not _why_not(name, vlm)]


def _why_not(reducer: str, vlm: VlmPreset) -> str:
    return serves(reducer, vlm.model_type or vlm.name, vlm.tiles > 1)


def _resolve(values: dict[str, Any]) -> dict[str, Any]:
    encoder = resolve_encoder(values["encoder"])
    vlm = resolve_vlm(values["vlm"], encoder)
    _check_layer(encoder, values["extract"].layer)
    _check_width(encoder, values)
    encoder, vlm = bound_pixels(encoder, vlm, values["min_pixels"], values["max_pixels"])
    _check_reducers(vlm, values["evaluate"], values["report"])
    return values | {"encoder": encoder, "vlm": vlm}


def bound_pixels(
    encoder: EncoderPreset, vlm: VlmPreset, least: int | None, most: int | None
) -> tuple[EncoderPreset, VlmPreset]:
    """Both presets with the bounds of an image's area that are given; refuses bounds that cannot be met."""
    asked = {"min_pixels": least, "max_pixels": most}
    given: dict[str, Any] = {key: area for key, area in asked.items() if area is not None}
    for key, value in given.items():
        if is_known(encoder) and encoder.max_pixels is None:
            raise failure(key, value, OUT_OF_RANGE, f"null, as {encoder.name} sets the size of images itself")
    encoder, vlm = replace(encoder, **given), replace(vlm, **given)
    least, most = encoder.min_pixels, encoder.max_pixels
    if least is not None and most is not None and least > most:
        raise failure("min_pixels", least, OUT_OF_RANGE, f"at most max_pixels, {most}")
    return encoder, vlm


def _check_layer(encoder: EncoderPreset, layer: int | str | None) -> None:
    """Refuse merged tokens of an encoder that is known to merge none."""
    if layer == "merged" and is_known(encoder) and encoder.layer != "merged":
        allowed = f"null or an index, as {encoder.name} merges no patches"
        raise failure("extract.layer", layer, OUT_OF_RANGE, allowed)


def _check_width(encoder: EncoderPreset, sections: Mapping[str, Any]) -> None:
    """Refuse selectors that do not fit the features' width, where it is known."""
    width = encoder.width_at(sections["extract"].layer)
    if width is None:
        return
    for name in ("pretrain", "distill"):
        heads, position = sections[name].heads, sections[name].position
        if width % heads:
            allowed = f"a divisor of {width}, the width of {encoder.name}"
            raise failure(f"{name}.heads", heads, OUT_OF_RANGE, allowed)
        if position != "none" and width % 4:
            allowed = f"none, as 4 does not divide {width}"
            raise failure(f"{name}.position", position, OUT_OF_RANGE, allowed)


def _check_reducers(vlm: VlmPreset, evaluate: Evaluate, report: Report) -> None:
    """Refuse reducers that cannot serve the model, and a `report.best` that is not evaluated."""
    for key in ("reducers", "own", "selectors", "distilled"):
        names = getattr(evaluate, key)
        if (able := serving(names, vlm)) != names:
            refused = next(name for name in names if name not in able)
            allowed = f"{join(able)}, as {refused} {_why_not(refused, vlm)}"
            raise failure(f"evaluate.{key}", names, OUT_OF_RANGE, allowed)
    if report.best not in evaluate.budgeted:
        raise failure("report.best", report.best, OUT_OF_RANGE, join(evaluate.budgeted))


PIPELINE = ParameterFile("params.yaml", Common, SECTIONS, STAGES, _resolve)
