"""The model card of the micro model."""

from collections.abc import Mapping
from dataclasses import asdict

from atr import config

TEXT = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---
# The micro world's LLaVA

A small `LlavaForConditionalGeneration` (CLIP tower of {layers} layers, two-layer projector, Llama of
{text_layers} layers, all {width} wide) that reads the micro world's 168x168 images as 144 visual tokens. It
is the frozen model whose input `atr` shortens in its embedded default; it knows nothing beyond that world.

- **Data**: `atr/datasets/micro.py`, lessons of split `train`: drawn pages, signs, charts, shapes and
  handwritten digits on crops of twelve photographs, more varied than the benchmarks. {images:,} images, each
  seen once. Photographs come from scikit-image and scikit-learn, handwriting from scikit-learn's digits; the
  fonts are DejaVu.
- **Recipe**: `atr/vlm/training.py`. First tower and projector learn what is in each patch (its characters,
  the question its line answers, its word, the thing it shows), then all of it learns to answer. Trained again
  from nothing by `dvc repro data/micro/dvc.yaml`.
- **Seed**: {seed}. **Time**: {minutes:.0f} minutes on the machine that trained it.
- **Format**: bfloat16 safetensors, loaded by `from_pretrained` on this folder.

| parameter | value |
|---|---|
{recipe}

Exact match of greedy answers to {questions} held-out questions of each benchmark, all visual tokens kept.
Held out are photograph regions, handwriting and one font, none of which was seen in training.

| benchmark | exact match |
|---|---|
{scores}
"""


def card(params: config.Params, scores: Mapping[str, float], minutes: float) -> str:
    """Markdown that states data, recipe, seed, time and scores."""
    recipe = params.micro
    return TEXT.format(
        layers=recipe.layers,
        text_layers=recipe.text_layers,
        width=recipe.width,
        images=recipe.steps * recipe.batch_size,
        seed=params.seed,
        minutes=minutes,
        questions=recipe.questions,
        recipe="\n".join(f"| {key} | {value} |" for key, value in asdict(recipe).items()),
        scores="\n".join(f"| {name} | {score:.3f} |" for name, score in scores.items()),
    )
