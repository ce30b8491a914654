"""A pretraining step on images with grids of their own, relative to one on images of one grid.

Both have equally many images and tokens; grids differ in their columns, from a quarter of the mean to seven
quarters. A second row takes the ragged images one at a time, as a training without ragged batches would.
Times are those of forward, loss and backward. Shapes: see atr.core.tokens.
"""

from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from atr.core.ragged import Grid, RaggedFeatures, RaggedGrids
from atr.core.timing import device_name
from atr.reduction.autoencoder import FeatureAutoencoder
from atr.reduction.losses import at_least, kept_fraction, reconstruction_loss
from benchmarks.timing import Seconds, alternate, ratio_text, time_call

KEEP, TEMPERATURE = 0.45, 1.0


def spread_grids(images: int, side: int) -> list[Grid]:
    """Grids of `side` rows whose columns are spread evenly around `side`, which is their mean."""
    half = images // 2
    offsets = [round(0.75 * side * (place + 1) / half) for place in range(half)]
    columns = [side + offset for offset in offsets] + [side - offset for offset in offsets]
    return [(side, count) for count in columns + [side] * (images % 2)]


def step(net: FeatureAutoencoder, features_BND: Tensor, grids: RaggedGrids | None) -> None:
    """Forward, loss and backward of a batch."""
    restored_BND, mask_BN = net(features_BND, TEMPERATURE, None, grids)
    variance = net.selector.standardise.variance
    reconstruction = reconstruction_loss("variance", restored_BND, features_BND, variance, grids)
    (reconstruction + at_least(kept_fraction(mask_BN, grids), KEEP)).backward()
    if features_BND.is_cuda:
        torch.cuda.synchronize(features_BND.device)


def sides(images: int, side: int, width: int, device: torch.device) -> dict[str, Callable[[], None]]:
    """The steps that are compared, by name, the rectangular one first."""
    torch.manual_seed(0)
    net = FeatureAutoencoder(width, (side, side)).to(device)
    rectangular_BND = torch.randn(images, side * side, width, device=device)
    grids = spread_grids(images, side)
    ragged = RaggedFeatures.of((torch.randn(r * c, width, device=device), (r, c)) for r, c in grids)
    singles = [
        (part, RaggedGrids((grid,)))
        for part, grid in zip(ragged.grids.split(ragged.features_1TD), grids, strict=True)
    ]

    def one_at_a_time() -> None:
        for features_1ND, grid in singles:
            step(net, features_1ND, grid)

    return {
        "rectangular": partial(step, net, rectangular_BND, None),
        "ragged": partial(step, net, ragged.features_1TD, ragged.grids),
        "one at a time": one_at_a_time,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one line per ratio."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=16, help="images of a batch")
    parser.add_argument("--side", type=int, default=12, help="rows and mean columns of the grids")
    parser.add_argument("--width", type=int, default=192, help="channels of a feature")
    parser.add_argument("--rounds", type=int, default=9, help="measurements of each step")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    compared = sides(options.images, options.side, options.width, options.device)
    timed: list[Callable[[], Seconds]] = [partial(time_call, run) for run in compared.values()]
    alternate(timed, 1)  # warm-up
    rectangular, *others = alternate(timed, options.rounds)
    print(device_name(options.device))
    for name, seconds in zip(list(compared)[1:], others, strict=True):
        print(f"{name} / rectangular: {ratio_text(seconds, rectangular)}", flush=True)


if __name__ == "__main__":
    main()
