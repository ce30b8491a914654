#!/usr/bin/env bash
# transformers 5.23.0: pixels and their grid without `mm_token_type_ids`. Qwen3-VL refuses the call. Qwen2.5-VL runs,
# but numbers image tokens like text, on one axis instead of time, row and column, so that its logits are others.
# Inputs that were made before transformers 5, or collated by hand, lack the field.
# Seen: ValueError for Qwen3-VL; for Qwen2.5-VL no warning, and logits that differ by more than a tenth of their size.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0

"$folder/venv/bin/python" - <<'PY'
import sys
import warnings

import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
text = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
}
special = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
kinds = {
    "qwen2_5_vl": (
        Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig, {**vision, "fullatt_block_indexes": [1]}, 1176
    ),
    "qwen3_vl": (
        Qwen3VLForConditionalGeneration, Qwen3VLConfig, {**vision, "deepstack_visual_indexes": [0]}, 1536
    ),
}
found = {}
for name, (kind, config, vision_config, width) in kinds.items():
    torch.manual_seed(0)
    model = kind(config(vision_config=vision_config, text_config=text, **special)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    input_ids = torch.tensor([[5, 92, *[90] * 16, 93, 7, 8]])
    inputs = {
        "input_ids": input_ids, "attention_mask": torch.ones_like(input_ids),
        "pixel_values": torch.randn(64, width), "image_grid_thw": torch.tensor([[1, 8, 8]]),
    }
    types = (input_ids == 90).long()
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        expected = model(**inputs, mm_token_type_ids=types).logits
        try:
            change = float((model(**inputs).logits - expected).abs().max() / expected.abs().max())
            found[name] = "differs" if change > 0.1 else "same"
            print(f"{name}: runs, logits differ by {change:.2f} of the largest, {len(caught)} warnings")
        except ValueError as error:
            found[name] = "refused"
            print(f"{name}: ValueError: {str(error).splitlines()[0]}")
sys.exit(found != {"qwen2_5_vl": "differs", "qwen3_vl": "refused"})
PY
