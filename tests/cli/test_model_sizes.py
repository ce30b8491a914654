"""The prefill's FLOPs against torch's count, and the sizes against the published numbers of parameters."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaModel, Qwen3Config, Qwen3Model

from atr.cli.model_sizes import DECODERS, DecoderSize, decoder_of, prefill_saved
from atr.config.presets import ENCODERS, VLMS


@pytest.mark.parametrize(
    ("kind", "config", "size"),
    [
        (LlamaModel, LlamaConfig, DecoderSize(48, 3, 4, 2, 12, 80)),
        (Qwen3Model, Qwen3Config, DecoderSize(48, 2, 4, 2, 16, 80)),  # heads wider than the tokens
    ],
)
@pytest.mark.parametrize("tokens", [1, 7, 20])
def test_flops_are_those_that_torch_counts(kind, config, size, tokens):
    model = kind(
        config(
            vocab_size=16, hidden_size=size.width, num_hidden_layers=size.layers, head_dim=size.head_width,
            num_attention_heads=size.heads, num_key_value_heads=size.kv_heads, intermediate_size=size.hidden,
            attn_implementation="eager",
        )
    )  # fmt: skip
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(inputs_embeds=torch.randn(1, tokens, size.width), use_cache=False)
    # Eager attention also computes the pairs that the mask hides.
    hidden = size.layers * 4 * size.heads * size.head_width * tokens * (tokens - 1) // 2
    assert counter.get_total_flops() == size.prefill_flops(tokens) + hidden


PUBLISHED = {  # parameters without embeddings, in billions, of the language models' own cards and reports
    "llava-hf/llava-1.5-7b-hf": 6.48,
    "Qwen/Qwen2.5-VL-3B-Instruct": 2.77,
    "Qwen/Qwen2.5-VL-7B-Instruct": 6.53,
    "Qwen/Qwen3-VL-2B-Instruct": 1.4,
    "Qwen/Qwen3-VL-8B-Instruct": 6.95,
    "google/gemma-3-4b-it": 3.21,
    "HuggingFaceTB/SmolVLM-500M-Instruct": 0.315,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_are_the_published_number_of_parameters(name):
    assert DECODERS[name].weights / 1e9 == pytest.approx(PUBLISHED[name], rel=0.01)


def test_every_preset_on_the_hub_is_known_and_as_wide_as_its_merged_tokens():
    for preset in VLMS.values():
        decoder, encoder = decoder_of(preset.path), ENCODERS[preset.encoder]
        if preset.path.startswith("data/"):
            assert decoder is None
        elif encoder.layer == "merged":
            assert decoder.width == encoder.width
        else:
            assert decoder.width > encoder.width


def test_what_is_saved_grows_with_what_is_dropped():
    size = DecoderSize(48, 3, 4, 2, 12, 80)
    saved = [prefill_saved(size, 100, kept) for kept in (100, 50, 25, 0)]
    assert saved == sorted(saved) and saved[0] == 0 and saved[-1] == size.prefill_flops(100)
    assert saved[2] < 3 * saved[1] / 2, "pairs of tokens make the first half dearer"
