"""Sizes of the presets' language models, and the FLOPs of their prefill.

The numbers are those of the checkpoints' config.json, at the presets' commits.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class DecoderSize:
    """A language model of equal layers, each with grouped attention and a gated feed-forward block."""

    width: int
    """Channels of a token."""
    layers: int
    heads: int
    kv_heads: int
    """Heads of keys and values."""
    head_width: int
    """Channels of a head."""
    hidden: int
    """Width of the feed-forward block."""

    @property
    def weights(self) -> int:
        """Weights of the linear layers: query and output, key and value, and three of the feed-forward."""
        attention = 2 * (self.heads + self.kv_heads) * self.head_width * self.width
        return self.layers * (attention + 3 * self.width * self.hidden)

    def prefill_flops(self, tokens: int) -> int:
        """FLOPs of the prefill of N tokens; a multiply-add counts as two.

        Two per token for every weight, and in each layer 4 per channel for each pair of a token and itself or
        one before it. Norms, softmax, embeddings and the one prediction at the end are left out.
        """
        pairs = tokens * (tokens + 1) // 2
        return 2 * tokens * self.weights + self.layers * 4 * self.heads * self.head_width * pairs


_VICUNA_7B = DecoderSize(4096, 32, 32, 32, 128, 11008)
_QWEN2_7B = DecoderSize(3584, 28, 28, 4, 128, 18944)
DECODERS = {
    "llava-hf/llava-1.5-7b-hf": _VICUNA_7B,
    "llava-hf/llava-v1.6-vicuna-7b-hf": _VICUNA_7B,
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": _QWEN2_7B,
    "Qwen/Qwen2.5-VL-3B-Instruct": DecoderSize(2048, 36, 16, 2, 128, 11008),
    "Qwen/Qwen2.5-VL-7B-Instruct": _QWEN2_7B,
    "Qwen/Qwen3-VL-2B-Instruct": DecoderSize(2048, 28, 16, 8, 128, 6144),
    "Qwen/Qwen3-VL-8B-Instruct": DecoderSize(4096, 36, 32, 8, 128, 12288),
    "OpenGVLab/InternVL3-8B-hf": _QWEN2_7B,
    "google/gemma-3-4b-it": DecoderSize(2560, 34, 8, 4, 256, 10240),
    "HuggingFaceTB/SmolVLM-500M-Instruct": DecoderSize(960, 32, 15, 5, 64, 2560),
}
"""Language models by the hub id of the checkpoint."""


def decoder_of(path: str) -> DecoderSize | None:
    """Size of the language model of a checkpoint, by its hub id; None if unknown."""
    return DECODERS.get(path.partition("@")[0])


def prefill_saved(decoder: DecoderSize, tokens: int, kept: int) -> int:
    """FLOPs of the prefill that are saved where K of N visual tokens are kept.

    The text is left out: with it more is saved, as its tokens attend to the visual ones.
    """
    return decoder.prefill_flops(tokens) - decoder.prefill_flops(kept)
