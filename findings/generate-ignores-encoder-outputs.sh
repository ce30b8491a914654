#!/usr/bin/env bash
# transformers 5.23.0: generate refuses an argument that a model does not use, except `mm_encoder_outputs`: Llama 3.2
# Vision, which has no such argument, takes precomputed image features and answers as if there were no image.
# Seen: the same tokens with features and without, no warning; a ValueError for an argument of another name.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0

"$folder/venv/bin/python" - <<'PY'
import inspect
import sys
import warnings

import torch
from transformers import MllamaConfig, MllamaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

torch.manual_seed(0)
text = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "cross_attention_layers": [1], "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}
vision = {
    "hidden_size": 32, "attention_heads": 2, "num_hidden_layers": 2, "num_global_layers": 1, "intermediate_size": 64,
    "vision_output_dim": 64, "image_size": 28, "patch_size": 14, "intermediate_layers_indices": [0],
    "supported_aspect_ratios": [[1, 1]], "max_num_tiles": 1,
}
config = MllamaConfig(text_config=text, vision_config=vision, image_token_index=98)
model = MllamaForConditionalGeneration(config).eval()
input_ids = torch.tensor([[1, 98, 5, 7]])
inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "max_new_tokens": 6}
features = {"image": BaseModelOutputWithPooling(pooler_output=[torch.randn(4, 32)])}
named = "mm_encoder_outputs" in inspect.signature(model.forward).parameters
with warnings.catch_warnings(record=True) as caught:
    same = torch.equal(
        model.generate(**inputs, do_sample=False),
        model.generate(**inputs, do_sample=False, mm_encoder_outputs=features),
    )
try:
    model.generate(**inputs, do_sample=False, encoder_features=features)
    refused = False
except ValueError as error:
    refused = "not used by the model" in str(error)
print(f"named in forward: {named}; same tokens: {same}; warnings: {len(caught)}; another name refused: {refused}")
sys.exit(named or not same or not refused or bool(caught))
PY
