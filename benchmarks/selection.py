"""Time of every reducer for N tokens and K kept tokens, on synthetic features.

Prints milliseconds per image, and their ratios to the paper's selector and to one product of an image's
features with themselves, (N, D) x (D, N): ratios carry over to other machines better than milliseconds.
Shapes: see atr.core.tokens.
"""

import tempfile
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import fields, replace
from functools import partial

import torch
from torch import Tensor

from atr.core.timing import device_name, milliseconds
from atr.core.tokens import budget
from atr.reduction import EncoderOutput, FeatureSelector, Merger, Reducer
from atr.reduction.layer_schedule import LayerReducer
from atr.reduction.registry import build_reducer, built_in_names, placeholder

PATCH = 14
COLUMNS = "{:<20}{:>8}{:>8}{:>12}{:>12}{:>12}"


def make_input(side: int, width: int, images: int, device: torch.device) -> EncoderOutput:
    """Random values in every tensor field of EncoderOutput, of the shape in its suffix; a square grid."""
    generator, tokens = torch.Generator().manual_seed(0), side * side
    shapes = {
        "BN": (images, tokens),
        "BND": (images, tokens, width),
        "BD": (images, width),
        "BCHW": (images, 3, side * PATCH, side * PATCH),
    }
    names = [field.name for field in fields(EncoderOutput)]
    suffixes = {name: name.rpartition("_")[2] for name in names}
    values: dict[str, Tensor] = {
        name: torch.rand(shapes[suffix], generator=generator).to(device)
        for name, suffix in suffixes.items()
        if suffix in shapes
    }
    return EncoderOutput(**values, grid=(side, side), encode=lambda pixels_BCHW: values["features_BND"])


def select(reducer: Reducer, encoded: EncoderOutput, count: int) -> object:
    """Select from a new EncoderOutput, as some reducers cache the scores of the last one."""
    encoded = replace(encoded)
    return reducer.merge(encoded, count) if isinstance(reducer, Merger) else reducer(encoded, count)


def time_reducers(
    names: Sequence[str], side: int, width: int, keep: Sequence[float], images: int, seconds: float,
    device: torch.device,
) -> Iterator[tuple[str, int, int, float, float, float]]:  # fmt: skip
    """Name, N, K, milliseconds per image, and their ratios to the selector's and to the product's."""
    encoded = make_input(side, width, images, device)
    features_BND = encoded.features_BND
    product = milliseconds(lambda: features_BND @ features_BND.mT, seconds)
    # Loading from the hub prints.
    with tempfile.TemporaryDirectory() as folder, device, redirect_stdout(None):
        FeatureSelector(width, (side, side), heads=width // 64).save_pretrained(folder)
        reducers = {name: build_reducer(name, 0, folder) for name in ("selector", *names)}
    for fraction in keep:
        count = budget(fraction, encoded.tokens)
        times = {
            name: milliseconds(partial(select, reducer, encoded, count), seconds)
            for name, reducer in reducers.items()
        }
        for name, time in times.items():
            yield name, encoded.tokens, count, time / images, time / times["selector"], time / product


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> None:
    """Print one table."""
    built = {name: build_reducer(name, 0, placeholder()) for name in built_in_names()}
    before = {name for name, reducer in built.items() if not isinstance(reducer, LayerReducer)}
    choices = sorted(before - {"full", "none", "selector"})
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--reducers", nargs="*", choices=choices, default=choices)
    parser.add_argument("--sides", nargs="+", type=int, default=[12, 24], help="rows (= columns) of the grid")
    parser.add_argument("--width", type=int, default=1024, help="width of a feature, a multiple of 64")
    parser.add_argument("--keep", nargs="+", type=float, default=[0.1, 0.5], help="kept fractions")
    parser.add_argument("--batch", type=int, default=1, help="images per batch")
    parser.add_argument("--seconds", type=float, default=0.5, help="least duration of each measurement")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    print(f"{device_name(options.device)}, width {options.width}, batch {options.batch}")
    print(COLUMNS.format("reducer", "N", "K", "ms/image", "x selector", "x product"))
    for side in options.sides:
        settings = side, options.width, options.keep, options.batch, options.seconds, options.device
        for name, tokens, kept, *times in time_reducers(options.reducers, *settings):
            print(COLUMNS.format(name, tokens, kept, *(f"{time:.3f}" for time in times)))


if __name__ == "__main__":
    main()
