"""`atr export`: a LLaVA's vision side with a selector as one graph, its size, time and kept indices."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from atr.core.timing import device_name, milliseconds
from atr.datasets.decoding import decode
from atr.vlm.export import FILES, OPSET, Exported, RunVision, export_vision, load_exported

_SECONDS = 1.0
"""Time for which a call is repeated."""


def export(vlm: str, selector: str, keep: str, to: str, folder: str, check: str | None) -> int:
    """Export, and print size and time; 1 if an image of the folder `check` keeps other tokens than eager.

    Raises ValueError, one line, as `export_vision` does, and for a folder without images.
    """
    paths = [] if check is None else _image_files(Path(check))
    exported = export_vision(vlm, selector, parse_keep(keep), to, Path(folder))
    run = load_exported(exported.folder, to)
    print("\n".join(_describe(exported, run)))
    if check is None:
        return 0
    images = ((path, decode(path, str(path))) for path in paths)
    others = [path for path, image in images if not keeps_same(exported, run, image)]
    print(f"kept indices: equal to eager's for {len(paths) - len(others)} of {len(paths)} images of {check}")
    for path in others:
        print(f"other indices: {path}")
    return 1 if others else 0


def keeps_same(exported: Exported, run: RunVision, image: Image.Image) -> bool:
    """Whether the graph keeps the same tokens of an image as the model's own modules."""
    pixels_1CHW = exported.pixels(image)
    return torch.equal(run(pixels_1CHW)[1], exported.run_eagerly(pixels_1CHW)[1])


def _describe(exported: Exported, run: RunVision) -> Iterator[str]:
    """The file, and the times of an image."""
    opset = "" if exported.format == "torch" else f", from ai.onnx opset {OPSET}"
    path, megabytes = exported.folder / FILES[exported.format], exported.bytes / 1e6
    yield f"{path}: {megabytes:.1f} MB in float32{opset}; keeps {exported.kept} of {exported.of} tokens"
    pixels_1CHW = exported.pixels(Image.new("RGB", (97, 61)))
    times = [milliseconds(partial(f, pixels_1CHW), _SECONDS) for f in (run, exported.run_eagerly)]
    device = device_name(torch.device("cpu"))
    yield f"an image: {times[0]:.2f} ms, eager {times[1]:.2f} ms ({device})"


def parse_keep(text: str) -> float | str:
    """A count, a fraction, or the text itself if it is no number."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _image_files(folder: Path) -> list[Path]:
    """The image files of a folder; raises ValueError if there are none, OSError if it cannot be read."""
    suffixes = Image.registered_extensions()
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes)
    if not paths:
        raise ValueError(f"check: {folder} holds no images")
    return paths
