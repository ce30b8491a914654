import zlib

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

VOCABULARY = ("<pad>", "<s>", "</s>", "<unk>", "<image>", *"abcdefghijklmnopqrstuvwxyz")
TEMPLATE = (
    "{% for message in messages %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}<image> {% else %}{{ item['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}"
)


@pytest.fixture(scope="session")
def processor() -> LlavaProcessor:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="<pad>",
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
            extra_special_tokens={"image_token": "<image>"},
            padding_side="left",
        ),
        patch_size=7,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )


@pytest.fixture
def make_model():
    """A tiny random LLaVA: 16 visual tokens, weights large enough that every token matters."""

    def make(attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> LlavaForConditionalGeneration:
        torch.manual_seed(0)
        vision = CLIPVisionConfig(
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=28,
            patch_size=7,
            initializer_range=0.3,
        )
        text = LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.3,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        config = LlavaConfig(
            vision_config=vision, text_config=text, image_token_id=4, vision_feature_layer=-2
        )
        model = LlavaForConditionalGeneration(config).to(dtype).eval()
        model.set_attn_implementation(attention)
        return model

    return make


@pytest.fixture
def model(make_model):
    return make_model()


@pytest.fixture
def process(processor):
    """Prompts to inputs; each `<image>` is random and depends on its prompt alone, not on the batch."""

    def images_of(prompt: str) -> list[Image.Image]:
        generator = torch.Generator().manual_seed(zlib.crc32(prompt.encode()))
        shape = (prompt.count("<image>"), 28, 28, 3)
        pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).numpy()
        return [Image.fromarray(image) for image in pixels]

    def process(*prompts: str, **options):
        images = [image for prompt in prompts for image in images_of(prompt)] or None
        return processor(text=list(prompts), images=images, padding=True, return_tensors="pt", **options)

    return process
