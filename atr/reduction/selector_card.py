"""The model card of a selector: a template, and the facts it shows."""

import re
from collections.abc import Mapping
from typing import Any

from atr.core.tower_layer import MERGED

TEMPLATE = """---
{{ card_data }}
---
# A selector of visual tokens for {{ encoder }}

It ranks the tokens of a frozen vision tower by {{ worth }}, so that an unchanged {{ host }}
with this tower reads only the best of them. The {{ part }} is that of
[When Less is Enough: Adaptive Token Reduction for Efficient Image Representation]({{ paper_url }}).

```python
from atr import FeatureSelector, reduce

selector = FeatureSelector.from_pretrained("...")  # this folder, or the hub id of this repository
inputs = processor(images=image, text=prompt, return_tensors="pt")
model.generate(**reduce(model, inputs, selector, keep=0.4), max_new_tokens=32)
```

Models that read another layer{{ other_grid }} or the features of another tower are refused.

| | |
|---|---|
{%- for name, value in facts.items() %}
| {{ name }} | {{ value }} |
{%- endfor %}
{%- if scores %}

Measured after training on held-out images of the same kind:

| | |
|---|---:|
{%- for name, value in scores.items() %}
| {{ name }} | {{ value }} |
{%- endfor %}
{%- endif %}

The weights of this selector are under the Apache License 2.0; its encoder and its training images have
licences of their own.
"""
_MARKUP = re.compile(r"[^\w\s.,/+-]|_")


def record(
    store: Mapping[str, Any], prepared: Mapping[str, Any], seed: int, metrics: Mapping[str, float]
) -> dict[str, Any]:
    """The record of a selector's training: data, images, fingerprint, seed and validation metrics.

    It says `ragged` if the images had grids of their own.
    `store` and `prepared` are the manifests of the features and of the images.
    """
    marker = "validation/"
    ragged = {"ragged": True} if store["grid"] is None else {}
    return ragged | {
        "data": prepared["prepare"]["source"],
        "images": store["images"],
        "fingerprint": store["fingerprint"],
        "seed": seed,
        "scores": {
            name.removeprefix(marker): value for name, value in metrics.items() if name.startswith(marker)
        },
    }


def fields(config: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the template, from a selector's arguments and its record; all texts are escaped."""
    rows, columns = config["grid"]
    is_ragged = bool(record.get("ragged"))
    facts = {
        "encoder": config["encoder"],
        "layer": config["layer"],
        "grid": "of each image, typically " * is_ragged + f"{rows} x {columns} tokens",
        "width of a feature": config["width"],
        "transformer layers": config["layers"],
        "kept proportion p in training": config["keep"],
        "distilled from the answers of": record.get("taught_by"),
        "positions of the kept tokens": record.get("positions"),
        "training data": record.get("data"),
        "training images": record.get("images"),
        "seed": record.get("seed"),
        "fingerprint of the encoder": record.get("fingerprint"),
        "weights": record.get("weights"),
        "rounded from the weights with SHA-256": record.get("rounded_from"),
    }
    # Sorted, as in config.json, so that a selector loaded and saved again has the same card.
    scores = sorted(record.get("scores", {}).items())
    is_taught = "taught_by" in record
    return {
        "worth": (
            "how much a language model's answers depend on them"
            if is_taught
            else "how poorly the other tokens can reconstruct them"
        ),
        "part": "selector" if is_taught else "method",
        "host": "vision-language model" if is_ragged or config["layer"] == MERGED else "LLaVA",
        "other_grid": "" if is_ragged else ", another grid",
        "encoder": escaped(config["encoder"] or "an unnamed encoder"),
        "facts": {name: escaped(value) for name, value in facts.items() if value is not None},
        "scores": {escaped(name): f"{value:.4g}" for name, value in scores},
    }


def escaped(value: object) -> str:
    """One line of text without any Markdown or HTML markup."""
    return _MARKUP.sub(lambda match: f"&#{ord(match[0])};", " ".join(str(value).split()))
