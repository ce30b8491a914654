"""Step micro_selectors, `make micro-selectors`: ships the trained selectors beside the micro model."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atr import stages
from atr.core.files import read_json, sha256, whole_folder
from atr.micro.params import MicroParams, load_micro_or_exit

if TYPE_CHECKING:
    from atr.reduction import FeatureSelector

MICRO_MODEL = Path("data/micro/llava")
SHIPPED_SELECTORS = Path("data/micro/selectors")
SELECTOR_SOURCES = {"selector": stages.PRETRAIN, "distilled": stages.DISTILL}
"""Folder of the stage that trains each selector; its `selector` and `metrics.json` are read."""


def main(params: MicroParams) -> None:
    """Write data/micro/selectors: each selector in bfloat16, with a card that has its held-out scores.

    Raises ValueError naming the file if a selector was not trained, or is not one for the micro model.
    """
    import torch

    from atr.core import tracking
    from atr.vlm.checkpoint import load_vlm

    with tracking.run("micro_selectors", params) as run:
        model, processor = load_vlm(str(MICRO_MODEL), torch.float32)
        with whole_folder(SHIPPED_SELECTORS) as folder:
            for name, trained in SELECTOR_SOURCES.items():
                selector = _rounded(trained)
                scores = _score(params, model, processor, selector)
                selector.note(scores=selector.record.get("scores", {}) | scores)
                _cast(selector, torch.bfloat16)
                selector.save_pretrained(folder / name)
                run.metrics({f"{name}/{score}": value for score, value in scores.items()})


def _rounded(trained: Path) -> "FeatureSelector":
    """A trained selector with the values of bfloat16 in float32, as it will be loaded, and its origin."""
    import torch

    from atr.reduction import FeatureSelector

    weights = trained / "selector" / "model.safetensors"
    selector = FeatureSelector.from_pretrained(weights.parent)
    for dtype in (torch.bfloat16, torch.float32):
        _cast(selector, dtype)
    provenance = read_json(trained / "metrics.json")["provenance"]
    selector.note(weights="bfloat16", rounded_from=sha256(weights), trained_by=provenance)
    return selector


def _cast(selector: "FeatureSelector", dtype: Any) -> None:
    """Cast the weights in place; the statistics of the features and the positions stay float32."""
    for weight in selector.trunk.parameters():
        weight.data = weight.data.to(dtype)


def _score(params: MicroParams, model: Any, processor: Any, selector: "FeatureSelector") -> dict[str, float]:
    """Exact match by benchmark on held-out questions, at the kept fraction of the parameters."""
    from atr.micro.scoring import score_benchmark
    from atr.micro.world import DRAW
    from atr.vlm.reduce import reduce

    keep, questions = params.micro_selectors.keep, params.micro_selectors.questions
    shorten = partial(reduce, model, reducer=selector, keep=keep)
    settings: dict[str, Any] = {"count": questions, "seed": params.seed, "shorten": shorten}
    return {
        f"exact_match_{keep:g}_{name}": score_benchmark(processor, model, name, "evaluate", **settings)
        for name in DRAW
    }


if __name__ == "__main__":
    stages.entry("micro_selectors", main, load_micro_or_exit)
