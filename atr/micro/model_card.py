"""Renders the model cards of the micro models."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from atr.config.presets import ENCODERS
from atr.core.hub import split_revision
from atr.micro.model import PATCH
from atr.micro.params import MicroParams

_CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---
# The micro world's LLaVA

A small `LlavaForConditionalGeneration` (CLIP tower of {layers} layers, two-layer projector, Llama of
{text_layers} layers, all {width} wide) that reads the micro world's 168x168 images as 144 visual tokens. It
is the frozen model of atr's default experiment and knows nothing beyond the micro world.

- **Data**: `atr/micro/lessons.py`: drawn pages, signs, charts, shapes and handwritten digits on crops of
  twelve photographs, more varied than the benchmarks. {images:,} images, each seen once. Photographs come
  from scikit-image and scikit-learn, handwriting from scikit-learn's digits; the fonts are DejaVu.
- **Recipe**: `atr/micro/training.py`. First tower and projector learn what each patch contains (its
  characters, the question its line answers, its word, or its object), then the whole model learns to answer.
  `make micro` trains it from scratch.
- **Seed**: {seed}. **Time**: {minutes:.0f} minutes on the machine that trained it.
- **Format**: bfloat16 safetensors, loaded by `from_pretrained` on this folder.

"""
_RESULTS = """
| parameter | value |
|---|---|
{recipe}

Exact match of greedy answers to {questions} held-out questions of each benchmark, all visual tokens kept.
Their photograph regions, handwriting and one of their fonts were not used in training.

| benchmark | exact match |
|---|---|
{scores}
"""

_DINOV2_CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
base_model: {tower}
---
# The micro world's LLaVA on DINOv2-small

A small `LlavaForConditionalGeneration` on the frozen tower of `{tower}`, read at layer {layer}: a two-layer
projector, {new_layers} new Llama layers, and the language model of `data/micro/llava` on top, trained
further. It reads the micro world's images at {size}x{size} as {tokens} visual tokens and knows nothing beyond
that world. The tower is not in this folder: `atr.vlm.checkpoint.load_vlm` loads it by the `mm_vision_tower`
of config.json.

- **Data**: `atr/micro/lessons.py`: {images:,} images whose features were computed once, each used
  {passes:.1f} times with other questions or in another order. Photographs come from scikit-image and
  scikit-learn, handwriting from scikit-learn's digits; the fonts are DejaVu.
- **Recipe**: `atr/micro/training.py`. First the projector and the new layers learn what each patch contains
  (its characters, the question its line answers, its word, the digits up to it, or its object), then
  projector and Llama learn to answer. `make micro-dinov2` trains it again.
- **Layer**: chosen by two-layer probes on the frozen features of {probe_images} lessons. Fraction of held-out
  characters named correctly, by image size in pixels and layer:

{probe}

- **Seed**: {seed}. **Time**: {minutes:.0f} minutes on the machine that trained it.
- **Format**: bfloat16 safetensors without the tower's weights.

"""


def render_card(params: MicroParams, scores: Mapping[str, float], minutes: float) -> str:
    """Markdown with data, recipe, seed, training time and scores."""
    recipe = params.micro
    text = _CARD.format(
        layers=recipe.layers,
        text_layers=recipe.text_layers,
        width=recipe.width,
        images=recipe.steps * recipe.batch_size,
        seed=params.seed,
        minutes=minutes,
    )
    return text + _render_results(asdict(recipe), scores, recipe.questions)


def render_dinov2_card(
    params: MicroParams, probe: Mapping[str, Any], scores: Mapping[str, float], minutes: float
) -> str:
    """Like `render_card`, with the accuracies of the probe that chose the layer."""
    recipe, features = params.micro_dinov2, params.micro_features
    encoder, accuracy = ENCODERS["dinov2-small"], probe["accuracy"]
    layers = [str(layer) for layer in range(1, 1 + max(map(len, accuracy.values())))]
    rows = [("size", *layers), ("---",) * (1 + len(layers))]
    rows += [(size, *(f"{by_layer[layer]:.2f}" for layer in layers)) for size, by_layer in accuracy.items()]
    text = _DINOV2_CARD.format(
        tower=split_revision(encoder.path)[0],
        layer=encoder.layer,
        size=encoder.size,
        tokens=((encoder.size or 0) // PATCH) ** 2,
        new_layers=recipe.new_layers,
        images=features.images,
        passes=recipe.steps * recipe.batch_size / features.images,
        probe_images=probe["images"],
        probe="\n".join(f"| {' | '.join(row)} |" for row in rows),
        seed=params.seed,
        minutes=minutes,
    )
    trained = {key: value for key, value in params.flat().items() if key.startswith("micro_")}
    return text + _render_results(trained, scores, recipe.questions)


def _render_results(recipe: Mapping[str, Any], scores: Mapping[str, float], questions: int) -> str:
    return _RESULTS.format(
        questions=questions,
        recipe="\n".join(f"| {key} | {value} |" for key, value in recipe.items()),
        scores="\n".join(f"| {name} | {score:.3f} |" for name, score in scores.items()),
    )
