"""Stage latency: measure how long one reducer takes to select tokens."""

from typing import Any

from atr import config
from atr.core import catalog
from atr.core.files import write_json
from atr.stages import LATENCY, NO_BUDGET, entry_of_reducer, weights_of
from atr.stages.prefill import load_model


def main(params: config.Params, reducer: str) -> None:
    """Time one reducer at every `latency.kept` and `latency.batches`; write its metrics.json."""
    from atr.core import tracking

    with tracking.run("latency", params, part=reducer) as run:
        timed: dict[str, Any] = {"device": "", "entries": [], "left_out": NO_BUDGET, "resolved": {}}
        if catalog.reducer_traits(reducer).budget == "asked":
            timed = _time(params, reducer)
        source = {"parameters": params.raw(), "provenance": tracking.current_provenance()}
        write_json(LATENCY / reducer / "metrics.json", {"reducer": reducer, **timed, **source})
        for entry in timed["entries"]:
            name = f"{reducer}/batch {entry['batch']}/milliseconds"
            run.metrics({name: entry["milliseconds"]}, entry["kept"])
        run.artifact(LATENCY / reducer)


def _time(params: config.Params, reducer: str) -> dict[str, Any]:
    from atr.reduction import SelectorReducer
    from atr.reduction.layer_schedule import LayerReducer
    from atr.reduction.registry import build_reducer
    from atr.vlm import latency
    from atr.vlm.compatibility import check_selector

    model, machine = load_model(params)
    with model.device:
        built: Any = build_reducer(reducer, 0, weights_of(reducer))
    if isinstance(built, LayerReducer):
        left_out = "chooses between the layers of a language model"
        return {**machine, "entries": [], "left_out": left_out}
    if isinstance(built, SelectorReducer):
        check_selector(model, built.selector)
    settings = params.latency
    entries = [
        {"reducer": reducer, **entry}
        for batch in settings.batches
        for entry in latency.time_selection(
            model, built, settings.kept, latency.noise(model, batch, params.seed), settings.seconds
        )
    ]
    return {**machine, "entries": entries, "left_out": ""}


if __name__ == "__main__":
    entry_of_reducer("latency", main)
