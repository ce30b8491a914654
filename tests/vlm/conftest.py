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
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)

from atr.vlm.families.llava_onevision import OnevisionImageProcessor

VOCABULARY = ("<pad>", "<s>", "</s>", "<unk>", "<image>", *"abcdefghijklmnopqrstuvwxyz")
TEMPLATE = (
    "{% for message in messages %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}<image> {% else %}{{ item['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}"
)
# (height, width) in pixels that an image may be cut at, in tiles of 28 x 28 pixels and 4 x 4 tokens.
PINPOINTS = [[28, 28], [28, 56], [56, 28], [56, 56], [28, 84], [84, 56]]
# OneVision's grids of more than 2 * 1.1 ** 2 tiles are shrunk to the tokens of two.
ASPECT = "anyres_max_2"


@pytest.fixture
def tokenizer():
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
    )


@pytest.fixture
def family():
    """The family of model and processor; a test names others by its parameters."""
    return "llava"


@pytest.fixture
def processor(family, tokenizer):
    if family == "llava_onevision":
        images = LlavaOnevisionImageProcessorPil(
            size={"height": 28, "width": 28}, image_grid_pinpoints=PINPOINTS
        )
        return OnevisionImageProcessor(
            images,
            tokenizer,
            num_image_tokens=16,
            vision_feature_select_strategy="full",
            chat_template=TEMPLATE,
            video_token="<unk>",
            vision_aspect_ratio=ASPECT,
        )
    size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    kind, images = {
        "llava": (LlavaProcessor, CLIPImageProcessorPil(**size)),
        "llava_next": (
            LlavaNextProcessor,
            LlavaNextImageProcessorPil(**size, image_grid_pinpoints=PINPOINTS),
        ),
    }[family]
    return kind(
        images,
        tokenizer,
        patch_size=7,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )


def config_of(family):
    """Of a tiny model: 16 visual tokens a tile, weights large enough that every token matters."""
    tower = {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 7,
    }
    language = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family == "llava_onevision":
        return LlavaOnevisionConfig(
            vision_config=SiglipVisionConfig(**tower, vision_use_head=False),
            text_config=Qwen2Config(**language),
            image_token_index=4,
            video_token_index=3,
            image_grid_pinpoints=PINPOINTS,
            vision_aspect_ratio=ASPECT,
        )
    vision, text = CLIPVisionConfig(**tower, initializer_range=0.3), LlamaConfig(**language)
    if family == "llava_next":
        return LlavaNextConfig(
            vision_config=vision, text_config=text, image_token_index=4, image_grid_pinpoints=PINPOINTS
        )
    return LlavaConfig(vision_config=vision, text_config=text, image_token_id=4, vision_feature_layer=-2)


@pytest.fixture
def make_model(family):
    kind = {
        "llava": LlavaForConditionalGeneration,
        "llava_next": LlavaNextForConditionalGeneration,
        "llava_onevision": LlavaOnevisionForConditionalGeneration,
    }[family]

    def make(attention: str = "sdpa", dtype: torch.dtype = torch.float32, **config):
        torch.manual_seed(0)
        settings = config_of(family)
        for key, value in config.items():
            setattr(settings, key, value)
        model = kind(settings).to(dtype).eval()
        model.set_attn_implementation(attention)
        return model

    return make


@pytest.fixture
def model(make_model):
    return make_model()


def random_images(prompt: str, family: str) -> list[Image.Image]:
    """As many as the prompt has `<image>`, dependent on it alone; of any shape where a family cuts tiles."""
    generator = torch.Generator().manual_seed(zlib.crc32(prompt.encode()))
    images = []
    for _ in range(prompt.count("<image>")):
        drawn = torch.randint(8, 90, (2,), generator=generator).tolist()
        shape = (28, 28, 3) if family == "llava" else (*drawn, 3)
        pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        images.append(Image.fromarray(pixels.numpy()))
    return images


@pytest.fixture
def process(processor, family):
    """Prompts to inputs; each `<image>` is random and depends on its prompt alone, not on the batch."""

    def process(*prompts: str, images=None, **options):
        if images is None:
            images = [random_images(prompt, family) for prompt in prompts]
        if family != "llava_onevision":  # the one that tells the samples' images apart
            images = [image for sample in images for image in sample]
        images = images if any(images) else None
        return processor(text=list(prompts), images=images, padding=True, return_tensors="pt", **options)

    return process


@pytest.fixture
def make_pictures(family):
    """As many random images as asked for, of any shape where a family cuts tiles."""
    return lambda count: random_images("<image>" * count, family)
