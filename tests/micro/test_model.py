from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from atr.config.presets import VLMS
from atr.micro.drawing import SIZE
from atr.micro.model import build_model, build_processor
from atr.micro.vocabulary import VOCABULARY
from atr.micro.world import sample

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def processor():
    return build_processor(VOCABULARY, SIZE)


@pytest.fixture(scope="module")
def model(processor):
    torch.manual_seed(0)
    return build_model(processor, SIZE, width=64, layers=1).eval()


def test_attention_starts_by_mimetic_initialisation(processor):
    """Query and key weights correlate in every head, value and output weights anti-correlate."""
    model = build_model(processor, SIZE, width=128, layers=2)
    for layer in model.model.vision_tower.encoder.layers:
        own = layer.self_attn
        heads = [own.q_proj.weight[rows].T @ own.k_proj.weight[rows] for rows in (slice(64), slice(64, 128))]
        assert not torch.allclose(*heads)
        through = own.out_proj.weight @ own.v_proj.weight
        for product, sign in ((heads[0], 1), (heads[1], 1), (through, -1)):
            others = product[~torch.eye(128, dtype=torch.bool)]
            assert sign * product.diagonal().mean() > 0.3 and others.mean().abs() < 0.01


@pytest.mark.parametrize("answer", ["407", "kettle", "9", "0"])
def test_the_tokenizer_decodes_what_it_encodes(processor, answer):
    ids = processor.tokenizer(answer).input_ids
    assert (
        processor.tokenizer.decode([*ids, processor.tokenizer.eos_token_id], skip_special_tokens=True)
        == answer
    )


def test_every_word_is_one_token_and_every_digit_too(processor):
    tokenizer = processor.tokenizer
    for word in VOCABULARY:
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1
        assert tokenizer.unk_token_id not in tokenizer(word).input_ids
    assert len(tokenizer("9021", add_special_tokens=False).input_ids) == 4


def test_prompt_is_start_image_question(processor):
    image = sample("docs", "train", 0, 0).image
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "price"}]}]
    inputs = processor(images=[image], text=[processor.apply_chat_template(chat)], return_tensors="pt")
    start, *visual, question = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    assert (start, set(visual), len(visual), question) == ("<s>", {"<image>"}, 144, "price")


def test_pixels_reach_the_tower_unchanged_but_for_their_scale(processor):
    image = sample("signs", "train", 0, 0).image
    pixels = processor.image_processor(images=[image], return_tensors="pt")["pixel_values"][0]
    expected = torch.from_numpy(np.asarray(image)).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(pixels, expected)


def test_configurations_mark_the_class_token_as_untrained(model):
    """Reducers that rank by its attention need to know: they would rank by noise."""
    shipped = AutoConfig.from_pretrained(ROOT / VLMS["micro"].path).vision_config
    assert shipped.untrained_class_token and model.config.vision_config.untrained_class_token
