"""Writes a trained micro model as a transformers folder, with its held-out scores in a model card."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from atr.core.files import whole_folder, write_text
from atr.micro.scoring import score_benchmark
from atr.micro.world import DRAW


def write_model_folder(
    home: Path,
    processor: LlavaProcessor,
    save: Callable[[Path], None],
    load: Callable[[str, torch.dtype], tuple[LlavaForConditionalGeneration, LlavaProcessor]],
    questions: int,
    seed: int,
    render: Callable[[Mapping[str, float]], str],
) -> dict[str, float]:
    """Write the folder `home`, complete or not at all; return the saved model's scores by benchmark.

    Scores are exact match in float32 on held-out questions; `render` makes the model card of them.
    """
    with whole_folder(home) as folder:
        save(folder)
        processor.save_pretrained(folder)
        model, saved = load(str(folder), torch.float32)
        scores = {name: score_benchmark(saved, model, name, "evaluate", questions, seed) for name in DRAW}
        write_text(folder / "README.md", render(scores))
    return scores
