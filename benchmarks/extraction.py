"""Extraction relative to a bare loop of the same tower over pixel values that are ready in memory.

- decoded: `fill_store` on images decoded before, with preprocessing and the store's files;
- files: the same from prepared files, decoding included.

Alternating in one run; the medians of the rounds are compared. Shapes: see atr.core.tokens.
"""

import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from atr.config import ENCODERS
from atr.core.files import write_json
from atr.core.hardware import BFLOAT16_INSTRUCTIONS
from atr.core.timing import device_name
from atr.datasets import PreparedImages
from atr.datasets.prepared import save_images
from atr.features.datamodule import ImageDataModule
from atr.features.encoder import Encoder
from atr.features.extraction import fill_store
from atr.features.wheel_weights import WHEELS
from atr.micro import world

BATCH, SHARD = 32, 1024
DINOV2 = "facebook/dinov2-small"


def load_encoder(name: str, folder: Path) -> Encoder:
    """The micro tower, or a tower of DINOv2-small's size with random weights, which are as fast."""
    preset = ENCODERS[name]
    if name == "micro":
        return Encoder.load(str(Path(__file__).parents[1] / preset.path), preset.layer, name)
    wheel = WHEELS[DINOV2]
    config = {key: value for key, value in wheel.config.items() if key != "architectures"}
    Dinov2Model(Dinov2Config(**config)).save_pretrained(folder)
    write_json(folder / "preprocessor_config.json", wheel.processor)
    return Encoder.load(str(folder), preset.layer, name, preset.size)


def write_images(folder: Path, images: int) -> PreparedImages:
    """Images of the micro world as stage prepare writes them."""
    names = list(world.DRAW)
    drawn = ((f"{i}", world.sample(names[i % len(names)], "pretrain", i, 0).image) for i in range(images))
    save_images(folder, drawn, {"seed": 0, "prepare": {}})
    return PreparedImages(folder)


def precision(device: torch.device) -> str:
    """Precision of the stage on this device."""
    capable = device.type == "cuda" or any(map(torch.cpu.get_capabilities().get, BFLOAT16_INSTRUCTIONS))
    return "bf16-mixed" if capable else "32-true"


@torch.inference_mode()
def run_bare(encoder: Encoder, batches: Sequence[Tensor], device: torch.device) -> None:
    """The tower alone, called on each batch of pixel values."""
    layer = encoder.tower.to(device).config.num_hidden_layers
    mixed = precision(device) != "32-true"
    for pixels_BCHW in batches:
        with torch.autocast(device.type, torch.bfloat16) if mixed else nullcontext():
            states = encoder.tower(pixels_BCHW.to(device), output_hidden_states=True, **encoder.options)
        states.hidden_states[layer][:, encoder.layout.extra_tokens :].bfloat16().cpu()


def run_ours(encoder: Encoder, images: Any, folder: Path, threads: int, device: torch.device) -> None:
    """Extraction into a store, as in the stage."""
    data = ImageDataModule(images, encoder.preprocess, BATCH, SHARD, threads)
    off = dict.fromkeys(("enable_progress_bar", "enable_model_summary"), False)
    kwargs = {"accelerator": device.type, "devices": 1, "precision": precision(device), **off}
    fill_store(encoder, data, folder, {}, kwargs, {})


def time_extraction(
    name: str, images: int, rounds: int, threads: int, device: torch.device
) -> dict[str, tuple[float, float]]:
    """Median seconds (wall, processor) of the bare loop and of extraction from decoded images and files."""
    with tempfile.TemporaryDirectory() as home:
        encoder = load_encoder(name, Path(home, "encoder"))
        prepared = write_images(Path(home, "images"), images)
        decoded = [prepared[index] for index in range(len(prepared))]
        batches = [
            encoder.preprocess([image for _, image in decoded[first : first + BATCH]])
            for first in range(0, len(decoded), BATCH)
        ]
        store = Path(home, "store")
        runs: dict[str, Callable[[], None]] = {
            "bare": lambda: run_bare(encoder, batches, device),
            "decoded": lambda: run_ours(encoder, decoded, store, threads, device),
            "files": lambda: run_ours(encoder, prepared, store, threads, device),
        }
        times: dict[str, list[tuple[float, float]]] = {key: [] for key in runs}
        for _ in range(rounds + 1):
            for key, run in runs.items():
                wall, processor = time.perf_counter(), time.process_time()
                run()
                times[key].append((time.perf_counter() - wall, time.process_time() - processor))
    return {
        key: (median(wall for wall, _ in taken[1:]), median(processor for _, processor in taken[1:]))
        for key, taken in times.items()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print, for each encoder, the speed of extraction as a fraction of the bare loop's."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--encoders", nargs="+", default=["micro", "dinov2-small"], choices=ENCODERS)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="threads that decode ahead")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    print(device_name(options.device))
    for name in options.encoders:
        times = time_extraction(name, options.images, options.rounds, options.threads, options.device)
        wall, processor = times.pop("bare")
        for key, (own_wall, own_processor) in times.items():
            print(
                f"{name} {key}: {options.images / own_wall:.0f} images/s, {wall / own_wall:.3f} of the bare "
                f"loop's speed, {processor / own_processor:.3f} by processor time"
            )


if __name__ == "__main__":
    main()
