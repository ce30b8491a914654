"""Stage latency: the time that selection takes, next to the prefill that it saves."""

from functools import partial
from typing import Any

from atr import config
from atr.core.files import write_json
from atr.stages import ENCODERS, LATENCY, entry, weights_of


def main(params: config.Params) -> None:
    """Time each reducer that chooses before the language model, and that model, at a few budgets."""
    from atr.core import tracking

    with tracking.run("latency", params) as run:
        from lightning.fabric import Fabric

        from atr.core.hardware import precision_of, resolved
        from atr.core.timing import device_name
        from atr.features.wheel_weights import resolve_weights
        from atr.vlm.checkpoint import load_vlm, version_of, weight_dtype

        precision = precision_of(params.trainer)
        device = Fabric(accelerator=params.trainer.accelerator, devices=1).device
        tower = partial(resolve_weights, folder=ENCODERS)
        model, _ = load_vlm(params.vlm.path, weight_dtype(precision), resolve_weights=tower)
        times = _times(params, model.to(device))
        computed = resolved(precision, device) | {"vlm": version_of(params.vlm.path, model, tower)}
        about = {
            "parameters": params.raw(),
            "provenance": tracking.current_provenance(),
            "resolved": computed,
        }
        write_json(
            LATENCY / "metrics.json", {"device": f"{device_name(device)}, {precision}", **times, **about}
        )
        for spent in times["entries"]:
            name = f"{spent['reducer']}/batch {spent['batch']}"
            run.metrics({f"{name}/milliseconds": spent["milliseconds"]}, spent["kept"])
        for spent in times["prefill"]:
            name = f"prefill/batch {spent['batch']}"
            run.metrics({f"{name}/milliseconds": spent["milliseconds"]}, spent["tokens"])
        run.artifact(LATENCY / "metrics.json")


def _times(params: config.Params, model: Any) -> dict[str, list[dict[str, Any]]]:
    from atr.reduction import REDUCERS, SelectorReducer
    from atr.vlm import latency
    from atr.vlm.checkpoint import check_selector

    asked = params.latency
    with model.device:
        known = [name for name in params.evaluate.budgeted if name in REDUCERS]
        reducers = {name: REDUCERS[name](0, weights_of(name)) for name in known}
    for reducer in reducers.values():
        if isinstance(reducer, SelectorReducer):
            check_selector(model, reducer.selector)
    entries: list[dict[str, Any]] = []
    prefill: list[dict[str, Any]] = []
    for batch in asked.batches:
        pixels_BCHW = latency.noise(model, batch, params.seed)
        entries += latency.selection(model, reducers, asked.kept, pixels_BCHW, asked.seconds)
        counts = {entries[-1]["tokens"], *(entry["kept"] for entry in entries)}
        prefill += [latency.prefill(model, count, batch, asked.seconds) for count in sorted(counts)]
    return {"entries": entries, "prefill": prefill}


if __name__ == "__main__":
    entry("latency", main)
