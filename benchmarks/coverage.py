"""Time and memory of coverage, `Scope` over cosines, against all gains of the whole matrix in every step.

Prints milliseconds per image of both in turns, and the median of their ratios, by wall-clock and CPU time.
The tokens are noise around shared means, the weights uniform. Memory is that of torch's tensors.

    python -m benchmarks.coverage
    python -m benchmarks.coverage --tokens 2928 --keep 0.1 --rounds 1
"""

from argparse import ArgumentParser
from collections.abc import Sequence
from functools import partial
from statistics import median

import torch
from torch import Tensor

from atr.core.timing import device_name
from atr.core.tokens import budget
from atr.reduction import EncoderOutput
from atr.reduction.coverage import Scope, full_order_BK
from atr.reduction.similarity import grid_units
from benchmarks.memory import peak
from benchmarks.timing import alternate, time_call

COLUMNS = "{:>6}{:>6}{:>6}{:>12}{:>12}{:>10}{:>10}{:>12}{:>12}"


def make_input(tokens: int, width: int, images: int) -> EncoderOutput:
    """Tokens around as many means as a sixteenth of them, and uniform attention."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(max(1, tokens // 16), width, generator=generator)
    of_token = torch.randint(len(means), (images, tokens), generator=generator)
    noise = torch.randn(images, tokens, width, generator=generator)
    return EncoderOutput(
        means[of_token] + 0.7 * noise, None, attention_BN=torch.rand(images, tokens, generator=generator)
    )


def order_plainly(encoded: EncoderOutput, k: int) -> Tensor:
    """The order of all images at once."""
    units_BND = grid_units(encoded.features_BND)
    cosines_BNN = (units_BND @ units_BND.mT * 2.0**36).round() / 2.0**36
    return full_order_BK(cosines_BNN, encoded.require("attention_BN").double(), k)


def cover(encoded: EncoderOutput, k: int) -> Tensor:
    """As a reducer that has cached nothing."""
    return Scope()(encoded, k)


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> None:
    """Print one table."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", nargs="+", type=int, default=[144, 576, 729], help="of an image")
    parser.add_argument("--keep", nargs="+", type=float, default=[0.1, 0.5], help="kept fractions")
    parser.add_argument("--width", type=int, default=1024, help="width of a token")
    parser.add_argument("--batch", nargs="+", type=int, default=[1], help="images per batch")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    print(f"{device_name(torch.device('cpu'))}, width {options.width}")
    header = "N", "B", "K", "plain ms", "ms/image", "ratio", "CPU", "plain MiB", "MiB"
    print(COLUMNS.format(*header))
    for tokens in options.tokens:
        for images in options.batch:
            encoded = make_input(tokens, options.width, images)
            sizes = [peak(partial(call, encoded, 1)) / 2**20 for call in (order_plainly, cover)]
            for fraction in options.keep:
                count = budget(fraction, tokens)
                calls = (partial(call, encoded, count) for call in (order_plainly, cover))
                sides = alternate([partial(time_call, call) for call in calls], options.rounds)
                times = (1000 / images * median(time.wall for time in side) for side in sides)
                ratios = (median(b[kind] / a[kind] for a, b in zip(*sides, strict=True)) for kind in (0, 1))
                texts = [f"{time:.2f}" for time in times] + [f"{ratio:.3f}" for ratio in ratios]
                row = COLUMNS.format(tokens, images, count, *texts, *(f"{size:.1f}" for size in sizes))
                print(row, flush=True)


if __name__ == "__main__":
    main()
