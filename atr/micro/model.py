"""Builds the micro world's vision-language models from the Llava classes of transformers."""

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.modeling_clip import CLIPAttention

from atr.core.tokens import sine_positions
from atr.features.encoder import Encoder
from atr.vlm.external_tower import cut_off, put_tower

PATCH = 14
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
# The image comes first; then each turn is one question token and its answer.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}<image> {% else %}{{ item['text'] }} {% endif %}"
    "{% endfor %}{% if message['role'] == 'assistant' %}</s> {% endif %}{% endfor %}"
)


def build_processor(
    vocabulary: Sequence[str], image_size: int, image_processor: Any = None
) -> LlavaProcessor:
    """A processor whose tokens are special tokens, digits and the words of `vocabulary`.

    `image_processor` is that of a published tower; without one, pixels are scaled to -1..1.
    """
    return LlavaProcessor(
        image_processor=image_processor
        or CLIPImageProcessorPil(
            size={"shortest_edge": image_size},
            crop_size={"height": image_size, "width": image_size},
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        ),
        tokenizer=_build_tokenizer(vocabulary),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )


def _build_tokenizer(vocabulary: Sequence[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer; numbers are split into digits, and joined when decoded."""
    tokens = [*SPECIAL_TOKENS, *"0123456789", *dict.fromkeys(vocabulary)]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokens.index("<s>"))]
    )
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
    )


def build_model(
    processor: LlavaProcessor, image_size: int, width: int = 192, layers: int = 4, text_layers: int = 4
) -> LlavaForConditionalGeneration:
    """A randomly initialised Llava: CLIP tower, two-layer projector and Llama, all `width` wide.

    `vision_feature_layer` is -1, so that every tower layer is used. Patch positions are initialised as a 2-D
    sine and the tower's attention by `_initialise_mimetic`, so that it learns to read in fewer steps.
    """
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        image_size=image_size,
        patch_size=PATCH,
        hidden_act="gelu",
        untrained_class_token=True,  # no loss depends on it
    )
    model = LlavaForConditionalGeneration(_build_config(processor, vision, -1, width, text_layers))
    grid = image_size // PATCH
    positions = model.model.vision_tower.embeddings.position_embedding.weight
    positions.data[1:] = sine_positions((grid, grid), width)
    for layer in model.model.vision_tower.encoder.layers:
        _initialise_mimetic(layer.self_attn)
    return model


@torch.no_grad()
def _initialise_mimetic(attention: CLIPAttention) -> None:
    """Initialise as in Trockman and Kolter, Mimetic Initialization of Self-Attention Layers, ICML 2023.

    In each head the product of query and key weights is 0.7 (I + Z), truncated to the head's rank; the
    product of value and output weights is -0.4 (I + Z). Z is normal noise of variance 1 / width.
    """
    width, channels = attention.embed_dim, attention.head_dim
    for first in range(0, width, channels):
        head = slice(first, first + channels)
        left_DD, sizes_D, right_DD = _noisy_identity(width, 0.7)
        roots_D = sizes_D[:channels].sqrt()
        attention.q_proj.weight[head] = (left_DD[:, :channels] * roots_D).T
        attention.k_proj.weight[head] = right_DD[:channels] * roots_D.unsqueeze(1)
    left_DD, sizes_D, right_DD = _noisy_identity(width, -0.4)
    attention.v_proj.weight[:] = right_DD * sizes_D.sqrt().unsqueeze(1)
    attention.out_proj.weight[:] = left_DD * sizes_D.sqrt()


def _noisy_identity(width: int, size: float) -> tuple[Tensor, Tensor, Tensor]:
    """Singular value decomposition U, S, V^T of `size` (I + Z), with Z normal noise of variance 1 / width."""
    noise_DD = torch.randn(width, width) / width**0.5
    left_DD, sizes_D, right_DD = torch.linalg.svd(size * (noise_DD + torch.eye(width)))
    return left_DD, sizes_D, right_DD


def build_model_on_tower(
    tower: str,
    path: str,
    layer: int,
    processor: LlavaProcessor,
    image_size: int,
    trained: LlavaForConditionalGeneration,
    new_layers: int,
) -> LlavaForConditionalGeneration:
    """A Llava with the frozen DINOv2 `tower`, read at `layer`, and the language model of `trained`.

    The projector and the first `new_layers` layers of the language model are new; these layers start as
    identities. `tower` is the hub id that the configuration records, `path` the folder of its weights. Raises
    ValueError as `put_tower` does, and if the vocabularies of `processor` and `trained` differ in size.
    """
    text = trained.config.text_config
    if text.vocab_size != len(processor.tokenizer):
        raise ValueError(
            f"{trained.name_or_path}: its vocabulary has {text.vocab_size} tokens, the micro world's "
            f"{len(processor.tokenizer)}: train it again by `make micro`"
        )
    vision = cut_off(Encoder.load(path, layer, size=image_size), image_size)
    # `layer` counts from the front, as in the whole tower.
    layers = new_layers + text.num_hidden_layers
    config = _build_config(processor, vision, layer, text.hidden_size, layers, mm_vision_tower=tower)
    model = LlavaForConditionalGeneration(config)
    put_tower(model, path)
    model.model.vision_tower.requires_grad_(False)
    _load_language_model(model, trained, new_layers)
    return model


def _load_language_model(
    model: LlavaForConditionalGeneration, trained: LlavaForConditionalGeneration, new_layers: int
) -> None:
    """Copy the language model of `trained` after the first `new_layers` layers, which become identities."""
    target, source = model.model.language_model, trained.model.language_model
    for layer in target.layers[:new_layers]:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    for new, old in (
        *zip(target.layers[new_layers:], source.layers, strict=True),
        (target.embed_tokens, source.embed_tokens),
        (target.norm, source.norm),
        (model.lm_head, trained.lm_head),
    ):
        new.load_state_dict(old.state_dict())


def _build_config(
    processor: LlavaProcessor,
    vision: PretrainedConfig,
    layer: int,
    width: int,
    text_layers: int,
    **extra: str,
) -> LlavaConfig:
    """Configuration of a Llava whose projector and Llama are `width` wide."""
    tokenizer, heads = processor.tokenizer, width // 64
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=round(8 * width / 3),
        num_hidden_layers=text_layers,
        num_attention_heads=heads,
        max_position_embeddings=512,
        initializer_range=0.05,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=layer,
        vision_feature_select_strategy="default",
        image_seq_length=(vision.image_size // PATCH) ** 2,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **extra,
    )
