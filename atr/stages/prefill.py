"""Stage prefill: measure the language model's prefill time, which fewer visual tokens shorten."""

from functools import partial
from typing import Any

from atr import config
from atr.core.files import write_json
from atr.stages import ENCODER_FOLDER, PREFILL, entry


def main(params: config.Params) -> None:
    """Time the prefill of all tokens of an image and of every `latency.kept`; write metrics.json."""
    from atr.core import tracking

    with tracking.run("prefill", params) as run:
        from atr.core.tokens import budget
        from atr.vlm import latency

        model, processor, machine = load_model(params)
        settings = params.latency
        tokens = latency.make_noise(model, processor, 1, params.seed).tokens
        counts = sorted({tokens, *(budget(kept, tokens) for kept in settings.kept)})
        times = [
            latency.time_prefill(model, count, batch, settings.seconds)
            for batch in settings.batches
            for count in counts
        ]
        source = {"parameters": params.raw(), "provenance": tracking.current_provenance()}
        write_json(PREFILL / "metrics.json", {**machine, "prefill": times, **source})
        for entry in times:
            run.metrics({f"batch {entry['batch']}/milliseconds": entry["milliseconds"]}, entry["tokens"])
        run.artifact(PREFILL)


def load_model(params: config.Params) -> tuple[Any, Any, dict[str, Any]]:
    """Model and processor, and the record of both and of the device.

    The model is on the first device, in the trainer's precision.
    """
    from atr.core.hardware import first_device, precision_of, resolved
    from atr.core.timing import device_name
    from atr.features.pixel_bounds import bound_area
    from atr.features.wheel_weights import resolve_weights
    from atr.vlm.checkpoint import load_vlm, version_of, weight_dtype

    precision = precision_of(params.trainer)
    device = first_device(params.trainer.accelerator)
    tower = partial(resolve_weights, folder=ENCODER_FOLDER)
    model, processor = load_vlm(params.vlm.path, weight_dtype(precision), resolve_weights=tower)
    bound_area(processor.image_processor, params.vlm.min_pixels, params.vlm.max_pixels, params.vlm.path)
    computed = resolved(precision, device) | {"vlm": version_of(params.vlm.path, model, tower)}
    machine = {"device": f"{device_name(device)}, {precision}", "resolved": computed}
    return model.to(device), processor, machine


if __name__ == "__main__":
    entry("prefill", main)
