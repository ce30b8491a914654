"""Stage latency: measure how long one reducer takes to select tokens."""

from functools import partial
from typing import Any

from atr import config
from atr.core import catalog
from atr.core.serving import serves
from atr.stages import LATENCY, NO_BUDGET, entry_of_reducer, weights_of, write_results
from atr.stages.prefill import load_model

NOT_TIMED = {"device": "", "entries": [], "resolved": {}}


def main(params: config.Params, reducer: str) -> None:
    """Time one reducer at every `latency.kept` and `latency.batches`; write its metrics.json."""
    from atr.core import tracking

    source = params, tracking.current_provenance()
    write = partial(write_results, LATENCY, *source, reducer)
    if left_out := _why_left_out(reducer):
        write(**NOT_TIMED, left_out=left_out)
        return

    with tracking.run("latency", params, part=reducer) as run:
        for entry in write(**NOT_TIMED | _time(params, reducer))["entries"]:
            name = f"{reducer}/batch {entry['batch']}/milliseconds"
            run.metrics({name: entry["milliseconds"]}, entry["kept"])
        run.artifact(LATENCY / reducer)


def _why_left_out(reducer: str) -> str:
    """Why there is nothing to time, found without loading a model; empty if there is."""
    if catalog.reducer_traits(reducer).budget != "asked":
        return NO_BUDGET

    from atr.reduction.registry import why_not_selecting

    return why_not_selecting(reducer)


def _time(params: config.Params, reducer: str) -> dict[str, Any]:
    """The times of a reducer, or why it cannot serve the model."""
    from atr.reduction import SelectorReducer
    from atr.reduction.registry import build_reducer
    from atr.vlm import latency
    from atr.vlm.compatibility import check_selector, is_ruled
    from atr.vlm.reduce import layer_of

    model, processor, machine = load_model(params)
    settings = params.latency
    batches = [latency.make_noise(model, processor, batch, params.seed) for batch in settings.batches]
    if is_ruled(model) and (left_out := serves(reducer, model.config.model_type, batches[0].is_cut)):
        return {"left_out": left_out}
    with model.device:
        built: Any = build_reducer(reducer, 0, weights_of(reducer))
    if isinstance(built, SelectorReducer):
        check_selector(model, built.selector)
    layer = layer_of(model, built)
    entries = [
        {"reducer": reducer, **entry}
        for images in batches
        for entry in latency.time_selection(images, built, settings.kept, settings.seconds, layer)
    ]
    return {**machine, "entries": entries, "left_out": ""}


if __name__ == "__main__":
    entry_of_reducer("latency", main)
