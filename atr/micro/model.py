"""The small vision-language models of the micro world, built from transformers' own Llava classes."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from PIL.Image import Image
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
from atr.reduction.layers import Standardise
from atr.vlm.external_tower import cut_off, put_tower

PATCH = 14
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
# A turn is one question token and its answer; the image opens the conversation.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}<image> {% else %}{{ item['text'] }} {% endif %}"
    "{% endfor %}{% if message['role'] == 'assistant' %}</s> {% endif %}{% endfor %}"
)


def build_processor(vocabulary: Sequence[str], image_size: int, images: Any = None) -> LlavaProcessor:
    """A processor whose tokens are whole words and single digits; digits join to numbers when decoded.

    `images` is the image processor of a published tower; without it pixels go from -1 to 1.
    """
    tokens = [*SPECIAL, *"0123456789", *dict.fromkeys(vocabulary)]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokens.index("<s>"))]
    )
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
    )
    return LlavaProcessor(
        image_processor=images
        or CLIPImageProcessorPil(
            size={"shortest_edge": image_size},
            crop_size={"height": image_size, "width": image_size},
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        ),
        tokenizer=fast,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )


def build_model(
    processor: LlavaProcessor, image_size: int, width: int = 192, layers: int = 4, text_layers: int = 4
) -> LlavaForConditionalGeneration:
    """A Llava of a CLIP tower, a two-layer projector and a Llama, all `width` wide, randomly initialised.

    Every tower layer is read (`vision_feature_layer` -1): a fifth that LLaVA's usual -2 would skip would
    only cost time. Patch positions start as the 2-D sine and are learned from there; the tower's attention
    starts as `_mimic` has it, with which it learns to read in fewer steps.
    """
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        image_size=image_size,
        patch_size=PATCH,
        hidden_act="gelu",
        untrained_class_token=True,  # neither the projector nor any loss reads it
    )
    model = LlavaForConditionalGeneration(_config(processor, vision, -1, width, text_layers))
    grid = image_size // PATCH
    positions = model.model.vision_tower.embeddings.position_embedding.weight
    positions.data[1:] = sine_positions((grid, grid), width)
    for layer in model.model.vision_tower.encoder.layers:
        _mimic(layer.self_attn)
    return model


@torch.no_grad()
def _mimic(attention: CLIPAttention) -> None:
    """Start as trained attention looks: like attends to like, near to near, and takes from what it finds.

    Each head's product of queries and keys is about 0.7 I, that of values and output about -0.4 I, both with
    as much noise (Trockman and Kolter, Mimetic Initialization of Self-Attention Layers, ICML 2023).
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
    """Singular value decomposition of `size` times the sum of the identity and normal noise."""
    noise_DD = torch.randn(width, width) / width**0.5
    left_DD, sizes_D, right_DD = torch.linalg.svd(size * (noise_DD + torch.eye(width)))
    return left_DD, sizes_D, right_DD


def build_model_on(
    tower: str,
    path: str,
    layer: int,
    processor: LlavaProcessor,
    image_size: int,
    learned: LlavaForConditionalGeneration,
    new_layers: int,
) -> LlavaForConditionalGeneration:
    """A Llava of the frozen DINOv2 `tower`, read at `layer`, and the language model of `learned`.

    Between them lie a random projector and `new_layers` of a Llama, which hand on what they are given until
    they learn. `tower` is the hub id that the configuration will name, `path` where its weights lie. Raises
    ValueError as `put_tower`, and where the vocabularies of `processor` and `learned` differ in size.
    """
    text = learned.config.text_config
    if text.vocab_size != len(processor.tokenizer):
        raise ValueError(
            f"{learned.name_or_path}: it knows {text.vocab_size} tokens, the micro world has "
            f"{len(processor.tokenizer)}: train it again by `make micro`"
        )
    vision = cut_off(Encoder.load(path, layer, size=image_size), image_size)
    # The layer is counted from the front, as the whole tower has it.
    layers = new_layers + text.num_hidden_layers
    config = _config(processor, vision, layer, text.hidden_size, layers, mm_vision_tower=tower)
    model = LlavaForConditionalGeneration(config)
    put_tower(model, path)
    model.model.vision_tower.requires_grad_(False)
    _put_language(model, learned, new_layers)
    return model


def _put_language(
    model: LlavaForConditionalGeneration, learned: LlavaForConditionalGeneration, new_layers: int
) -> None:
    """Load the language model of `learned` above the first `new_layers` of the model's own."""
    language, known = model.model.language_model, learned.model.language_model
    for own in language.layers[:new_layers]:
        # What each adds to what it is given starts at nothing.
        nn.init.zeros_(own.self_attn.o_proj.weight)
        nn.init.zeros_(own.mlp.down_proj.weight)
    pairs = zip(language.layers[new_layers:], known.layers, strict=True)
    for own, taken in (
        *pairs,
        (language.embed_tokens, known.embed_tokens),
        (language.norm, known.norm),
        (model.lm_head, learned.lm_head),
    ):
        own.load_state_dict(taken.state_dict())


@torch.no_grad()
def folded(
    model: LlavaForConditionalGeneration, standardise: Standardise, dtype: torch.dtype
) -> LlavaForConditionalGeneration:
    """A copy in `dtype`, to read features as they are, of a model that learned on standardised ones."""
    copied = deepcopy(model)
    linear = copied.model.multi_modal_projector.linear_1
    linear.weight.div_(standardise.deviation_D)
    # Of the weights as they will be rounded: what they make of the mean is to be taken away again.
    linear.bias.sub_(linear.weight.to(dtype).float() @ standardise.mean_D)
    return copied.to(dtype)


def _config(
    processor: LlavaProcessor,
    vision: PretrainedConfig,
    layer: int,
    width: int,
    text_layers: int,
    **named: str,
) -> LlavaConfig:
    """Of a Llava whose projector and Llama are `width` wide."""
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
        **named,
    )


@torch.inference_mode()
def answers(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    images: Sequence[Image],
    questions: Sequence[str],
    batch_size: int = 64,
) -> list[str]:
    """Greedy answers of the untouched model to one-token questions, one per image."""
    said: list[str] = []
    for start in range(0, len(images), batch_size):
        stretch = slice(start, start + batch_size)
        prompts = [
            processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": q}]}]
            )
            for q in questions[stretch]
        ]
        inputs = processor(images=list(images[stretch]), text=prompts, return_tensors="pt").to(model.device)
        generated = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        said += processor.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return said
