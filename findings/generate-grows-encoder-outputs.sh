#!/usr/bin/env bash
# transformers 5.23.0: generate(num_beams=3, mm_encoder_outputs=...) repeats the features in the caller's own object.
# Seen: 1 feature tensor before the call, 3 after it. Features that are kept for a second call are wrong by then.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0

"$folder/venv/bin/python" - <<'PY'
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

torch.manual_seed(0)
vision = CLIPVisionConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
)
text = LlamaConfig(
    vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
)
model = LlavaForConditionalGeneration(
    LlavaConfig(vision_config=vision, text_config=text, image_token_index=98)
).eval()
input_ids = torch.tensor([[1, 98, 98, 98, 98, 5]])
outputs = BaseModelOutputWithPooling(pooler_output=[torch.randn(4, 32)])
before = len(outputs.pooler_output)
model.generate(
    input_ids=input_ids,
    attention_mask=torch.ones_like(input_ids),
    mm_encoder_outputs={"image": outputs},
    num_beams=3,
    do_sample=False,
    max_new_tokens=2,
)
after = len(outputs.pooler_output)
print(f"feature tensors before generate: {before}, after: {after}")
assert (before, after) == (1, 3), "the behaviour has changed"
PY
