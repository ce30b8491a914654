"""The model cards of the micro models."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from atr import config
from atr.core.hub import split_revision
from atr.micro.model import PATCH

TEXT = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---
# The micro world's LLaVA

A small `LlavaForConditionalGeneration` (CLIP tower of {layers} layers, two-layer projector, Llama of
{text_layers} layers, all {width} wide) that reads the micro world's 168x168 images as 144 visual tokens. It
is the frozen model whose input `atr` shortens in its embedded default; it knows nothing beyond that world.

- **Data**: `atr/micro/world.py`, lessons of split `train`: drawn pages, signs, charts, shapes and
  handwritten digits on crops of twelve photographs, more varied than the benchmarks. {images:,} images, each
  seen once. Photographs come from scikit-image and scikit-learn, handwriting from scikit-learn's digits; the
  fonts are DejaVu.
- **Recipe**: `atr/micro/training.py`. First tower and projector learn what is in each patch (its characters,
  the question its line answers, its word, the thing it shows), then all of it learns to answer. Trained again
  from nothing by `make micro`.
- **Seed**: {seed}. **Time**: {minutes:.0f} minutes on the machine that trained it.
- **Format**: bfloat16 safetensors, loaded by `from_pretrained` on this folder.

"""
RESULTS = """
| parameter | value |
|---|---|
{recipe}

Exact match of greedy answers to {questions} held-out questions of each benchmark, all visual tokens kept.
Held out are photograph regions, handwriting and one font, none of which was seen in training.

| benchmark | exact match |
|---|---|
{scores}
"""

TEXT_DINOV2 = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
base_model: {tower}
---
# The micro world's LLaVA on DINOv2-small

A small `LlavaForConditionalGeneration` on the frozen tower of `{tower}`, read at layer {layer}: a two-layer
projector and a Llama, which begins with {new_layers} new layers and goes on as that of `data/micro/llava`. It
reads the micro world's images at {size}x{size} as {tokens} visual tokens, and knows nothing beyond that
world. The tower is not in this folder: `atr.vlm.checkpoint.load_vlm` fetches it by the `mm_vision_tower` of
config.json.

- **Data**: `atr/micro/world.py`, lessons of split `train`: {images:,} images whose features were computed
  once, each learned from {passes:.1f} times with other questions or in another order. Photographs come from
  scikit-image and scikit-learn, handwriting from scikit-learn's digits; the fonts are DejaVu.
- **Recipe**: `atr/micro/training.py`. First the projector and the new layers learn what is in each patch (its
  characters, the question its line answers, its word, the digits before it, the thing it shows), then
  projector and Llama learn to answer. Trained again by `make micro-dinov2`.
- **Layer**: chosen by two-layer probes on the frozen features of {probe_images} lessons; the fraction of
  held-out characters they name right, by image size in pixels and layer:

{probe}

- **Seed**: {seed}. **Time**: {minutes:.0f} minutes on the machine that trained it.
- **Format**: bfloat16 safetensors without the tower's weights.

"""


def card(params: config.Params, scores: Mapping[str, float], minutes: float) -> str:
    """Markdown that states data, recipe, seed, time and scores."""
    recipe = params.micro
    text = TEXT.format(
        layers=recipe.layers,
        text_layers=recipe.text_layers,
        width=recipe.width,
        images=recipe.steps * recipe.batch_size,
        seed=params.seed,
        minutes=minutes,
    )
    return text + _results(asdict(recipe), scores, recipe.questions)


def card_dinov2(
    params: config.Params, probe: Mapping[str, Any], scores: Mapping[str, float], minutes: float
) -> str:
    """As `card`, with the accuracies of the probe that the layer was chosen by."""
    recipe, wanted = params.micro_dinov2, params.micro_features
    encoder, accuracy = config.ENCODERS["dinov2-small"], probe["accuracy"]
    layers = [str(layer) for layer in range(1, 1 + max(len(read) for read in accuracy.values()))]
    rows = [("size", *layers), ("---",) * (1 + len(layers))]
    rows += [(size, *(f"{read[layer]:.2f}" for layer in layers)) for size, read in accuracy.items()]
    text = TEXT_DINOV2.format(
        tower=split_revision(encoder.path)[0],
        layer=encoder.layer,
        size=encoder.size,
        tokens=((encoder.size or 0) // PATCH) ** 2,
        new_layers=recipe.new_layers,
        images=wanted.images,
        passes=recipe.steps * recipe.batch_size / wanted.images,
        probe_images=probe["images"],
        probe="\n".join(f"| {' | '.join(row)} |" for row in rows),
        seed=params.seed,
        minutes=minutes,
    )
    trained = {key: value for key, value in params.flat().items() if key.startswith("micro_")}
    return text + _results(trained, scores, recipe.questions)


def _results(recipe: Mapping[str, Any], scores: Mapping[str, float], questions: int) -> str:
    return RESULTS.format(
        questions=questions,
        recipe="\n".join(f"| {key} | {value} |" for key, value in recipe.items()),
        scores="\n".join(f"| {name} | {score:.3f} |" for name, score in scores.items()),
    )
