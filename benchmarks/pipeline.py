"""Overhead of the framework, speed-up by reduction, and speed against another checkout, as ratios of times.

Rows that compare this checkout with bare loops and with itself, all of them by default:

- store: reading all images of a feature store in random order, relative to one plain safetensors file;
- step: a pretraining step under LightningModule and Trainer, relative to a plain loop;
- generate: the micro model's answers from a part of the visual tokens, relative to all of them.

Rows that compare it with another checkout, in turns, by wall and CPU time: `extract`, `pretrain`, `distill`,
`evaluate`, `import`, and `reproduce`, which takes as long as two runs of the pipeline a round:

    python -m benchmarks.pipeline distill evaluate --against ../other

Shapes: see atr.core.tokens; I images.
"""

import tempfile
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from atr.config import VLMS, Pretrain
from atr.core.timing import device_name, milliseconds
from atr.features.datamodule import FeatureDataModule
from atr.features.store import FeatureStore, ShardWriter, write_manifest
from atr.micro import world
from atr.reduction import FeatureSelector
from atr.reduction.autoencoder import FeatureAutoencoder
from atr.reduction.losses import at_least, kept_fraction, unexplained_variance
from atr.reduction.pretraining import AutoencoderTraining
from atr.vlm.checkpoint import load_vlm
from atr.vlm.reduce import reduce
from benchmarks import against

GRID, WIDTH, SHARD = (12, 12), 192, 256
OVERHEAD = ("store", "step", "generate")
"""Rows without another checkout."""
WARM = 5
"""Warm-up steps that are not counted."""


def write_store(folder: Path, images: int) -> Tensor:
    """Write a store of synthetic features, and return these features_IND."""
    generator = torch.Generator().manual_seed(0)
    features_IND = torch.randn(images, GRID[0] * GRID[1], WIDTH, generator=generator).bfloat16()
    writer = ShardWriter(folder, images, SHARD)
    for first in range(0, images, SHARD):
        part = features_IND[first : first + SHARD]
        writer.add(first, [str(first + place) for place in range(len(part))], part)
    encoder: dict[str, Any] = {"encoder": "synthetic", "layer": -1, "grid": GRID, "width": WIDTH}
    write_manifest(folder, **encoder, parameters={}, shards=writer.shards)
    return features_IND


def time_store(folder: Path, images: int, seconds: float) -> tuple[float, float]:
    """Milliseconds to read all images: from the store, and from one file."""
    plain = folder / "plain.safetensors"
    save_file({"features": write_store(folder, images)}, plain)
    order = torch.randperm(images, generator=torch.Generator().manual_seed(0)).tolist()

    def read_store() -> None:
        store = FeatureStore.open(folder, verify=False)
        for index in order:
            store[index].float()

    def read_file() -> None:
        with safe_open(plain, framework="pt") as file:
            features_IND = file.get_tensor("features")
        for index in order:
            features_IND[index].float()

    return milliseconds(read_store, seconds), milliseconds(read_file, seconds)


class Clock(Callback):
    """Records when each batch ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        """Record the time."""
        self.ends.append(time.perf_counter())


def median_step(ends: Sequence[float]) -> float:
    """Median milliseconds between the ends of consecutive steps, after the warm-up."""
    return 1000 * median(later - earlier for earlier, later in pairwise(ends[WARM:]))


def time_step(folder: Path, steps: int, device: torch.device) -> tuple[float, float]:
    """Milliseconds of a float32 training step: under Lightning, and in a plain loop."""
    settings = Pretrain(epochs=1, collapse_after=1.0)
    images = round((steps + 1) * settings.batch_size / (1 - settings.validation)) + 1
    write_store(folder, images)
    data = FeatureDataModule(
        FeatureStore.open(folder, verify=False), settings.batch_size, settings.validation, seed=0
    )
    return train_lightning(settings, data, device), median_step(list(train_plain(settings, data, device)))


def train_lightning(settings: Pretrain, data: FeatureDataModule, device: torch.device) -> float:
    """Milliseconds of a step as in stage pretrain, without MLflow, pictures and checkpoints."""
    clock = Clock()
    off: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = Trainer(
        accelerator=device.type, devices=1, max_epochs=1, callbacks=[clock], limit_val_batches=0,
        use_distributed_sampler=False, **off,
    )  # fmt: skip
    trainer.fit(AutoencoderTraining(FeatureAutoencoder(WIDTH, GRID), settings, seed=0), datamodule=data)
    return median_step(clock.ends)


def train_plain(settings: Pretrain, data: FeatureDataModule, device: torch.device) -> Iterator[float]:
    """End of each step in a plain loop with the same batches, loss and optimizer."""
    net = FeatureAutoencoder(WIDTH, GRID).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=settings.learning_rate)
    for features_BND in data.train_dataloader():
        features_BND = features_BND.to(device).float()
        restored_BND, mask_BN = net(features_BND, settings.temperature)
        variance = net.selector.standardise.variance
        kept = at_least(kept_fraction(mask_BN), settings.keep)
        (unexplained_variance(restored_BND, features_BND, variance) + kept).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        yield time.perf_counter()


@torch.inference_mode()
def time_generate(keep: float, batch: int, seconds: float, device: torch.device) -> tuple[float, float]:
    """Milliseconds of a batch of answers: from the fraction `keep` of the visual tokens, and from all."""
    model, processor = load_vlm(str(Path(__file__).parents[1] / VLMS["micro"].path), torch.float32)
    pages = [world.sample("docs", "validation", index, 0) for index in range(batch)]
    texts = [f"<image> {page.turns[0][0]}" for page in pages]
    images = [page.image for page in pages]
    model, inputs = model.to(device), processor(images=images, text=texts, padding=True, return_tensors="pt")
    inputs = inputs.to(device)
    selector = FeatureSelector(WIDTH, GRID, layer=-1).to(device)
    length: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    reduced = milliseconds(lambda: model.generate(**reduce(model, inputs, selector, keep), **length), seconds)
    return reduced, milliseconds(lambda: model.generate(**inputs, **length), seconds)


def measure_overhead(rows: Sequence[str], options: Namespace) -> Iterator[str]:
    """A printed row for each ratio of this checkout's own."""
    pairs: dict[str, Callable[[Path], tuple[float, float]]] = {
        "store / plain file": lambda folder: time_store(folder, options.images, options.seconds),
        "step / plain loop": lambda folder: time_step(folder, options.steps, options.device),
    } | {
        f"generate from {keep:g} / from all": lambda _, keep=keep: time_generate(
            keep, options.batch, options.seconds, options.device
        )
        for keep in options.keep
    }
    for name, measure in pairs.items():
        if name.split()[0] in rows:
            with tempfile.TemporaryDirectory() as folder:
                time, baseline = measure(Path(folder))
            yield f"{name:<28}{time:>12.2f} ms /{baseline:>12.2f} ms = {time / baseline:.3f}"


def parse(arguments: Sequence[str] | None) -> Namespace:
    """The options; exits with 2 for rows that need, or cannot have, another checkout."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    compared = [*against.PER_STAGE, *against.WHOLE]
    parser.add_argument("rows", nargs="*", help=f"{', '.join(OVERHEAD)}; or {', '.join(compared)}")
    parser.add_argument("--against", type=Path, help="folder of another checkout")
    parser.add_argument("--rounds", type=int, default=1, help="measurements of each checkout")
    parser.add_argument("--images", type=int, default=2048, help="images of the store")
    parser.add_argument("--steps", type=int, default=60, help="steps of each training")
    parser.add_argument("--keep", nargs="+", type=float, default=[0.1, 0.5], help="kept fractions")
    parser.add_argument("--batch", type=int, default=32, help="questions of a batch of answers")
    parser.add_argument("--seconds", type=float, default=2.0, help="least duration of each other measurement")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    allowed = compared if options.against else OVERHEAD
    if unknown := [name for name in options.rows if name not in allowed]:
        mode = "with --against" if options.against else "without --against"
        parser.error(f"rows: {unknown[0]} cannot be measured {mode}, allowed: {', '.join(allowed)}")
    options.rows = options.rows or allowed
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one line per ratio."""
    options = parse(arguments)
    print(device_name(options.device))
    rows = (
        against.compare(options.rows, options.against, options.rounds)
        if options.against
        else measure_overhead(options.rows, options)
    )
    for row in rows:
        print(row, flush=True)


if __name__ == "__main__":
    main()
